// Package unmap takes a program's text and constants out of its own process: what was needed to start is mostly not needed again.
// Nothing is lost: what is still needed comes back from the page cache at the next touch (madvise(2), MADV_DONTNEED on a file's
// private mapping), and the rest is the kernel's to drop when memory gets short.
package unmap

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Regions is where a program's text and constants are mapped, begin and end. Nil has none.
type Regions [][2]uintptr

// Program returns where this program is mapped; nil if that cannot be told.
func Program() Regions {
	self, err := os.Readlink("/proc/self/exe")
	text, err2 := os.ReadFile("/proc/self/maps")
	if err != nil || err2 != nil {
		return nil
	}
	return readOnly(string(text), self)
}

// Drop unmaps them until they are touched again. Any goroutine may call it at any time.
func (r Regions) Drop() {
	for _, m := range r {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m[0], m[1]-m[0], unix.MADV_DONTNEED)
	}
}

// readOnly reads the content of /proc/self/maps (proc_pid_maps(5)).
func readOnly(maps, program string) (regions Regions) {
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
