package main

import (
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unmap"
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
	program := unmap.Program()
	used := processorTime()
	for n := 0; ; n++ {
		before := used
		if used = processorTime(); used-before <= unmapEvery*idleShare/100 {
			if n%freeEvery == 0 {
				debug.FreeOSMemory()
			}
			program.Drop()
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
