package twin

import (
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// gone is the answer if a unit has no process.
const gone = "ENOENT"

func sortProbes(p []Probe) {
	slices.SortFunc(p, func(a, b Probe) int { return strings.Compare(a.Name, b.Name) })
}

// processes tries what one process can do to another, with PID 1 and every other daemon.
func processes() (out []Probe) {
	for _, target := range append([]string{"init"}, Daemons()...) {
		add := func(what string, p Probe, run func(pid int) string) {
			p.Group, p.Name, p.Unit = Processes, what+" "+target, target
			p.run = func(e *env) string {
				if e.name == target {
					return Untried
				}
				pid := e.pids[target]
				if pid == 0 {
					return gone
				}
				return run(pid)
			}
			out = append(out, p)
		}
		nobody := func(calls ...string) Probe { return Probe{Calls: calls, Nobody: true} }
		add("signal", nobody("kill"), func(pid int) string { return says(unix.Kill(pid, 0)) })
		add("signal a thread of", nobody("tgkill"), func(pid int) string { return says(unix.Tgkill(pid, pid, 0)) })
		add("queue a signal for", nobody("rt_sigqueueinfo"), func(pid int) string {
			info := [32]int32{2: -1} // si_code SI_QUEUE: from a process
			_, _, errno := unix.Syscall(unix.SYS_RT_SIGQUEUEINFO, uintptr(pid), 0, uintptr(unsafe.Pointer(&info[0])))
			return name(errno)
		})
		add("signal by descriptor", nobody("pidfd_open", "pidfd_send_signal"), func(pid int) string {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return says(err)
			}
			defer unix.Close(fd)
			return says(unix.PidfdSendSignal(fd, 0, nil, 0))
		})
		add("take a descriptor of", nobody("pidfd_open", "pidfd_getfd"), func(pid int) string {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				return says(err)
			}
			defer unix.Close(fd)
			got, err := unix.PidfdGetfd(fd, 0, 0)
			if err == nil {
				err = unix.Close(got)
			}
			return says(err)
		})
		add("trace", nobody("ptrace"), func(pid int) string {
			_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
			if errno == 0 {
				_ = unix.PtraceDetach(pid)
			}
			return name(errno)
		})
		add("read the memory of", nobody("process_vm_readv"), func(pid int) string {
			b := make([]byte, 8)
			_, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: 8}}, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}, 0)
			return says(err)
		})
		add("read the limits of", Probe{Calls: []string{"prlimit64"}, Caps: []string{"SYS_RESOURCE"}}, func(pid int) string {
			var l unix.Rlimit
			return says(unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &l))
		})
		add("slow down", nobody("setpriority"), func(pid int) string { return says(unix.Setpriority(unix.PRIO_PROCESS, pid, 19)) })
		add("move the memory of", nobody("move_pages"), func(pid int) string {
			_, _, errno := unix.Syscall6(unix.SYS_MOVE_PAGES, uintptr(pid), 0, 0, 0, 0, 0)
			return name(errno)
		})
		add("compare files with", nobody("kcmp"), func(pid int) string {
			_, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(unix.Getpid()), uintptr(pid), 0, 0, 0, 0)
			return name(errno)
		})
		add("find the locks of", nobody("get_robust_list"), func(pid int) string {
			var head, size uintptr
			_, _, errno := unix.Syscall(unix.SYS_GET_ROBUST_LIST, uintptr(pid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&size)))
			return name(errno)
		})
		for _, f := range []string{"status", "cmdline", "environ", "maps", "mem", "syscall", "ns/mnt"} {
			p := Probe{Calls: []string{"openat"}, Kind: Other, Nobody: true, Path: f}
			add("read /proc, "+f+" of", p, func(pid int) string { return open("/proc/"+itoa(pid)+"/"+f, unix.O_RDONLY) })
		}
		add("write /proc, oom_score_adj of", Probe{Calls: []string{"openat"}, Kind: Other, Nobody: true, Path: "oom_score_adj", Write: true}, func(pid int) string { return open("/proc/"+itoa(pid)+"/oom_score_adj", unix.O_WRONLY) })
		add("list the descriptors of", Probe{Calls: []string{"openat", "getdents64"}, Kind: Other, Nobody: true, Path: "fd"}, func(pid int) string { return says(listFolder("/proc/" + itoa(pid) + "/fd")) })
		add("list the root of", Probe{Calls: []string{"openat", "getdents64"}, Kind: Other, Nobody: true, Path: "root"}, func(pid int) string { return says(listFolder("/proc/" + itoa(pid) + "/root/")) })
	}
	return out
}

