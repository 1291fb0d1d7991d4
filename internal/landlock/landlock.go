// Package landlock has the kernel keep a process from files and ports, for good (Landlock ABI 6, Linux 6.12; Documentation/userspace-api/landlock.rst). PID 1 links it.
package landlock

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// onFiles are those of Landlock's rights that there are for what is no folder.
const onFiles = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV

// Ruleset makes rules of a struct landlock_ruleset_attr (files, ports, scopes) and of what of it is allowed, and returns their descriptor, which is the caller's.
// A kernel that does not know all of it refuses. A path that does not exist gives nothing: a machine may have no TPM.
func Ruleset(attr [3]uint64, rules []unit.Rule) (set int, err error) {
	r, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return 0, os.NewSyscallError("landlock", errno)
	}
	for _, rule := range rules {
		if err := allow(r, rule); err != nil {
			unix.Close(int(r))
			return 0, os.NewSyscallError("landlock "+rule.Path, err)
		}
	}
	return int(r), nil
}

func allow(set uintptr, rule unit.Rule) error {
	add := func(kind uintptr, data unsafe.Pointer) error {
		if _, _, errno := unix.RawSyscall6(unix.SYS_LANDLOCK_ADD_RULE, set, kind, uintptr(data), 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}
	if rule.Path == "" {
		port := [2]uint64{rule.Access, uint64(rule.Port)} // struct landlock_net_port_attr
		return add(2, unsafe.Pointer(&port))              // LANDLOCK_RULE_NET_PORT
	}
	fd, err := unix.Open(rule.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		if err == unix.ENOENT {
			err = nil
		}
		return err
	}
	defer unix.Close(fd)
	beneath := unix.LandlockPathBeneathAttr{Allowed_access: rule.Access, Parent_fd: int32(fd)}
	err = add(unix.LANDLOCK_RULE_PATH_BENEATH, unsafe.Pointer(&beneath))
	if err == unix.EINVAL { // no folder
		beneath.Allowed_access &= onFiles
		err = add(unix.LANDLOCK_RULE_PATH_BENEATH, unsafe.Pointer(&beneath))
	}
	return err
}

// Restrict puts rules on the calling thread, and on all that it starts. They come on top of those that it has.
func Restrict(set int) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(set), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// Text is rules for paths as a text without blanks but those in paths, which Parse reads: "access path", a line each, access in hexadecimal.
func Text(rules []unit.Rule) string {
	var b strings.Builder
	for _, r := range rules {
		b.WriteString(strconv.FormatUint(r.Access, 16) + " " + r.Path + "\n")
	}
	return b.String()
}

// Parse reads what Text wrote.
func Parse(text string) (rules []unit.Rule, err error) {
	for line := range strings.Lines(text) {
		access, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		n, err := strconv.ParseUint(access, 16, 64)
		if err != nil || !ok || !strings.HasPrefix(path, "/") {
			return nil, errors.New("rules of Landlock: no rule: " + strconv.Quote(line))
		}
		rules = append(rules, unit.Rule{Access: n, Path: path})
	}
	return rules, nil
}

// Files are all rights over files: what a process with rules for files needs a rule for.
const Files = unix.LANDLOCK_ACCESS_FS_IOCTL_DEV<<1 - 1
