// Package boot brings the machine from the kernel's hand-over to a root on which units can run. It is two lists of steps: First in
// the initramfs, Second on the verified root. It reads nothing from a network, and trusts the kernel command line alone: from
// there comes the root hash, and all else on a disk is believed only as far as dm-verity checks it.
package boot

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/init/watchdog"
)

// A step is one thing that has to work.
type step struct {
	name string // what it does, after "cannot"
	do   func() error
	look string // where a person should look if it fails
}

// run does the steps in order. The first that fails ends the boot, and the watchdog one that hangs.
func run(steps []step, dog *watchdog.Dog) {
	for _, s := range steps {
		dog.Feed()
		if err := s.do(); err != nil {
			console.Say("bulkhead: cannot ", s.name, ": ", err.Error())
			console.GiveUp("bulkhead: look at ", s.look)
		}
	}
}

// Ordered says whether the kernel command line has the word without which PID 1 does nothing at all.
// In the initramfs it mounts /proc for that.
func Ordered() bool {
	line, err := os.ReadFile("/proc/cmdline")
	if errors.Is(err, fs.ErrNotExist) && os.Getpid() == 1 {
		os.Mkdir("/proc", 0o555)
		unix.Mount("proc", "/proc", "proc", noExec, "")
		line, _ = os.ReadFile("/proc/cmdline")
	}
	return slices.Contains(strings.Fields(string(line)), "bulkhead")
}

const noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// A mount is a file system that the kernel makes up.
type mount struct {
	target, fs string
	flags      uintptr
	data       string
	optional   bool // kernels may be built without it
}

func mountSteps(table []mount) (steps []step) {
	for _, m := range table {
		steps = append(steps, step{"mount " + m.target, func() error {
			os.Mkdir(m.target, 0o755) // mount says what is wrong if this was
			err := unix.Mount(m.fs, m.target, m.fs, m.flags, m.data)
			if m.optional {
				err = nil
			}
			return err
		}, "the kernel's configuration: it needs the file system " + m.fs})
	}
	return steps
}

// modules loads kernel modules, given as one path in each line, relative to dir, with the module's parameters behind a blank: those
// before the list's empty line, or those after it. It returns their number. One that cannot be loaded is told and left: it may be for
// a device that this machine does not have. loaded is called after each.
func modules(list, dir string, rest bool, loaded func()) (n int, err error) {
	text, err := os.ReadFile(list)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	now, after, _ := strings.Cut(string(text), "\n\n")
	if rest {
		now = after
	}
	for line := range strings.Lines(now) {
		path, params, _ := strings.Cut(strings.TrimSpace(line), " ")
		if err := load(dir+path, params); err == nil || err == unix.EEXIST {
			n++
		} else if err != unix.ENODEV { // the module's own word that the machine has no such thing
			console.Say("bulkhead: module ", path, ": ", err.Error())
		}
		loaded()
	}
	return n, err
}

func sayModules(n int, start time.Time) {
	console.Say("bulkhead: ", strconv.Itoa(n), " modules loaded in ", console.Seconds(time.Since(start)))
}

func load(path, params string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.FinitModule(fd, params, 0)
}