// identity tries to become somebody else, and to have more than the unit says.
func identity() (out []Probe) {
	add := func(what string, p Probe, run func() string) {
		p.Group, p.Name = Identity, what
		p.run = func(*env) string { return run() }
		out = append(out, p)
	}
	raw := func(call, a, b, c uintptr) string {
		_, _, errno := unix.Syscall(call, a, b, c)
		return name(errno)
	}
	for _, who := range append([]string{"root"}, Daemons()...) {
		id := uintptr(userID(who))
		add("become user "+who, Probe{Calls: []string{"setresuid"}, Caps: []string{"SETUID"}, Unit: who}, func() string { return raw(unix.SYS_SETRESUID, id, id, id) })
		add("become group "+who, Probe{Calls: []string{"setresgid"}, Caps: []string{"SETGID"}, Unit: who}, func() string { return raw(unix.SYS_SETRESGID, id, id, id) })
	}
	add("take no groups", Probe{Calls: []string{"setgroups"}, Caps: []string{"SETGID"}}, func() string { return raw(unix.SYS_SETGROUPS, 0, 0, 0) })
	add("take all capabilities", Probe{Calls: []string{"capset"}, Nobody: true}, func() string {
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		d := [2]unix.CapUserData{{Effective: none32, Permitted: none32, Inheritable: none32}, {Effective: 0x1ff, Permitted: 0x1ff, Inheritable: 0x1ff}}
		return says(unix.Capset(&h, &d[0]))
	})
	prctl := func(what string, option, arg uintptr) {
		add(what, Probe{Calls: []string{"prctl"}, Number: uint32(option), Nobody: true}, func() string {
			_, _, errno := unix.Syscall6(unix.SYS_PRCTL, option, arg, 0, 0, 0, 0)
			return name(errno)
		})
	}
	prctl("allow new privileges again", unix.PR_SET_NO_NEW_PRIVS, 0)
	prctl("change what root means", unix.PR_SET_SECUREBITS, 0)
	add("have more descriptors", Probe{Calls: []string{"prlimit64"}, Caps: []string{"SYS_RESOURCE"}}, func() string {
		var l unix.Rlimit
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &l); err != nil {
			return says(err)
		}
		return says(unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: l.Cur, Max: 1 << 40}, nil)) // another limit: that of descriptors is tried later
	})
	add("write core files", Probe{Calls: []string{"prlimit64"}, Caps: []string{"SYS_RESOURCE"}}, func() string {
		err := unix.Prlimit(0, unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}, nil)
		if err == nil {
			err = unix.Prlimit(0, unix.RLIMIT_CORE, &unix.Rlimit{}, nil)
		}
		return says(err)
	})
	add("be more urgent", Probe{Calls: []string{"setpriority"}, Caps: []string{"SYS_NICE"}}, func() string { return says(unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)) })
	add("run in real time", Probe{Calls: []string{"sched_setscheduler"}, Caps: []string{"SYS_NICE"}}, func() string {
		priority := int32(1)
		return raw(unix.SYS_SCHED_SETSCHEDULER, uintptr(unix.Gettid()), unix.SCHED_FIFO, uintptr(unsafe.Pointer(&priority)))
	})
	add("read and write in real time", Probe{Calls: []string{"ioprio_set"}, Caps: []string{"SYS_NICE", "SYS_ADMIN"}}, func() string {
		return raw(unix.SYS_IOPRIO_SET, 1, uintptr(unix.Gettid()), 1<<13|4)
	})
	add("lock much memory", Probe{Calls: []string{"mlock"}, Nobody: true}, func() string { return raw(unix.SYS_MLOCK, 0, 1<<40, 0) })
	return out
}

const none32 = ^uint32(0)
