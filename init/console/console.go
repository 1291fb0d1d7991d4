// Package console is what PID 1 tells people: one line each on descriptor 2, which is /dev/console, with the seconds since the
// kernel started. It holds no state. PID 1 does without fmt, which would take a fifth of its memory.
package console

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Say writes the parts as one line, to the console and, at the level that the kernel does not print, to the kernel's log, where
// machined finds it. It may block while the console does.
func Say(parts ...string) {
	text := strings.Join(parts, "")
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	seconds := strconv.FormatFloat(float64(now.Nano())/1e9, 'f', 3, 64)
	unix.Write(2, []byte("["+strings.Repeat(" ", max(0, 8-len(seconds)))+seconds+"] "+text+"\n"))
	if kmsg, err := unix.Open("/dev/kmsg", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Write(kmsg, []byte("<31>init: "+text+"\n")) // facility daemon, level debug
		unix.Close(kmsg)
	}
}

// GiveUp says why, gives people ten seconds to read it, and ends PID 1, and so the machine: the kernel panics, which keeps its last
// lines, these among them, where the next boot finds them (pstore), and restarts. It does not return.
func GiveUp(parts ...string) {
	Say(parts...)
	Say("bulkhead: restarting the machine in 10 s")
	go unix.Sync() // it may hang, and must not hold the restart up
	time.Sleep(10 * time.Second)
	End()
}

// End is GiveUp at once: for what only the next boot has to know. It does not return.
func End(parts ...string) {
	if len(parts) > 0 {
		Say(parts...)
	}
	os.WriteFile("/proc/sys/kernel/panic", []byte("-1\n"), 0) // at once; else after the ten seconds of the command line's panic=10
	os.Exit(1)
}

// Seconds is a duration for people: "0.08 s", "2.4 s", "10 s".
func Seconds(d time.Duration) string {
	digits := 1
	if d < 100*time.Millisecond {
		digits = 2
	}
	return strings.TrimSuffix(strconv.FormatFloat(d.Seconds(), 'f', digits, 64), ".0") + " s"
}

// A First keeps the first error of steps that do no harm after one that failed. Its zero value is ready for use.
type First struct{ Err error }

// Try keeps err, with what was tried in front, if it is the first that is not nil.
func (f *First) Try(what string, err error) {
	if f.Err == nil {
		f.Err = os.NewSyscallError(what, err)
	}
}

// A Mount is a line of the table of mounts.
type Mount struct{ Point, FS, Source string }

// Mounts returns what this thread sees mounted, oldest first; text is the content of /proc/thread-self/mountinfo.
func Mounts(text []byte) (all []Mount) {
	plain := func(s string) string { // blanks are written \040, which Go reads too
		if u, err := strconv.Unquote(`"` + s + `"`); err == nil {
			return u
		}
		return s
	}
	for line := range strings.Lines(string(text)) {
		left, right, _ := strings.Cut(line, " - ")
		if l, r := strings.Fields(left), strings.Fields(right); len(l) >= 6 && len(r) >= 2 {
			all = append(all, Mount{plain(l[4]), r[0], plain(r[1])})
		}
	}
	return all
}
