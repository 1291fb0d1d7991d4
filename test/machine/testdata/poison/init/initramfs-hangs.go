package main

import (
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

// PID 1 stops for ever in the initramfs, when the disk is there: one thread holds its processor and hears no signal, and the rest wait
// for it at the next collection of garbage.
func init() {
	if os.Getpid() != 1 || len(os.Args) > 1 && os.Args[1] == "supervise" {
		return
	}
	go func() {
		for {
			if _, err := os.Stat("/sys/class/block/vda"); err == nil {
				break
			}
			time.Sleep(time.Millisecond)
		}
		go deaf()
		time.Sleep(10 * time.Millisecond)
		runtime.GC()
	}()
}

func deaf() {
	runtime.LockOSThread()
	all := ^uint64(0)
	syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, 2, uintptr(unsafe.Pointer(&all)), 0, 8, 0, 0) // SIG_SETMASK
	for {
		syscall.RawSyscall(syscall.SYS_PAUSE, 0, 0, 0)
	}
}
