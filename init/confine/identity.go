package confine

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Of linux/securebits.h.
const (
	noRoot       = 1 << 0
	noRootLocked = 1 << 1
	keepCaps     = 1 << 4
)

// identify gives the thread the unit's ids and exactly its capabilities. The order matters: each step needs a capability
// that a later one takes.
func identify(u *unit.Unit) error {
	for c := 0; c < 64; c++ {
		if u.Capabilities&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err == unix.EINVAL {
			break // the kernel knows no more
		} else if err != nil {
			return os.NewSyscallError("bounding set", err)
		}
	}
	if u.UID != 0 {
		// User 0, should the process ever become it, is nobody special.
		if err := unix.Prctl(unix.PR_SET_SECUREBITS, keepCaps|noRoot|noRootLocked, 0, 0, 0); err != nil {
			return os.NewSyscallError("securebits", err)
		}
	}
	groups := make([]int, len(u.Groups))
	for i, g := range u.Groups {
		groups[i] = int(g)
	}
	if err := unix.Setgroups(groups); err != nil {
		return os.NewSyscallError("setgroups", err)
	}
	// Not unix.Setresuid, which has every thread do it: the others still have capabilities, and end at execve.
	id := uintptr(u.UID)
	if _, _, err := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); err != 0 {
		return os.NewSyscallError("setresgid", err)
	}
	if _, _, err := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); err != 0 {
		return os.NewSyscallError("setresuid", err)
	}
	header, sets := capabilities(u)
	if err := unix.Capset(&header, &sets[0]); err != nil {
		return os.NewSyscallError("capset", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("ambient set", err)
	}
	for c := 0; c < 64 && u.UID != 0; c++ {
		if u.Capabilities&(1<<c) != 0 {
			if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0); err != nil {
				return os.NewSyscallError("ambient set", err)
			}
		}
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

// check reads back what the kernel made of it.
func check(u *unit.Unit) error {
	id := int(u.UID)
	if r, e, s := unix.Getresuid(); r != id || e != id || s != id {
		return errors.New("the user ids are others")
	}
	if r, e, s := unix.Getresgid(); r != id || e != id || s != id {
		return errors.New("the group ids are others")
	}
	if groups, err := unix.Getgroups(); err != nil || len(groups) != len(u.Groups) {
		return errors.New("the groups are others")
	}
	header, want := capabilities(u)
	var have [2]unix.CapUserData
	if err := unix.Capget(&header, &have[0]); err != nil {
		return err
	}
	if have != want {
		return errors.New("the capabilities are others")
	}
	for c := 0; c < 64; c++ {
		if n, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err == nil && n == 1 && u.Capabilities&(1<<c) == 0 {
			return errors.New("the bounding set has more")
		}
	}
	return nil
}
