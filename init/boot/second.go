package boot

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

var secondMounts = []mount{
	{target: "/dev/pts", fs: "devpts", flags: unix.MS_NOSUID | unix.MS_NOEXEC, data: "mode=0620,ptmxmode=0666"},
	{target: "/dev/shm", fs: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{target: "/dev/mqueue", fs: "mqueue", flags: noExec},
	{target: "/run", fs: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=0755"},
	{target: "/tmp", fs: "tmpfs", flags: unix.MS_NOSUID | unix.MS_NODEV, data: "mode=1777"},
	{target: "/sys/fs/cgroup", fs: "cgroup2", flags: noExec, data: "nsdelegate,memory_recursiveprot"},
	{target: "/sys/fs/bpf", fs: "bpf", flags: noExec, data: "mode=0700", optional: true},
	{target: "/sys/kernel/security", fs: "securityfs", flags: noExec, optional: true},
	{target: "/sys/fs/pstore", fs: "pstore", flags: noExec, optional: true},
}

// Volumes are the folders that storaged mounts on. They are mounts of their own from the start, so that a namespace can share
// mounts there with everybody, and none elsewhere.
var Volumes = []string{unit.StateDir, "/var"}

// sysctls are kernel parameters. One with ? may be missing: not every kernel has it, or its module is not loaded.
var sysctls = []string{
	"net.ipv4.ip_forward=1",
	"net.ipv4.conf.all.forwarding=1",
	"fs.inotify.max_user_instances=8192",
	"fs.inotify.max_user_watches=524288",
	"fs.protected_fifos=1",
	"fs.protected_hardlinks=1",
	"fs.protected_regular=2",
	"fs.protected_symlinks=1",
	"kernel.dmesg_restrict=1",
	"kernel.kptr_restrict=1",
	"kernel.unprivileged_bpf_disabled?=1",
	"kernel.yama.ptrace_scope?=1",
	"kernel.printk_devkmsg=on", // our own lines are few, and none of them may be dropped
	"vm.max_map_count=262144",
	// What kubelet expects with protectKernelDefaults.
	"kernel.keys.root_maxbytes?=25000000",
	"kernel.keys.root_maxkeys?=1000000",
	"kernel.panic=10",
	"kernel.panic_on_oops=1",
	"vm.overcommit_memory=1",
	"vm.panic_on_oom=0",
}

// Second runs on the verified root and leaves it ready for units.
func Second() {
	unix.Umask(0o022)
	const tmpfs = "/run: it must be a tmpfs"
	run(append(mountSteps(secondMounts),
		step{"share mounts", shareMounts, "the image: it needs the folders /state and /var"},
		step{"link /dev/fd", linkDevices, "/dev: it must be a devtmpfs"},
		step{"make " + unit.RunDir, func() error { return os.Mkdir(unit.RunDir, 0o755) }, tmpfs},
		step{"make " + unit.SocketDir, func() error { return os.Mkdir(unit.SocketDir, 0o755) }, tmpfs},
		step{"hand on what the boot loader passed", handOn, tmpfs},
		step{"make the machine's id", machineID, tmpfs},
		step{"load modules", func() error { return rootModules(false) }, "/usr/lib/modules: is it of this kernel?"},
		step{"set kernel parameters", func() error { return setSysctls(sysctls...) }, "/proc/sys"},
		step{"take the claim key", claimKey, "QEMU's fw_cfg entry opt/dev.bulkhead/claim-key, or /usr/share/bulkhead/claim-key"},
	))
}

// OnTrial reports whether the boot loader counts this boot: then the version has to prove itself. Without UEFI nothing is counted. The
// firmware's variables are looked at for this and stay out of everybody's way.
func OnTrial() bool {
	const vars = "/sys/firmware/efi/efivars"
	if unix.Mount("efivarfs", vars, "efivarfs", noExec|unix.MS_RDONLY, "") == nil {
		defer unix.Unmount(vars, unix.MNT_DETACH)
	}
	_, err := os.Stat(vars + "/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f") // systemd-boot's
	if err == nil {
		console.Say("bulkhead: this version is on trial")
	}
	return err == nil
}

func shareMounts() error {
	var f console.First
	for _, dir := range Volumes {
		f.Try("mount "+dir, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	}
	f.Try("share /", unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""))
	return f.Err
}

func linkDevices() error {
	var f console.First
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		f.Try("link", os.Symlink("/proc/self/fd"+target, "/dev/"+name))
	}
	return f.Err
}

// handOn writes what stage 1 kept to a folder that everybody may read: nothing of it is secret, and storaged believes none of it.
func handOn() error {
	var f console.First
	dir := unit.RunDir + "/boot/"
	f.Try("folder", os.Mkdir(dir, 0o755))
	for _, name := range passedOn {
		if v, ok := os.LookupEnv(name); ok {
			f.Try("file", os.WriteFile(dir+name, []byte(v), 0o444))
			os.Unsetenv(name)
		}
	}
	return f.Err
}

func machineID() error {
	id := make([]byte, 16)
	var f console.First
	_, err := unix.Getrandom(id, 0)
	f.Try("getrandom", err)
	f.Try("folder", os.Mkdir(unit.RunDir+"/etc", 0o755))
	f.Try("file", os.WriteFile(unit.RunDir+"/etc/machine-id", []byte(toHex(id)+"\n"), 0o444))
	return f.Err
}

// Late does what only Kubernetes waits for, beside units that run already. What cannot be done is told.
func Late() {
	// A thread of its own, which ends with this goroutine, so that it alone gives way to the daemons.
	runtime.LockOSThread()
	unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	if err := rootModules(true); err != nil {
		console.Say("bulkhead: cannot load modules: ", err.Error())
	}
	setSysctls("net.bridge.bridge-nf-call-iptables?=1", "net.bridge.bridge-nf-call-ip6tables?=1") // of a late module
}

func rootModules(late bool) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	dir := "/usr/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/"
	return modules(dir+"bulkhead.list", dir, late)
}

func setSysctls(all ...string) error {
	for _, s := range all {
		name, value, _ := strings.Cut(s, "=")
		name, optional := strings.CutSuffix(name, "?")
		err := os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value+"\n"), 0)
		if err != nil && !(optional && errors.Is(err, fs.ErrNotExist)) {
			console.Say("bulkhead: ", name, " is not ", value, ": ", err.Error())
		}
	}
	return nil
}

func claimKey() error {
	key, err := os.ReadFile("/sys/firmware/qemu_fw_cfg/by_name/opt/dev.bulkhead/claim-key/raw")
	if errors.Is(err, fs.ErrNotExist) {
		key, err = os.ReadFile("/usr/share/bulkhead/claim-key")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	to := unit.RunDir + "/claim-key"
	f := console.First{Err: err}
	f.Try("write", os.WriteFile(to, key, 0o400))
	f.Try("chown", os.Chown(to, int(uid.Trustd), int(uid.Trustd)))
	return f.Err
}
