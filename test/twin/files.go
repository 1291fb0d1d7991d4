package twin

import (
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/hardening"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Daemons are the units that have a twin.
func Daemons() []string {
	return []string{"apid", "etcdd", "gateway", "kubeletd", "machined", "networkd", "storaged", "trustd", "updated"}
}

// Others are units of programs that are not ours: they have no twin, but all daemons try to reach them.
func Others() []string {
	return []string{"containerd", "image-load", "kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet", "workload"}
}

// runtimes are the modes of the folders /run/bulkhead/<unit>, by unit: 0 is none. TestRuntimes holds them to the units.
var runtimes = map[string]uint32{
	"machined": 0o750, "networkd": 0o755, "storaged": 0o755, "trustd": 0o700, "updated": 0o700, "etcdd": 0o700, "kubeletd": 0o755,
}

// Runtime is the mode of the folder /run/bulkhead/<unit>; 0 is none.
func Runtime(unit string) uint32 { return runtimes[unit] }

// states are the daemons with a folder on STATE.
var states = []string{"machined", "storaged", "trustd", "updated"}

// files tries files and folders.
func files() (out []Probe) {
	list := func(p Probe) {
		p.Group, p.Name, p.Calls = Files, "list "+p.Path, []string{"openat", "getdents64"}
		p.run = func(*env) string { return says(listFolder(p.Path)) }
		out = append(out, p)
	}
	read := func(p Probe) {
		p.Group, p.Name, p.Calls = Files, "read "+p.Path, []string{"openat"}
		p.run = func(*env) string { return open(p.Path, unix.O_RDONLY) }
		out = append(out, p)
	}
	write := func(p Probe) {
		p.Group, p.Name, p.Calls, p.Write = Files, "write "+p.Path, []string{"openat"}, true
		p.run = func(*env) string { return open(p.Path, unix.O_WRONLY) }
		out = append(out, p)
	}
	create := func(p Probe) {
		p.Group, p.Name, p.Calls, p.Write = Files, "make a file in "+p.Path, []string{"openat"}, true
		p.run = func(e *env) string { return create(filepath.Join(p.Path, "twin-"+e.name)) }
		out = append(out, p)
	}
	for _, d := range Daemons() {
		if mode := runtimes[d]; mode != 0 {
			f := Probe{Path: filepath.Join(unit.RunDir, d), Owner: d, Mode: mode}
			list(f)
			create(f)
		}
	}
	for _, d := range states {
		f := Probe{Path: filepath.Join(unit.StateDir, d), Owner: d, Mode: 0o700}
		list(f)
		create(f)
	}
	for _, p := range []string{"/", "/dev", "/dev/mqueue", "/dev/shm", "/etc", "/proc", "/run", "/run/bulkhead", "/run/bulkhead/sock", "/sys", "/sys/fs/cgroup", "/sys/fs/cgroup/bulkhead", "/tmp", "/usr/bin", "/usr/lib/bulkhead", "/usr/lib/modules", "/usr/sbin", "/usr/share/bulkhead"} {
		f := Probe{Path: p, Mode: 0o755}
		if p == "/dev/shm" || p == "/tmp" || p == "/dev/mqueue" {
			f.Mode = 0o1777
		}
		list(f)
		if !slices.Contains([]string{"/proc", "/sys", "/dev/mqueue", "/sys/fs/cgroup", "/sys/fs/cgroup/bulkhead"}, p) { // where nobody makes files
			create(f)
		}
	}
	for _, p := range []string{"/state", "/var", "/var/lib", "/var/lib/etcd", "/var/lib/kubelet", "/var/lib/containerd", "/var/log"} {
		f := Probe{Path: p, Mode: 0o755, Maybe: p != "/state" && p != "/var"}
		switch p {
		case "/var/lib/etcd":
			f.Owner, f.Mode = "etcdd", 0o700
		case "/var/lib/kubelet":
			f.Mode = 0o750
		case "/var/lib/containerd":
			f.Mode = 0o700
		}
		list(f)
		create(f)
	}
	read(Probe{Path: "/run/bulkhead/claim-key", Owner: "trustd", Mode: 0o400, Maybe: true})
	read(Probe{Path: "/run/bulkhead/machined/events", Owner: "machined", Mode: 0o600, Maybe: true})
	for _, d := range Daemons() {
		read(Probe{Path: "/run/bulkhead/machined/logs/" + d, Owner: "machined", Mode: 0o600, Maybe: true})
	}
	for _, f := range []string{"machined/generations", "machined/audit", "machined/boots"} {
		list(Probe{Path: "/state/" + f, Owner: "machined", Mode: 0o700, Maybe: true})
	}
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		f := Probe{Path: "/run/bulkhead/networkd/" + f, Owner: "networkd", Mode: 0o644, Maybe: true}
		read(f)
		write(f)
	}
	for _, p := range []string{"/etc/passwd", "/etc/os-release", "/run/bulkhead/etc/machine-id", "/run/bulkhead/boot/sysctls", "/usr/sbin/init", "/usr/lib/bulkhead/bulkheadd", "/usr/lib/bulkhead/etcdd", "/usr/lib/bulkhead/kubeletd", "/usr/share/bulkhead/release.pub", "/usr/share/bulkhead/pcr.pub"} {
		f := Probe{Path: p, Mode: 0o644, Maybe: true}
		read(f)
		write(f)
	}
	for _, s := range append(Daemons(), "init") {
		path := unit.SocketDir + "/" + s + ".sock"
		out = append(out, Probe{Group: Files, Name: "change the mode of " + path, Calls: []string{"fchmodat"}, Path: path, Write: true, Nobody: true, run: func(*env) string {
			return says(unix.Chmod(path, 0o666))
		}})
	}
	return out
}

