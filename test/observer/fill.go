package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// fillFile is what takes the room; it belongs to nobody.
const fillFile = "observer.fill"

// volumes are what can be filled.
var volumes = map[string]string{"VAR": "/var", "STATE": "/state"}

// fill gives the free blocks of a volume to one file, as user 65534 without privileges would, so that blocks that are reserved for somebody stay
// free; with privileged=1 the reserved ones too. It prints how many bytes the file has.
func fill(w io.Writer, q url.Values) error {
	dir, ok := volumes[q.Get("volume")]
	if !ok {
		return fmt.Errorf("there is no volume %q", q.Get("volume"))
	}
	if _, err := os.Stat(filepath.Join(dir, ".mounted")); err != nil {
		return fmt.Errorf("volume %s is not mounted: %w", q.Get("volume"), err)
	}
	f, err := os.OpenFile(filepath.Join(dir, fillFile), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	size, result := int64(0), make(chan error)
	go func() {
		// The thread is not given back: what it gave up would be missing elsewhere.
		runtime.LockOSThread()
		if q.Get("privileged") == "" {
			if err := unprivileged(); err != nil {
				result <- err
				return
			}
		}
		// Ever smaller pieces, since the last blocks are not in one.
		for piece := int64(1 << 30); piece >= 4096; {
			err := unix.Fallocate(int(f.Fd()), 0, size, piece)
			switch {
			case err == nil:
				size += piece
			case errors.Is(err, unix.ENOSPC):
				piece /= 2
			case !errors.Is(err, unix.EINTR):
				result <- os.NewSyscallError("fallocate", err)
				return
			}
		}
		result <- nil
	}()
	if err := <-result; err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, size)
	return err
}

// unprivileged makes this thread user 65534 without capabilities for file systems, and for good.
func unprivileged() error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, 65534, 65534, 65534); errno != 0 {
		return os.NewSyscallError("setresgid", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 { // and its capabilities are gone
		return os.NewSyscallError("setresuid", errno)
	}
	return nil
}

func empty(volume string) error {
	dir, ok := volumes[volume]
	if !ok {
		return fmt.Errorf("there is no volume %q", volume)
	}
	if err := os.Remove(filepath.Join(dir, fillFile)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
