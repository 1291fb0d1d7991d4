package unitfile

import "golang.org/x/sys/unix"

// readable is what every unit may read: what Go's runtime looks at when a program starts, and /proc, in which others' processes do not exist. Its own
// program is its own to read and execute, too.
var readable = []string{"/proc", "/sys/kernel/mm/transparent_hugepage"}

// groups are the lists of system calls that unit files name with an @ in front. A unit is counted with all of them.
var groups = map[string][]string{
	// What any Go program does: its runtime (memory, threads, signals, time, its crash), files that are open, epoll, and being started by PID 1.
	"@basic": {
		"arch_prctl", "clock_gettime", "clone", "close", "epoll_create1", "epoll_ctl", "epoll_pwait", "eventfd2", "execve", "exit",
		"exit_group", "fcntl", "futex", "getpid", "getrandom", "gettid", "madvise", "mmap", "mprotect", "munmap", "nanosleep",
		"prlimit64", "read", "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield", "sigaltstack", "tgkill",
		"uname", "write",
	},
	// Sockets that are there, and talking over them. socket(2) itself follows from the unit's families.
	"@net": {"accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "recvfrom", "recvmsg", "sendto", "setsockopt", "shutdown", "writev"},
	// Reading files and folders, and asking which file system they are on: who has metrics asks it of /proc (client_golang).
	"@read": {"fstat", "getdents64", "lseek", "newfstatat", "openat", "pread64", "readlinkat", "statfs"},
	// Changing them.
	"@write": {"fsync", "mkdirat", "renameat", "unlinkat"},
	// Owner and mode, and writing elsewhere than at the end.
	"@change": {"fchmod", "fchmodat", "fchown", "fchownat", "fdatasync", "flock", "ftruncate", "pwrite64"},
	// What io.Copy uses between files and sockets.
	"@copy": {"copy_file_range", "pipe2", "sendfile", "splice"},
	// Starting programs and waiting for them. With it, clone makes processes too, and memory may be mapped as code.
	"@programs": {"chdir", "dup3", "faccessat2", "getppid", "kill", "pidfd_open", "pidfd_send_signal", "pipe2", "setpgid", "wait4", "waitid"},
	// What those need that are C programs: glibc, its loader, and what they do that Go does in another way.
	"@libc": {
		"access", "brk", "clock_nanosleep", "clone3", "dup", "dup2", "faccessat", "fadvise64", "fallocate", "fstatfs", "getcwd", "getegid", "geteuid", "getgid", "getuid", "gettimeofday", "lstat", "open", "pipe", "poll", "ppoll", "pselect6", "readlink", "readv",
		"rseq", "select", "set_robust_list", "set_tid_address", "stat", "statfs", "sysinfo", "time", "unlink",
	},
}

// ioctls are requests of ioctl(2) by name, and groups of them.
var ioctls = map[string][]uint32{
	"@terminal": {unix.TCGETS, unix.TIOCGWINSZ},
	// Sizes of disks and partitions, their table in the kernel, and discarding what is on them; and what libblkid asks to learn that a disk is none of
	// floppy, CD-ROM, zoned or locked by itself: FDGETFDCSTAT, CDROM_GET_CAPABILITY, CDROM_LAST_WRITTEN, BLKGETZONESZ, IOC_OPAL_GET_STATUS.
	"@block": {
		unix.BLKALIGNOFF, unix.BLKBSZGET, unix.BLKBSZSET, unix.BLKDISCARD, unix.BLKDISCARDZEROES, unix.BLKFLSBUF, unix.BLKGETSIZE, unix.BLKGETSIZE64, unix.BLKIOMIN, unix.BLKIOOPT, unix.BLKPBSZGET, unix.BLKPG,
		unix.BLKROGET, unix.BLKROTATIONAL, unix.BLKRRPART, unix.BLKSECDISCARD, unix.BLKSSZGET, unix.BLKZEROOUT, unix.HDIO_GETGEO,
		0x80280215, 0x5331, 0x5395, 0x80041284, 0x800870ec,
	},
	// Commands of device mapper: from its version to a message to a target (linux/dm-ioctl.h).
	"@devmapper": {
		0xc138fd00, 0xc138fd01, 0xc138fd02, 0xc138fd03, 0xc138fd04, 0xc138fd05, 0xc138fd06, 0xc138fd07, 0xc138fd08, 0xc138fd09, 0xc138fd0a, 0xc138fd0b, 0xc138fd0c,
		0xc138fd0d, 0xc138fd0e,
	},
	// Growing a mounted ext4, and shutting one down (linux/fs/ext4/ext4.h); flags of a file.
	"@ext4": {0x40086610, 0x8004587d, unix.FS_IOC_GETFLAGS, unix.FS_IOC_SETFLAGS},
}

// prctls are options of prctl(2) by name, and groups of them.
var prctls = map[string][]uint32{
	"@basic": {unix.PR_SET_NAME, unix.PR_SET_VMA}, // Go names its memory
	"@ext4":  {unix.PR_GET_DUMPABLE},              // its tools' question whether they run with others' rights
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
