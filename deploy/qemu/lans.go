package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/deploy/qemu/lan"
)

// lanIdle is how long a switch outlives its last machine: long enough for a machine whose power is cut and put on again.
const lanIdle = time.Minute

const lanPidFile = "switch.pid" // locked while the switch runs

// lanFD is the machine's folder, in which QEMU makes the socket: a socket's name may have 107 bytes only, and QEMU, which makes it in a thread of its own, may have left the
// folder that it was started in by then.
const lanFD = tpmFD + 1

// ErrLANRuns is returned by RunLAN if another process runs that network's switch.
var ErrLANRuns = errors.New("the switch runs already")

// Members returns the machines on a LAN, ordered by name.
func Members(lan string) ([]Machine, error) {
	names, err := List()
	if err != nil {
		return nil, err
	}
	var all []Machine
	for _, n := range names {
		m, err := Load(n)
		if err != nil {
			return nil, err
		}
		if m.LAN == lan {
			all = append(all, m)
		}
	}
	return all, nil
}

// lanDir is the folder of a LAN's switch; no machine can have its name.
func lanDir(name string) (string, error) {
	if !nameForm.MatchString(name) {
		return "", fmt.Errorf("LAN %q: want 1 to 32 small letters, digits and dashes", name)
	}
	home, err := Home()
	return filepath.Join(home, ".lan-"+name), err
}

// LANControl returns what gives orders to a LAN's switch, whichever process runs it.
func LANControl(name string) (lan.Control, error) {
	dir, err := lanDir(name)
	return lan.Control{Dir: dir}, err
}

// RunLAN is the switch of a LAN: it runs until ctx is done, StopLAN is called, or none of the LAN's machines has run for a minute. The error is ErrLANRuns if
// it runs already.
func RunLAN(ctx context.Context, name string, log *slog.Logger) error {
	dir, err := lanDir(name)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lanPidFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("LAN %s: %w", name, ErrLANRuns)
	}
	if err := errors.Join(lock.Truncate(0), writeAt(lock, fmt.Sprintln(os.Getpid()))); err != nil {
		return err
	}
	ports := func() []lan.Port {
		members, err := Members(name)
		if err != nil { // a machine that is just being made or removed: looked at again at once
			return nil
		}
		var all []lan.Port
		for _, m := range members {
			all = append(all, lan.Port{Name: m.Name, Socket: m.path(LANSocket), Address: m.LANAddress})
		}
		return all
	}
	s, err := lan.New(lan.Config{Dir: dir, Ports: ports, Log: log, Idle: lanIdle})
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// StopLAN ends a LAN's switch, wherever it runs, and removes its folder. One that does not run is no error.
func StopLAN(ctx context.Context, name string) error {
	dir, err := lanDir(name)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(dir, lanPidFile))
	if errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(dir)
	} else if err != nil {
		return err
	}
	err = lan.Control{Dir: dir}.Stop(ctx)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return os.RemoveAll(dir) // it has ended
	} else if err != nil {
		return err
	}
	if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pid != os.Getpid() {
		if err := waitExit(ctx, pid, 10*time.Second); err != nil {
			return fmt.Errorf("switch of LAN %s: %w", name, err)
		}
	}
	return os.RemoveAll(dir)
}
