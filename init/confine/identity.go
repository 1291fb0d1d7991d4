package confine

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

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
