package main

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A light daemon starts fast and is small afterwards: at first it collects no garbage before it has 4 MiB, as Go programs do; then it
// lets its heap grow by a quarter only. While it is idle it gives back what it took for a moment, and keeps no more of the program
// mapped than it has needed lately.
const (
	settleAfter = 20 * time.Second
	unmapEvery  = 10 * time.Second
	freeEvery   = 6  // times unmapEvery
	idleGC      = 25 // percent
	// idleShare is the share of one processor up to which a daemon counts as idle, in percent. A busy one keeps what it has.
	idleShare = 5
)

func staySmall() {
	time.Sleep(settleAfter)
	debug.SetGCPercent(idleGC)
	program := textOf()
	used := processorTime()
	for n := 0; ; n++ {
		before := used
		if used = processorTime(); used-before <= unmapEvery*idleShare/100 {
			if n%freeEvery == 0 {
				debug.FreeOSMemory()
			}
			unmap(program)
		}
		time.Sleep(unmapEvery)
	}
}

// processorTime is what the process has used so far.
func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// unmap takes mappings of a file out of this process. Nothing is lost: what is still needed comes back from the page cache at the next
// touch, and the rest is the kernel's to drop when memory gets short.
func unmap(regions [][2]uintptr) {
	for _, r := range regions {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, r[0], r[1]-r[0], unix.MADV_DONTNEED)
	}
}

// textOf returns where this program's text and constants are mapped; nil if that cannot be told.
func textOf() [][2]uintptr {
	self, err := os.Readlink("/proc/self/exe")
	text, err2 := os.ReadFile("/proc/self/maps")
	if err != nil || err2 != nil {
		return nil
	}
	return readOnly(string(text), self)
}

// readOnly returns where a program's text and constants are mapped, begin and end, from the content of /proc/self/maps.
func readOnly(maps, program string) (regions [][2]uintptr) {
	for line := range strings.Lines(maps) {
		f := strings.Fields(line)
		if len(f) != 6 || f[1] != "r-xp" && f[1] != "r--p" || f[5] != program {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		a, err := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err == nil && err2 == nil && a < b {
			regions = append(regions, [2]uintptr{uintptr(a), uintptr(b)})
		}
	}
	return regions
}
