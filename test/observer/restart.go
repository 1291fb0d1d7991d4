package main

import (
	"errors"
	"net/url"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// restart orders a unit's restart from PID 1 as machined does, which may itself be what does not answer. Unlike an end by a signal it is somebody's wish.
func restart(q url.Values) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: it belongs to machined's user now
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid.Machined), uintptr(uid.Machined), uintptr(uid.Machined)); errno != 0 {
			result <- os.NewSyscallError("setresuid", errno)
			return
		}
		c, err := initctl.Dial("")
		if err == nil {
			err = errors.Join(c.Restart(q.Get("unit")), c.Close())
		}
		result <- err
	}()
	return <-result
}