func listFolder(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Getdents(fd, make([]byte, 4096))
	return err
}

// open opens a file and closes it again; nothing is read or written.
func open(path string, flags int) string {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err == nil {
		err = unix.Close(fd)
	}
	return says(err)
}

func create(path string) string {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return says(err)
	}
	_ = unix.Close(fd)
	_ = unix.Unlink(path)
	return OK
}

// open to all who may see them; others are root's, mode 0600.
var openDevices = []string{"null", "zero", "full", "random", "urandom", "tty", "ptmx", "net/tun", "vsock"}

// devices opens devices for reading and, those that keep what they are told, for writing.
func devices() (out []Probe) {
	for _, d := range []string{"null", "zero", "full", "random", "urandom", "console", "tty", "tty0", "tty1", "ttyS0", "ptmx", "mem", "kmem", "port", "kmsg", "vda", "vda1", "vda2", "sda", "nvme0", "nvme0n1", "dm-0", "dm-1",
		"mapper/control", "loop-control", "loop0", "md0", "sr0", "sg0", "tpm0", "tpmrm0", "rtc0", "hpet", "nvram", "mcelog", "cpu/0/msr", "cpu/0/cpuid", "cpu_dma_latency", "net/tun", "fuse", "vsock", "vhost-net", "vhost-vsock", "kvm",
		"userfaultfd", "snapshot", "btrfs-control", "uinput", "uhid", "input/event0", "fb0", "dri/card0", "hwrng", "ppp", "autofs", "rfkill", "i2c-0", "gpiochip0", "ipmi0", "vfio/vfio", "kfd", "udmabuf", "watchdog0"} {
		for _, write := range []bool{false, true} {
			p := Probe{Group: Devices, Path: "/dev/" + d, Mode: 0o600, Write: write, Maybe: true, Calls: []string{"openat"}, Name: "read /dev/" + d}
			flags := unix.O_RDONLY
			if write {
				p.Name, flags = "write /dev/"+d, unix.O_WRONLY
			}
			switch {
			case slices.Contains(openDevices, d):
				p.Mode = 0o666
			case d == "kmsg" && !write:
				p.Mode, p.Caps = 0o644, []string{"SYSLOG"}
			case d == "mem" || d == "kmem" || d == "port" || d == "snapshot" || strings.HasPrefix(d, "cpu/"):
				p.Nobody = true // RAWIO, and the kernel's lockdown
			}
			p.run = func(*env) string { return open(p.Path, flags) }
			out = append(out, p)
		}
	}
	return out
}

