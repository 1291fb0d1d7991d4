// Package console is what PID 1 tells people: one line each on descriptor 2, which is /dev/console, with the seconds since the
// kernel started. It holds no state, and avoids fmt, which would cost PID 1 a fifth of its memory.
package console

import (
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
	unix.Write(2, []byte(stamp(time.Duration(now.Nano()))+text+"\n"))
	if kmsg, err := unix.Open("/dev/kmsg", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		unix.Write(kmsg, []byte("<31>init: "+text+"\n")) // facility daemon, level debug
		unix.Close(kmsg)
	}
}

// GiveUp says why, gives people ten seconds to read it, and restarts the machine. It does not return.
func GiveUp(parts ...string) {
	Say(parts...)
	Say("bulkhead: restarting the machine in 10 s")
	go unix.Sync() // it may hang, and must not hold the restart up
	time.Sleep(10 * time.Second)
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	for { // PID 1 must not end
		time.Sleep(time.Hour)
	}
}

// Seconds is a duration for people: "0.08 s", "2.4 s", "10 s".
func Seconds(d time.Duration) string {
	digits := 0
	switch {
	case d < 100*time.Millisecond:
		digits = 2
	case d < 10*time.Second:
		digits = 1
	}
	return strings.TrimSuffix(strconv.FormatFloat(d.Seconds(), 'f', digits, 64), ".0") + " s"
}

func stamp(d time.Duration) string {
	s := strconv.FormatInt(int64(d/time.Second), 10)
	ms := strconv.FormatInt(int64(d/time.Millisecond%1000), 10)
	return "[" + strings.Repeat(" ", max(0, 4-len(s))) + s + "." + strings.Repeat("0", 3-len(ms)) + ms + "] "
}
