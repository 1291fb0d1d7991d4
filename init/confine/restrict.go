package confine

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/landlock"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

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
	var set int // of rules, made while the process still is root and sees every path
	var f console.First
	if u.Landlock != [3]uint64{} {
		set, f.Err = landlock.Ruleset(u.Landlock, u.Rules)
	}
	if f.Err == nil {
		f.Err = identify(u)
	}
	if !u.NewPrivileges {
		f.Try("forbid new privileges", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	}
	_, err := call(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, 0, nil, 0)
	f.Try("make a keyring", err)
	if set > 0 && f.Err == nil {
		f.Try("restrict files and ports", landlock.Restrict(set))
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
