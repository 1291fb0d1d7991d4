package twin

import (
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// lastCall is beyond the last system call of any kernel that this may run on; what lies between is tried too.
const lastCall = 480

// untriedCalls are those that cannot be tried where the filter has nothing against them: they end the thread or the process, or leave the caller's stack in two hands.
var untriedCalls = map[string]bool{"rt_sigreturn": true, "exit": true, "exit_group": true, "vfork": true, uretprobe: true, uprobe: true}

// uretprobe and uprobe are for the kernel's own code in a process: a signal answers everybody else.
const uretprobe, uprobe = "uretprobe", "number 336"

// harmless are arguments of system calls for which -1 everywhere is not refused by the kernel, or would do something.
var harmless = map[string][6]uintptr{
	"alarm":     {0},
	"brk":       {0},
	"clone":     {unix.CLONE_SIGHAND}, // without CLONE_VM: invalid
	"mmap":      {0, 0, 0, unix.MAP_ANON, none, 0},
	"mprotect":  {1, 0, 0},
	"prlimit64": {0, none, none, none},
	"ioctl":     {none, unix.TCGETS, none},
	"msgget":    {none, 0},
	"prctl":     {unix.PR_SET_VMA, none, none, none, none},
	"socket":    {unix.AF_UNIX, unix.SOCK_STREAM, 1 << 30},
	"umask":     {0o077},
	"sync":      {},
}

const none = ^uintptr(0)

// calls tries the number of every system call with arguments that it cannot take.
func calls() (out []Probe) {
	for n := range lastCall {
		call := arch.X86_64.SyscallNumbers[n]
		label := call
		if call == "" {
			label = "number " + itoa(n)
		}
		out = append(out, Probe{Group: Calls, Name: label, Calls: []string{call}, run: func(*env) string { return callProbe(uintptr(n), label) }})
	}
	for _, n := range []uintptr{512, 547} { // of the ABI x32, whose numbers these are when its bit is forgotten
		out = append(out, Probe{Group: Calls, Name: "number " + itoa(int(n)), Calls: []string{""}, run: func(*env) string { return callProbe(n, "") }})
	}
	return append(out,
		Probe{Group: Calls, Name: "getpid by the ABI x32", Calls: []string{""}, Verb: "x32", Maybe: true, run: func(*env) string {
			_, _, errno := unix.Syscall(1<<30|unix.SYS_GETPID, 0, 0, 0)
			return name(errno)
		}},
		Probe{Group: Calls, Name: "getpid by the ABI i386", Calls: []string{""}, run: func(*env) string { return int80Probe() }},
	)
}

func callProbe(n uintptr, call string) string {
	args, ok := harmless[call]
	if !ok {
		args = [6]uintptr{none, none, none, none, none, none}
	}
	switch {
	case call == "fork":
		return fork()
	case call == "pause":
		defer wake()()
	case untriedCalls[call]:
		return Untried
	}
	r, _, errno := unix.Syscall6(n, args[0], args[1], args[2], args[3], args[4], args[5])
	if errno == 0 && (strings.HasPrefix(call, "eventfd") || call == "inotify_init" || call == "epoll_create") {
		_ = unix.Close(int(r))
	}
	if call == "clone3" && errno == unix.ENOSYS {
		return name(errno)
	}
	return passed(errno)
}

// passed tells only whether the filter let a system call through: what the kernel says to such arguments is of no interest.
func passed(errno syscall.Errno) string {
	if errno == Killed {
		return Filter
	}
	return OK
}

// fork makes a process that ends at once.
func fork() string {
	pid, _, errno := unix.RawSyscall(unix.SYS_FORK, 0, 0, 0)
	if errno != 0 {
		return passed(errno)
	}
	if pid == 0 {
		for {
			_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	_, _ = unix.Wait4(int(pid), nil, 0, nil)
	return OK
}

// wake interrupts what this thread waits for, after a while, with the signal that Go's runtime uses for that itself.
func wake() (stop func()) {
	pid, tid, done := unix.Getpid(), unix.Gettid(), make(chan bool)
	go func() {
		t := time.NewTicker(50 * time.Millisecond)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
				_ = unix.Tgkill(pid, tid, unix.SIGURG)
			}
		}
	}()
	return func() { close(done) }
}

// arguments tries system calls that a unit may make for some things and not for others.
func arguments() (out []Probe) {
	for name, option := range prctlOptions {
		out = append(out, Probe{Group: Arguments, Name: "prctl " + name, Calls: []string{"prctl"}, Number: option, run: func(*env) string {
			_, _, errno := unix.Syscall6(unix.SYS_PRCTL, uintptr(option), none, none, none, none, none)
			return passed(errno)
		}})
	}
	for name, request := range ioctlRequests {
		out = append(out, Probe{Group: Arguments, Name: "ioctl " + name, Calls: []string{"ioctl"}, Number: request, run: func(*env) string {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, none, uintptr(request), none)
			return passed(errno)
		}})
	}
	sortProbes(out)
	for _, c := range []struct {
		name, verb string
		flags      uintptr
	}{{"a process", "process", uintptr(unix.SIGCHLD)}, {"a process in namespaces of its own", "namespaces", unix.CLONE_NEWNS | unix.CLONE_NEWPID}} {
		out = append(out, Probe{Group: Arguments, Name: "clone " + c.name, Calls: []string{"clone"}, Verb: c.verb, run: func(*env) string {
			_, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_SIGHAND|c.flags, 0, 0, 0, 0, 0) // without CLONE_VM: invalid
			return passed(errno)
		}})
	}
	return append(out,
		Probe{Group: Arguments, Name: "mmap of memory that is written and run", Calls: []string{"mmap"}, Verb: "exec", run: func(*env) string {
			b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err == nil {
				err = unix.Munmap(b)
			}
			return says(err)
		}},
		Probe{Group: Arguments, Name: "mprotect of written memory to be run", Calls: []string{"mprotect"}, Verb: "exec", run: func(*env) string {
			b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			if err != nil {
				return says(err)
			}
			defer func() { _ = unix.Munmap(b) }()
			_, _, errno := unix.Syscall(unix.SYS_MPROTECT, uintptr(unsafe.Pointer(&b[0])), 4096, unix.PROT_READ|unix.PROT_EXEC)
			return name(errno)
		}},
	)
}

