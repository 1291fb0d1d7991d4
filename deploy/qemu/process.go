package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func ended(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// path returns where a file of the machine is.
func (m Machine) path(name string) string { return filepath.Join(m.Dir, name) }

func (m Machine) pidPath() string { return m.path(pidFile) }

// running returns this machine's QEMU, nil if it does not run.
func (m Machine) running() *os.Process { return m.process(pidFile, "qemu-system-") }

// process returns the one whose number is in a pid file of the machine, nil if it does not run. The process is held before it is
// looked at, so what is signalled later is what was looked at, even if its number has been given to another by then.
func (m Machine) process(pidFile, program string) *os.Process {
	text, err := os.ReadFile(m.path(pidFile))
	if err != nil {
		return nil
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 1 {
		return nil
	}
	p, err := os.FindProcess(pid)
	if err != nil {
		return nil
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || !owns(cmdline, program, m.path(pidFile)) {
		return nil
	}
	return p
}

// owns says whether a process with these arguments, separated by NUL, is the program that writes this pid file. Its full name, in the
// arguments, tells this machine's from all others.
func owns(cmdline []byte, program, pidPath string) bool {
	args := strings.Split(string(cmdline), "\x00")
	return strings.HasPrefix(filepath.Base(args[0]), program) && (slices.Contains(args[1:], pidPath) || slices.Contains(args[1:], "file="+pidPath))
}

// waitExit waits for a process that is nobody's child here.
func waitExit(ctx context.Context, pid int, limit time.Duration) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(limit); ; {
		left := time.Until(deadline)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if left <= 0 {
			return fmt.Errorf("process %d still runs after %s", pid, limit)
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(min(left, 200*time.Millisecond).Milliseconds())+1) // short, to see ctx
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
	}
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}
