// Package confine is the trampoline: it runs in a process that PID 1 has just made, takes away all that the unit may not have, and
// becomes the unit's program. Every failure ends it before that program has run one instruction.
package confine

import (
	"errors"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/boot"
	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Name is argv[0] of the trampoline; argv[1] is the unit.
const Name = "confine"

// Main becomes the named unit, or says on descriptor 2 and in the kernel's log why it cannot, and exits. The caller is locked to its thread: namespaces, ids
// and capabilities belong to a thread, and execve keeps those of the thread that calls it. inside says that this is the second half of the
// way into a holder's namespaces.
func Main(units []unit.Unit, what string, inside bool) {
	kmsg, _ := unix.Open("/dev/kmsg", unix.O_WRONLY|unix.O_CLOEXEC, 0) // now, for later it may not be allowed
	code, err := unit.DoNotRestart, errors.New("no such unit")
	if i := slices.IndexFunc(units, func(u unit.Unit) bool { return u.Name == what }); i >= 0 {
		code, err = become(&units[i], inside)
	}
	text := "confine " + what + ": " + err.Error() + "\n"
	os.Stderr.WriteString(text)
	unix.Write(kmsg, []byte("<27>init: "+text)) // the console too, for perhaps no daemon is there to show the log
	os.Exit(code)
}

// become returns only if it fails, with the exit code for that.
func become(u *unit.Unit, inside bool) (code int, err error) {
	fds := Descriptors(u)
	end := unit.FirstListener + len(fds)
	switch {
	case inside:
		_, err = unix.Setsid()
	case u.Inside != "":
		return unit.NotConfined, enter(u, end, end+1) // PID 1 passes them behind all others
	case u.Holds:
		err = furnish(u)
	default:
		err = separate(u)
	}
	f := console.First{Err: err}
	f.Try("close descriptors", unix.CloseRange(uint(end), math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC))
	f.Try("set the chance to be killed", os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(u.OOMScoreAdj)), 0))
	// Of package syscall: after another Setrlimit, Exec would put the old limit back.
	files := u.NoFile
	if files == 0 {
		files = 1024
	}
	f.Try("limit files", syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: files, Max: files}))
	f.Try("forbid core files", syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}))
	unix.Umask(umask(u))
	f.Try("change to /", unix.Chdir("/"))
	if f.Err == nil {
		f.Err = restrict(u)
	}
	if f.Err != nil {
		return unit.NotConfined, f.Err
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "BULKHEAD_UNIT=" + u.Name, "BULKHEAD_FDS=" + strings.Join(fds, ",")}
	err = unix.Exec(u.Exec[0], append([]string{u.Name}, u.Exec[1:]...), append(env, u.Env...))
	code = unit.NotConfined
	if err == unix.ENOENT || err == unix.EACCES || err == unix.ENOEXEC {
		code = unit.DoNotRestart // the image is read-only: the program will not appear
	}
	return code, os.NewSyscallError("exec "+u.Exec[0], err)
}

// Descriptors names what the unit inherits from unit.FirstListener on.
func Descriptors(u *unit.Unit) []string {
	if u.Console {
		return append(slices.Clone(u.Listen), "console")
	}
	return u.Listen
}

// separate cuts the mount namespace in which PID 1 has made this process off from the others'.
func separate(u *unit.Unit) error {
	var f console.First
	if u.MountNamespace == "" {
		f.Try("make mounts private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""))
	} else { // "shared": what is mounted on the volumes is for everybody; everything else stays here
		text, err := os.ReadFile("/proc/thread-self/mountinfo")
		f.Try("read mounts", err)
		for _, m := range console.Mounts(text) {
			if !onVolume(m.Point) {
				f.Try("make "+m.Point+" private", unix.Mount("", m.Point, "", unix.MS_SLAVE, ""))
			}
		}
		if i := slices.IndexFunc(u.Hide, onVolume); i >= 0 {
			f.Try("hide "+u.Hide[i], errors.New("it would be hidden from everybody, for mounts there are shared"))
		}
	}
	if f.Err == nil && u.Proc == "" { // processes of others do not exist in it; a kernel that does not know the word refuses
		f.Try("make /proc", unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=invisible"))
	}
	return hide(f, u.Hide)
}

func onVolume(path string) bool {
	return slices.ContainsFunc(boot.Volumes, func(v string) bool { return path == v || strings.HasPrefix(path, v+"/") })
}

// hide mounts an empty folder over each path that exists, if nothing went wrong before.
func hide(f console.First, paths []string) error {
	for _, path := range paths {
		if f.Err != nil {
			break
		}
		err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0555,size=4k,nr_inodes=2")
		if err != unix.ENOENT {
			f.Try("hide "+path, err)
		}
	}
	return f.Err
}

// Of linux/securebits.h.
const (
	noRoot       = 1 << 0
	noRootLocked = 1 << 1
	keepCaps     = 1 << 4
)

// identify gives the thread the unit's ids and exactly its capabilities, and reads back what the kernel made of it. The order
// matters: each step needs a capability that a later one takes.
func identify(u *unit.Unit) error {
	var f console.First
	for c := 0; c < 64; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil && u.Capabilities&(1<<c) == 0 {
			f.Try("bounding set", unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0))
		}
	}
	if u.UID != 0 { // user 0, should the process ever become it, is nobody special
		f.Try("securebits", unix.Prctl(unix.PR_SET_SECUREBITS, keepCaps|noRoot|noRootLocked, 0, 0, 0))
	}
	groups := make([]int, len(u.Groups))
	for i, g := range u.Groups {
		groups[i] = int(g)
	}
	f.Try("setgroups", unix.Setgroups(groups))
	f.Try("setresgid", raw(unix.SYS_SETRESGID, u.UID))
	f.Try("setresuid", raw(unix.SYS_SETRESUID, u.UID))
	header, want := capabilities(u)
	f.Try("capset", unix.Capset(&header, &want[0]))
	f.Try("ambient set", unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
	for c := 0; c < 64; c++ {
		if u.UID != 0 && u.Capabilities&(1<<c) != 0 {
			f.Try("ambient set", unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0))
		}
		if n, _ := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); n == 1 && u.Capabilities&(1<<c) == 0 {
			f.Try("check", errors.New("the bounding set has more"))
		}
	}
	var have [2]unix.CapUserData
	f.Try("capget", unix.Capget(&header, &have[0]))
	r, e, s := unix.Getresuid()
	rg, eg, sg := unix.Getresgid()
	for _, id := range []int{r, e, s, rg, eg, sg} {
		if uint32(id) != u.UID || have != want {
			f.Try("check", errors.New("the ids or capabilities are others"))
		}
	}
	return f.Err
}

// raw sets three ids of this thread. Those of package unix would have every thread do it; the others end at execve.
func raw(call uintptr, id uint32) error {
	if _, _, errno := unix.RawSyscall(call, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return errno
	}
	return nil
}

// capabilities is what capset takes: permitted and effective, and, where execve would lose them, inheritable.
func capabilities(u *unit.Unit) (unix.CapUserHeader, [2]unix.CapUserData) {
	low, high := uint32(u.Capabilities), uint32(u.Capabilities>>32)
	sets := [2]unix.CapUserData{{Effective: low, Permitted: low}, {Effective: high, Permitted: high}}
	if u.UID != 0 {
		sets[0].Inheritable, sets[1].Inheritable = low, high
	}
	return unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, sets
}

// umask is the unit's, or the one that lets nobody else in.
func umask(u *unit.Unit) int {
	if u.Umask == 0 {
		return 0o077
	}
	return int(u.Umask)
}