// settings opens what changes the kernel, for writing. Nothing is written.
func settings() (out []Probe) {
	add := func(kind Kind, write bool, paths ...string) {
		for _, path := range paths {
			p := Probe{Group: Settings, Name: "read " + path, Path: path, Write: write, Mode: 0o644, Kind: kind, Maybe: true, Calls: []string{"openat"}}
			flags := unix.O_RDONLY
			if write {
				p.Name, flags = "write "+path, unix.O_WRONLY
			} else {
				p.Mode = 0o400
			}
			p.run = func(*env) string { return open(path, flags) }
			out = append(out, p)
		}
	}
	var params []string
	for _, p := range hardening.Params {
		params = append(params, p.Path())
	}
	params = append(params, "/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/panic", "/proc/sys/kernel/pid_max", "/proc/sys/vm/drop_caches", "/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max", "/proc/sys/net/ipv4/ip_forward")
	slices.Sort(params)
	for _, p := range slices.Compact(params) {
		kind := Param
		if strings.HasPrefix(p, "/proc/sys/net/") {
			kind = NetParam
		}
		add(kind, true, p)
	}
	add(Pseudo, true, "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr", "/proc/timer_list", "/proc/scsi/scsi",
		"/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/cgroup.subtree_control", "/sys/power/state", "/sys/kernel/uevent_helper", "/sys/kernel/security/lockdown", "/sys/kernel/mm/transparent_hugepage/enabled",
		"/sys/kernel/mm/ksm/run", "/sys/module/kernel/parameters/panic", "/sys/bus/pci/rescan", "/sys/block/vda/uevent", "/sys/class/net/lo/uevent", "/sys/devices/system/cpu/cpu1/online", "/sys/kernel/profiling", "/sys/kernel/reboot/type")
	for _, d := range Daemons() {
		for _, f := range []string{"cgroup.procs", "cgroup.kill", "cgroup.freeze", "memory.max", "pids.max"} {
			add(Pseudo, true, "/sys/fs/cgroup/bulkhead/"+d+"/"+f)
		}
	}
	add(Pseudo, false, "/proc/kcore", "/proc/kpagecount", "/proc/vmallocinfo", "/proc/slabinfo", "/sys/kernel/security/lockdown", "/sys/kernel/notes")
	for i := range out {
		switch out[i].Name {
		case "read /proc/kcore":
			out[i].Nobody = true // RAWIO, and the kernel's lockdown
		case "read /sys/kernel/security/lockdown", "read /sys/kernel/notes":
			out[i].Mode = 0o444
		}
	}
	for _, path := range []string{"/sys/fs/pstore", "/sys/fs/bpf", "/sys/kernel/tracing", "/sys/kernel/debug"} {
		p := Probe{Group: Settings, Name: "list " + path, Path: path, Mode: 0o700, Maybe: true, Kind: Pseudo, Calls: []string{"openat", "getdents64"}, run: func(*env) string { return says(listFolder(path)) }}
		switch path {
		case "/sys/fs/pstore":
			p.Owner = "machined"
		case "/sys/kernel/tracing": // nothing is mounted there
			p.Mode = 0o755
		}
		out = append(out, p)
	}
	add(Own, true, "/proc/self/oom_score_adj", "/proc/self/coredump_filter", "/proc/self/clear_refs", "/proc/self/mem", "/proc/self/comm", "/proc/self/uid_map", "/proc/self/setgroups")
	out[len(out)-1].Caps = []string{"SYS_ADMIN"}
	return out
}

// userID is a user's number; 0 for "".
func userID(name string) uint32 {
	id, _ := uid.Lookup(name)
	return uint32(id)
}

// UserID is the number of a probe's owner.
func (p *Probe) UserID() uint32 { return userID(p.Owner) }
