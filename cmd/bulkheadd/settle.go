package main

import (
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unmap"
)

// A light daemon is small: its heap grows by a quarter only, it gives back what it took for a moment while it is idle, and it keeps no more of
// the program mapped than it has needed lately.
const (
	heapGrowth = 25 // percent; debug.SetGCPercent
	unmapEvery = time.Second
	freeEvery  = 30 * time.Second
	// idleShare is the share of one processor up to which a daemon counts as idle, in percent. A busy one keeps what it has.
	idleShare = 20
)

func staySmall() {
	program := unmap.Program()
	used := processorTime()
	freed := time.Now()
	for {
		time.Sleep(unmapEvery)
		before := used
		if used = processorTime(); used-before > unmapEvery*idleShare/100 {
			continue
		}
		if now := time.Now(); now.Sub(freed) >= freeEvery {
			debug.FreeOSMemory()
			freed = now
		}
		program.Drop()
	}
}

// processorTime is what the process has used so far.
func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
