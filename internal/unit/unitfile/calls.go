package unitfile

import "golang.org/x/sys/unix"

// readable is what every unit may read: what Go's runtime looks at when a program starts. Its own program is its own to read and execute, too.
var readable = []string{"/sys/kernel/mm/transparent_hugepage"}

// groups are the lists of system calls that unit files name with an @ in front. A unit is counted with all of them.
var groups = map[string][]string{
	// What any Go program does: its runtime (memory, threads, signals, time, its crash), files that are open, epoll, and being started by PID 1.
	"@basic": {
		"arch_prctl", "brk", "clock_gettime", "clock_nanosleep", "clone", "clone3", "close", "dup", "epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2",
		"execve", "exit", "exit_group", "fcntl", "futex", "getpid", "getrandom", "getrusage", "gettid", "gettimeofday", "madvise", "mincore", "mmap", "mprotect", "munmap",
		"nanosleep", "pipe2", "prlimit64", "read", "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity",
		"sched_yield", "set_robust_list", "set_tid_address", "sigaltstack", "tgkill", "uname", "write",
	},
	// Sockets that are there, and talking over them. socket(2) itself follows from the unit's families.
	"@net": {"accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "recvfrom", "recvmsg", "sendmsg", "sendto", "setsockopt", "shutdown"},
	// Reading files and folders.
	"@read": {"fstat", "getdents64", "lseek", "newfstatat", "openat", "pread64", "readlinkat"},
	// Changing them.
	"@write": {"fchmod", "fchmodat", "fdatasync", "flock", "fsync", "ftruncate", "mkdirat", "pwrite64", "renameat", "unlinkat"},
}

// ioctls are requests of ioctl(2) by name.
var ioctls = map[string][]uint32{
	"@terminal": {unix.TCGETS, unix.TIOCGWINSZ},
}

// prctls are options of prctl(2) by name.
var prctls = map[string][]uint32{
	"@basic": {unix.PR_SET_NAME, unix.PR_SET_VMA}, // Go names its memory
}

// A family is what socket(2) is allowed for. A protocol of less than 0 is any.
type family struct {
	domain   uint32
	protocol int
}

var sockets = map[string]family{
	"unix": {unix.AF_UNIX, -1}, "inet": {unix.AF_INET, -1}, "inet6": {unix.AF_INET6, -1}, "packet": {unix.AF_PACKET, -1},
	"netlink:route": {unix.AF_NETLINK, unix.NETLINK_ROUTE}, "netlink:netfilter": {unix.AF_NETLINK, unix.NETLINK_NETFILTER},
	"netlink:uevent": {unix.AF_NETLINK, unix.NETLINK_KOBJECT_UEVENT}, "netlink:generic": {unix.AF_NETLINK, unix.NETLINK_GENERIC},
}
