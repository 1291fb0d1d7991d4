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
// lets its heap grow by a quarter only, and gives back what it took for a moment, first of all for starting.
const (
	settleAfter = 20 * time.Second
	settleEvery = time.Minute
	idleGC      = 25 // percent
)

func staySmall() {
	time.Sleep(settleAfter)
	for ; ; time.Sleep(settleEvery) {
		settle()
	}
}

func settle() {
	debug.SetGCPercent(idleGC)
	debug.FreeOSMemory()
	self, err := os.Readlink("/proc/self/exe")
	maps, err2 := os.ReadFile("/proc/self/maps")
	if err != nil || err2 != nil {
		return
	}
	for _, r := range readOnly(string(maps), self) {
		// Nothing is lost: what is still needed of the program comes back from the page cache at the next touch, and the rest is the
		// kernel's to drop when memory gets short.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, r[0], r[1]-r[0], unix.MADV_DONTNEED)
	}
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
