package twin

import (
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// place is a folder where this unit could mount something: its own, or that for temporary files.
func (e *env) place() string {
	if runtimes[e.name] != 0 {
		return filepath.Join(unit.RunDir, e.name)
	}
	return "/tmp"
}

// mounts tries to change what is mounted.
func mounts() (out []Probe) {
	add := func(what string, p Probe, run func(*env) string) {
		p.Group, p.Name, p.run = Mounts, what, run
		out = append(out, p)
	}
	admin := func(calls ...string) Probe { return Probe{Calls: calls, Caps: []string{"SYS_ADMIN"}} }
	nobody := func(calls ...string) Probe { return Probe{Calls: calls, Nobody: true} }
	mount := func(what string, p Probe, from, fs string, flags uintptr) {
		add(what, p, func(e *env) string {
			err := unix.Mount(from, e.place(), fs, flags, "")
			if err == nil {
				err = unix.Unmount(e.place(), unix.MNT_DETACH)
			}
			return says(err)
		})
	}
	mount("mount a tmpfs", admin("mount", "umount2"), "tmpfs", "tmpfs", unix.MS_NODEV|unix.MS_NOSUID)
	mount("mount a tmpfs with devices", admin("mount", "umount2"), "tmpfs", "tmpfs", 0)
	mount("mount /proc once more", admin("mount", "umount2"), "proc", "proc", 0)
	mount("mount /sys once more", nobody("mount", "umount2"), "sysfs", "sysfs", 0) // of a network namespace that belongs to somebody else, or with SYS_ADMIN
	out[len(out)-1].Nobody, out[len(out)-1].Caps = false, []string{"SYS_ADMIN"}
	mount("show / elsewhere", admin("mount", "umount2"), "/", "", unix.MS_BIND)
	add("make / writable", Probe{Calls: []string{"mount"}, Nobody: true, Node: true}, func(*env) string { return says(unix.Mount("", "/", "", unix.MS_REMOUNT, "")) })
	add("share mounts with everybody", admin("mount"), func(e *env) string {
		return says(unix.Mount("", e.place(), "", unix.MS_SHARED, ""))
	})
	out[len(out)-1].Maybe = true // it is no mount point
	add("unmount", admin("umount2"), func(e *env) string { return says(unix.Unmount(e.place(), unix.MNT_DETACH)) })
	out[len(out)-1].Maybe = true
	add("change the root", nobody("pivot_root"), func(e *env) string { return says(unix.PivotRoot(e.place(), e.place())) })
	add("chroot", Probe{Calls: []string{"chroot"}, Caps: []string{"SYS_CHROOT"}}, func(*env) string { return says(unix.Chroot("/")) })
	add("open a file system", admin("fsopen"), func(*env) string { return opened(unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)) })
	add("copy a tree of mounts", admin("open_tree"), func(*env) string {
		return opened(unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC))
	})
	add("make a device", Probe{Calls: []string{"mknodat"}, Caps: []string{"MKNOD"}}, func(e *env) string {
		path := filepath.Join(e.place(), "twin-device")
		err := unix.Mknodat(unix.AT_FDCWD, path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 1)))
		if err == nil {
			err = unix.Unlink(path)
		}
		return says(err)
	})
	add("swap", nobody("swapon"), func(*env) string {
		path, _ := unix.BytePtrFromString("/nosuch")
		_, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(path)), 0, 0)
		return name(errno)
	})
	out[len(out)-1].Nobody, out[len(out)-1].Caps, out[len(out)-1].Maybe = false, []string{"SYS_ADMIN"}, true
	add("open a file by its handle", Probe{Calls: []string{"open_by_handle_at"}, Caps: []string{"DAC_READ_SEARCH"}}, func(*env) string {
		h := unix.NewFileHandle(1, make([]byte, 8))
		return opened(unix.OpenByHandleAt(unix.AT_FDCWD, h, unix.O_RDONLY|unix.O_CLOEXEC))
	})
	return out
}

func opened(fd int, err error) string {
	if err == nil {
		err = unix.Close(fd)
	}
	return says(err)
}