var prctlOptions = map[string]uint32{
	"PR_SET_VMA": unix.PR_SET_VMA, "PR_SET_NAME": unix.PR_SET_NAME, "PR_SET_PDEATHSIG": unix.PR_SET_PDEATHSIG, "PR_SET_DUMPABLE": unix.PR_SET_DUMPABLE, "PR_SET_KEEPCAPS": unix.PR_SET_KEEPCAPS,
	"PR_SET_SECCOMP": unix.PR_SET_SECCOMP, "PR_CAPBSET_DROP": unix.PR_CAPBSET_DROP, "PR_SET_SECUREBITS": unix.PR_SET_SECUREBITS, "PR_SET_MM": unix.PR_SET_MM,
	"PR_SET_CHILD_SUBREAPER": unix.PR_SET_CHILD_SUBREAPER, "PR_SET_NO_NEW_PRIVS": unix.PR_SET_NO_NEW_PRIVS, "PR_CAP_AMBIENT": unix.PR_CAP_AMBIENT, "PR_SET_PTRACER": unix.PR_SET_PTRACER,
	"PR_SET_MDWE": unix.PR_SET_MDWE, "PR_SCHED_CORE": unix.PR_SCHED_CORE, "PR_SET_SYSCALL_USER_DISPATCH": unix.PR_SET_SYSCALL_USER_DISPATCH, "PR_SET_TSC": unix.PR_SET_TSC,
}

var ioctlRequests = map[string]uint32{
	"TCGETS": unix.TCGETS, "TIOCGWINSZ": unix.TIOCGWINSZ, "TIOCSTI": unix.TIOCSTI, "TIOCLINUX": unix.TIOCLINUX, "TIOCSCTTY": unix.TIOCSCTTY, "TIOCCONS": unix.TIOCCONS, "FIONREAD": unix.TIOCINQ,
	"SIOCGIFCONF": unix.SIOCGIFCONF, "SIOCSIFFLAGS": unix.SIOCSIFFLAGS, "SIOCETHTOOL": unix.SIOCETHTOOL, "SIOCBRADDBR": unix.SIOCBRADDBR, "TUNSETIFF": unix.TUNSETIFF, "BLKDISCARD": unix.BLKDISCARD, "BLKRRPART": unix.BLKRRPART, "BLKPG": unix.BLKPG,
	"BLKGETSIZE64": unix.BLKGETSIZE64, "BLKSSZGET": unix.BLKSSZGET, "LOOP_SET_FD": unix.LOOP_SET_FD, "FICLONE": unix.FICLONE, "FS_IOC_SETFLAGS": unix.FS_IOC_SETFLAGS, "FIFREEZE": 0xc0045877, "KDSETMODE": 0x4b3a, "RTC_SET_TIME": unix.RTC_SET_TIME,
	"DM_TABLE_LOAD": unix.DM_TABLE_LOAD, "DM_DEV_CREATE": unix.DM_DEV_CREATE, "NS_GET_PARENT": 0xb702, "VT_ACTIVATE": 0x5606, "PERF_EVENT_IOC_SET_BPF": unix.PERF_EVENT_IOC_SET_BPF,
}
