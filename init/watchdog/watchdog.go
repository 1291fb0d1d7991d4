// Package watchdog holds the machine's hardware watchdog, if it has one: PID 1 opens it in the initramfs, as soon as its module is
// loaded, and keeps the descriptor when it becomes the root's init. From then on a machine on which PID 1 no longer runs is reset.
package watchdog

import (
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
)

// timeout is how long PID 1 may be silent, in seconds. A machine that only swaps or waits for a slow console must not be reset.
const timeout = 60

const cardReset = 0x20 // WDIOF_CARDRESET of linux/watchdog.h: the watchdog did it the last time

// A Dog is the watchdog, or the place for one. Its zero value has none. Only one goroutine may use it.
type Dog struct{ fd int } // 0: there is none

// Find opens the watchdog, if that was not possible before.
func (d *Dog) Find() {
	if d.fd > 0 {
		return
	}
	fd, err := unix.Open("/dev/watchdog", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	d.fd = fd
	if why, err := unix.IoctlGetInt(fd, unix.WDIOC_GETBOOTSTATUS); err == nil && why&cardReset != 0 {
		console.Say("bulkhead: the hardware watchdog has reset this machine: PID 1 or the kernel hung")
	}
	if err := unix.IoctlSetPointerInt(fd, unix.WDIOC_SETTIMEOUT, timeout); err != nil {
		console.Say("bulkhead: the hardware watchdog keeps its own timeout: ", err.Error())
	}
	console.Say("bulkhead: the hardware watchdog is on")
}

// Feed tells the watchdog that PID 1 lives.
func (d *Dog) Feed() {
	if d.fd > 0 {
		unix.Write(d.fd, []byte{0})
	}
}

// Pass makes the watchdog outlive execve and returns its text for Inherit.
func (d *Dog) Pass() string {
	if d.fd > 0 {
		unix.FcntlInt(uintptr(d.fd), unix.F_SETFD, 0)
	}
	return strconv.Itoa(d.fd)
}

// Inherit takes over what Pass returned.
func Inherit(text string) *Dog {
	fd, err := strconv.Atoi(text)
	if err != nil || fd <= 2 {
		return &Dog{}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil { // no unit may have it
		return &Dog{}
	}
	return &Dog{fd}
}
