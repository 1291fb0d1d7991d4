package dm

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// request is _IOWR(0xfd, 0, struct dm_ioctl); the command's number is added.
const request = 0xc138fd00

// ioctl sends one message, which the kernel overwrites with its answer.
func ioctl(f *os.File, command uintptr, message []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request|command, uintptr(unsafe.Pointer(&message[0])))
	runtime.KeepAlive(message)
	if errno != 0 {
		return errno
	}
	return nil
}