// kernel tries to change the kernel, or the machine.
func kernel() (out []Probe) {
	add := func(what string, p Probe, run func() string) {
		p.Group, p.Name = Kernel, what
		p.run = func(*env) string { return run() }
		out = append(out, p)
	}
	nobody := func(calls ...string) Probe { return Probe{Calls: calls, Nobody: true} }
	caps := func(call string, caps ...string) Probe { return Probe{Calls: []string{call}, Caps: caps} }
	hardened := func(call string, caps ...string) Probe { return Probe{Calls: []string{call}, Caps: caps, Node: true} }
	raw := func(call uintptr, args ...uintptr) string {
		var a [6]uintptr
		copy(a[:], args)
		_, _, errno := unix.Syscall6(call, a[0], a[1], a[2], a[3], a[4], a[5])
		return name(errno)
	}
	text := func(s string) uintptr {
		p, _ := unix.BytePtrFromString(s)
		return uintptr(unsafe.Pointer(p)) // of a constant in all but name: the collector does not move it before the call
	}
	add("load a module", nobody("init_module"), func() string { return says(unix.InitModule(make([]byte, 64), "")) })
	add("load a module from a file", nobody("finit_module"), func() string { return says(unix.FinitModule(0, "", 0)) })
	add("remove a module", nobody("delete_module"), func() string { return says(unix.DeleteModule("nosuch", unix.O_NONBLOCK)) })
	add("load another kernel", nobody("kexec_load"), func() string { return raw(unix.SYS_KEXEC_LOAD, 0, 0, 0, 0) })
	add("load another kernel from a file", nobody("kexec_file_load"), func() string { return raw(unix.SYS_KEXEC_FILE_LOAD, none, none, 0, 0, 0) })
	add("make a map for eBPF", hardened("bpf", "BPF", "SYS_ADMIN"), func() string {
		attr := [16]uint32{1, 4, 4, 1} // BPF_MAP_TYPE_HASH
		fd, _, errno := unix.Syscall(unix.SYS_BPF, 0, uintptr(unsafe.Pointer(&attr[0])), unsafe.Sizeof(attr))
		if errno == 0 {
			_ = unix.Close(int(fd))
		}
		return name(errno)
	})
	add("measure the kernel", hardened("perf_event_open", "PERFMON", "SYS_ADMIN"), func() string {
		attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}
		return opened(unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC))
	})
	add("measure everybody", hardened("perf_event_open", "PERFMON", "SYS_ADMIN"), func() string {
		attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{}))}
		return opened(unix.PerfEventOpen(&attr, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC))
	})
	add("serve page faults of the kernel", hardened("userfaultfd", "SYS_PTRACE"), func() string {
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
		if errno == 0 {
			_ = unix.Close(int(fd))
		}
		return name(errno)
	})
	add("make a ring of io_uring", hardened("io_uring_setup", "SYS_ADMIN"), func() string {
		var params [30]uint32
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])), 0)
		if errno == 0 {
			_ = unix.Close(int(fd))
		}
		return name(errno)
	})
	add("make a file that is memory", Probe{Calls: []string{"memfd_create"}}, func() string { return opened(unix.MemfdCreate("twin", unix.MFD_CLOEXEC)) })
	add("set the clock", caps("clock_settime", "SYS_TIME"), func() string {
		var now unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_REALTIME, &now)
		return raw(unix.SYS_CLOCK_SETTIME, unix.CLOCK_REALTIME, uintptr(unsafe.Pointer(&now)))
	})
	add("bend the clock", caps("adjtimex", "SYS_TIME"), func() string {
		_, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_SETOFFSET})
		return says(err)
	})
	add("rename the machine", caps("sethostname", "SYS_ADMIN"), func() string {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return says(err)
		}
		return says(unix.Sethostname(u.Nodename[:len(unix.ByteSliceToString(u.Nodename[:]))]))
	})
	add("rename the domain", caps("setdomainname", "SYS_ADMIN"), func() string { return says(unix.Setdomainname(nil)) })
	add("restart the machine", nobody("reboot"), func() string { return says(unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)) })
	add("use ports of the machine", nobody("iopl"), func() string { return raw(unix.SYS_IOPL, 3) })
	add("use one port of the machine", nobody("ioperm"), func() string { return raw(unix.SYS_IOPERM, 0x80, 1, 1) })
	add("read the kernel's log", Probe{Calls: []string{"syslog"}, Caps: []string{"SYSLOG"}, Node: true}, func() string {
		_, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
		return says(err)
	})
	add("account for processes", nobody("acct"), func() string { return raw(unix.SYS_ACCT, 0) })
	add("hang up the terminal", nobody("vhangup"), func() string { return raw(unix.SYS_VHANGUP) })
	add("watch all files", caps("fanotify_init", "SYS_ADMIN"), func() string {
		return opened(unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC, unix.O_RDONLY))
	})
	add("turn swap off", caps("swapoff", "SYS_ADMIN"), func() string { return raw(unix.SYS_SWAPOFF, text("/nosuch")) })
	out[len(out)-1].Maybe = true
	return out
}

