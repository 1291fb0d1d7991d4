// Package confine is the trampoline: it runs in a process that PID 1 has just made, takes away all that the unit may not have, and
// becomes the unit's program. Every failure ends it before that program has run one instruction.
package confine

import (
	"errors"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/boot"
	"github.com/bulkhead-os/bulkhead/init/mounts"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Name is argv[0] of the trampoline; argv[1] is a unit, or Namespace followed by the name of a mount namespace.
const (
	Name      = "confine"
	Namespace = "@"
)

// transient is the exit code for what may work the next time. unit.DoNotRestart is for what cannot.
const transient = 126

// Main becomes the named unit, or says on descriptor 2 why it cannot, and exits.
func Main(units []unit.Unit, what string) {
	// Namespaces, ids and capabilities belong to a thread, and execve keeps those of the thread that calls it.
	runtime.LockOSThread()
	code, err := unit.DoNotRestart, errors.New("no such unit")
	if name, ok := strings.CutPrefix(what, Namespace); ok {
		code, err = transient, hold(units, name)
	}
	for i := range units {
		if units[i].Name == what {
			code, err = transient, become(&units[i])
		}
	}
	if err != nil {
		os.Stderr.WriteString("confine " + what + ": " + err.Error() + "\n")
		if isAny(err, unix.ENOENT, unix.EACCES, unix.ENOEXEC) && strings.HasPrefix(err.Error(), "exec ") {
			code = unit.DoNotRestart // the image is read-only: the program will not appear
		}
		os.Exit(code)
	}
}

func isAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// become returns only if it fails.
func become(u *unit.Unit) error {
	fds := Descriptors(u)
	end := unit.FirstListener + len(fds)
	enter := func() error { return separate(u) }
	if Named(u) {
		enter = func() error { return join(end) } // PID 1 passes it behind all others
	}
	if err := enter(); err != nil {
		return err
	}
	for _, s := range []struct {
		what string
		do   func() error
	}{
		{"close descriptors", func() error { return unix.CloseRange(uint(end), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }},
		{"set limits", func() error { return limit(u) }},
		{"set the chance to be killed", func() error { return os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(u.OOMScoreAdj)), 0) }},
		{"change to /", func() error { unix.Umask(0o077); return unix.Chdir("/") }},
		{"take the identity", func() error { return identify(u) }},
		{"check the identity", func() error { return check(u) }},
		{"forbid new privileges", func() error {
			if u.NewPrivileges {
				return nil
			}
			return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		}},
		// Here belong the unit's Landlock rules and, last, its seccomp filter: both outlive execve and need no_new_privs.
	} {
		if err := s.do(); err != nil {
			return os.NewSyscallError(s.what, err)
		}
	}
	env := append([]string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "BULKHEAD_UNIT=" + u.Name, "BULKHEAD_FDS=" + strings.Join(fds, ","),
	}, u.Env...)
	return os.NewSyscallError("exec "+u.Exec[0], unix.Exec(u.Exec[0], append([]string{u.Name}, u.Exec[1:]...), env))
}

// Descriptors names what the unit inherits from unit.FirstListener on.
func Descriptors(u *unit.Unit) []string {
	fds := append([]string(nil), u.Listen...)
	if u.Console {
		fds = append(fds, "console")
	}
	return fds
}

// Named says whether the unit lives in a mount namespace that several units share.
func Named(u *unit.Unit) bool { return u.MountNamespace != "" && u.MountNamespace != "shared" }

// separate cuts the mount namespace in which PID 1 has made this process off from the others'.
func separate(u *unit.Unit) error {
	if u.MountNamespace == "" {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return os.NewSyscallError("make mounts private", err)
		}
		return hide(u.Hide)
	}
	// "shared": what is mounted on the volumes is for everybody; everything else stays here.
	all, err := mounts.Read()
	if err != nil {
		return err
	}
	for _, m := range all {
		if !onVolume(m.Point) {
			if err := unix.Mount("", m.Point, "", unix.MS_SLAVE, ""); err != nil {
				return os.NewSyscallError("make "+m.Point+" private", err)
			}
		}
	}
	for _, path := range u.Hide {
		if onVolume(path) {
			return errors.New("hide " + path + ": it would be hidden from everybody, for mounts there are shared")
		}
	}
	return hide(u.Hide)
}

func onVolume(path string) bool {
	for _, v := range boot.Volumes {
		if mounts.Under(path, v) {
			return true
		}
	}
	return false
}

// hide mounts an empty folder over each path that exists.
func hide(paths []string) error {
	for _, path := range paths {
		err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0555,size=4k,nr_inodes=2")
		if err != nil && err != unix.ENOENT {
			return os.NewSyscallError("hide "+path, err)
		}
	}
	return nil
}

// join enters the mount namespace behind the descriptor.
func join(fd int) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // setns wants a thread with a working folder of its own
		return os.NewSyscallError("unshare", err)
	}
	if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("enter the mount namespace", err)
	}
	return nil
}

// hold makes the named mount namespace out of the one of its own that this process has, says so on descriptor 3, and
// stays until PID 1, which keeps the namespace, closes descriptor 4.
func hold(units []unit.Unit, name string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return os.NewSyscallError("make mounts private", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return os.NewSyscallError("share mounts", err)
	}
	var paths []string
	for _, u := range units {
		if u.MountNamespace == name {
			paths = append(paths, u.Hide...)
		}
	}
	slices.Sort(paths) // what one of its units may not see, none may
	if err := hide(slices.Compact(paths)); err != nil {
		return err
	}
	var b [1]byte
	unix.Write(3, []byte("\n"))
	unix.Close(3)
	unix.Read(4, b[:])
	return nil
}

func limit(u *unit.Unit) error {
	files := u.NoFile
	if files == 0 {
		files = 1024
	}
	// The one of package syscall: with any other, Exec would put the old limit back.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files}); err != nil {
		return err
	}
	return syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{})
}
