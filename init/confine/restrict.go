package confine

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// onFiles are those of Landlock's rights that there are for what is no folder.
const onFiles = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV

// call is a system call that package unix has no function for. What data points to is struct and nothing else.
func call(number, first, second uintptr, data unsafe.Pointer, fourth uintptr) (uintptr, error) {
	r, _, errno := unix.RawSyscall6(number, first, second, uintptr(data), fourth, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}

// restrict is the last part: ids, rules and filter outlive execve. The filter comes at the very end, for hardly any of the steps before would pass it. It lets
// execve pass, or the unit's program could not be started; what may be executed is Landlock's to say: this program, and what the unit lists.
func restrict(u *unit.Unit) error {
	set, err := rules(u)
	f := console.First{Err: err}
	if f.Err == nil {
		f.Err = identify(u)
	}
	if !u.NewPrivileges {
		f.Try("forbid new privileges", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	}
	_, err = call(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, nil, 0)
	f.Try("make a keyring", err)
	if set > 0 && f.Err == nil {
		_, err = call(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(set), 0, nil, 0)
		f.Try("restrict files and ports", err)
	}
	if u.Filter == nil || f.Err != nil {
		return f.Err
	}
	f.Try("forbid new code", unix.Prctl(unix.PR_SET_MDWE, unix.PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0))
	program := unix.SockFprog{Len: uint16(len(u.Filter)), Filter: (*unix.SockFilter)(unsafe.Pointer(&u.Filter[0]))}
	_, err = call(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, unsafe.Pointer(&program), 0)
	f.Try("filter system calls", err)
	return f.Err
}

// rules makes the unit's Landlock rules, while the process still is root and sees every path, and returns their descriptor, 0 if there are none.
// A kernel that does not know all of them (ABI 6, Linux 6.12) refuses, and the unit does not start.
func rules(u *unit.Unit) (set int, err error) {
	if u.Landlock == [3]uint64{} {
		return 0, nil
	}
	var f console.First
	r, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&u.Landlock)), unsafe.Sizeof(u.Landlock), 0)
	if errno != 0 {
		f.Try("landlock", errno)
	}
	for _, rule := range u.Rules {
		if f.Err == nil {
			f.Try("landlock "+rule.Path, allow(r, rule))
		}
	}
	return int(r), f.Err
}

// allow adds a rule. A path that does not exist gives nothing: a machine may have no TPM.
func allow(set uintptr, rule unit.Rule) error {
	if rule.Path == "" {
		port := [2]uint64{rule.Access, uint64(rule.Port)}                            // struct landlock_net_port_attr
		_, err := call(unix.SYS_LANDLOCK_ADD_RULE, set, 2, unsafe.Pointer(&port), 0) // LANDLOCK_RULE_NET_PORT
		return err
	}
	fd, err := unix.Open(rule.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return err
	}
	beneath := unix.LandlockPathBeneathAttr{Allowed_access: rule.Access, Parent_fd: int32(fd)}
	_, err = call(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH, unsafe.Pointer(&beneath), 0)
	if err == unix.EINVAL { // no folder
		beneath.Allowed_access &= onFiles
		_, err = call(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH, unsafe.Pointer(&beneath), 0)
	}
	unix.Close(fd)
	return err
}