// namespaces tries to make some and to enter those of PID 1.
func namespaces() (out []Probe) {
	for _, n := range []struct {
		name string
		flag int
		file string
	}{
		{"mounts", unix.CLONE_NEWNS, "mnt"}, {"the network", unix.CLONE_NEWNET, "net"}, {"processes", unix.CLONE_NEWPID, "pid"}, {"users", unix.CLONE_NEWUSER, "user"}, {"IPC", unix.CLONE_NEWIPC, "ipc"},
		{"names", unix.CLONE_NEWUTS, "uts"}, {"control groups", unix.CLONE_NEWCGROUP, "cgroup"}, {"time", unix.CLONE_NEWTIME, "time"},
	} {
		p := Probe{Group: Namespaces, Name: "make one of " + n.name, Calls: []string{"unshare"}, Caps: []string{"SYS_ADMIN"}, Maybe: n.name == "users", Node: n.name == "users"} // of users: not with several threads
		p.run = func(*env) string { return says(unix.Unshare(n.flag)) }
		out = append(out, p)
		for _, where := range []string{"1", "thread-self"} {
			enter := Probe{Group: Namespaces, Name: "enter that of " + n.name + " of " + map[string]string{"1": "PID 1", "thread-self": "oneself"}[where], Calls: []string{"openat", "setns"}, Kind: Other, Nobody: true, Node: true}
			if where != "1" {
				enter.Kind, enter.Path, enter.Caps, enter.Maybe = Own, "/proc/thread-self/ns/"+n.file, []string{"SYS_ADMIN"}, true
				enter.Nobody, enter.Node = n.file == "mnt", false // that needs SYS_CHROOT too
			}
			enter.run = func(*env) string {
				fd, err := unix.Open("/proc/"+where+"/ns/"+n.file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					return says(err)
				}
				defer unix.Close(fd)
				return says(unix.Setns(fd, n.flag))
			}
			out = append(out, enter)
		}
	}
	return out
}

// keys tries the kernel's keyrings. A daemon's are its own.
func keys() (out []Probe) {
	add := func(what, call string, nobody bool, run func() error) {
		out = append(out, Probe{Group: Keys, Name: what, Calls: []string{call}, Nobody: nobody, run: func(*env) string { return says(run()) }})
	}
	add("keep a key", "add_key", false, func() error {
		_, err := unix.AddKey("user", "twin", []byte("x"), unix.KEY_SPEC_THREAD_KEYRING)
		return err
	})
	add("join another session's keyring", "keyctl", false, func() error { _, err := unix.KeyctlJoinSessionKeyring("twin"); return err })
	add("look at the user's keyring", "keyctl", false, func() error { _, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_USER_KEYRING, true); return err })
	add("make a key of the group", "keyctl", true, func() error { _, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_GROUP_KEYRING, true); return err })
	add("ask for a key that there is not", "request_key", true, func() error { _, err := unix.RequestKey("user", "twin-nosuch", "", 0); return err })
	add("give a key to root", "keyctl", false, func() error {
		k, err := unix.AddKey("user", "twin-chown", []byte("x"), unix.KEY_SPEC_THREAD_KEYRING)
		if err != nil {
			return err
		}
		_, err = unix.KeyctlInt(unix.KEYCTL_CHOWN, k, 0, 0, 0)
		return err
	})
	out[len(out)-1].Calls, out[len(out)-1].Caps = []string{"add_key", "keyctl"}, []string{"SYS_ADMIN"}
	return out
}
