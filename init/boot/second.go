package boot

import (
	"errors"
	"io/fs"
	"os"
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

var sysctls = []struct {
	name, value string
	optional    bool // not every kernel has it, or its module is not loaded
}{
	{name: "net.ipv4.ip_forward", value: "1"},
	{name: "net.ipv4.conf.all.forwarding", value: "1"},
	{name: "net.bridge.bridge-nf-call-iptables", value: "1", optional: true},
	{name: "net.bridge.bridge-nf-call-ip6tables", value: "1", optional: true},
	{name: "fs.inotify.max_user_instances", value: "8192"},
	{name: "fs.inotify.max_user_watches", value: "524288"},
	{name: "fs.protected_fifos", value: "1"},
	{name: "fs.protected_hardlinks", value: "1"},
	{name: "fs.protected_regular", value: "2"},
	{name: "fs.protected_symlinks", value: "1"},
	{name: "kernel.dmesg_restrict", value: "1"},
	{name: "kernel.kptr_restrict", value: "1"},
	{name: "kernel.unprivileged_bpf_disabled", value: "1", optional: true},
	{name: "kernel.yama.ptrace_scope", value: "1", optional: true},
	{name: "kernel.printk_devkmsg", value: "on"}, // our own lines are few, and none of them may be dropped
	{name: "vm.max_map_count", value: "262144"},
	// What kubelet expects with protectKernelDefaults.
	{name: "kernel.keys.root_maxbytes", value: "25000000", optional: true},
	{name: "kernel.keys.root_maxkeys", value: "1000000", optional: true},
	{name: "kernel.panic", value: "10"},
	{name: "kernel.panic_on_oops", value: "1"},
	{name: "vm.overcommit_memory", value: "1"},
	{name: "vm.panic_on_oom", value: "0"},
}

// Second runs on the verified root and leaves it ready for units.
func Second() {
	// A file that others read must come out with the mode that is asked for here.
	unix.Umask(0o022)
	const image = "the image: PID 1 and the root belong together"
	run(append(mountSteps(secondMounts),
		step{"share mounts", shareMounts, image},
		step{"link /dev/fd", linkDevices, "/dev: it must be a devtmpfs"},
		step{"make the run-time folders", makeFolders, "/run: it must be a tmpfs"},
		step{"make the machine's id", machineID, "/run: it must be a tmpfs"},
		step{"load modules", secondModules, "/usr/lib/modules: is it of this kernel?"},
		step{"set kernel parameters", setSysctls, "/proc/sys"},
		step{"take the claim key", claimKey, "QEMU's fw_cfg entry opt/dev.bulkhead/claim-key, or /usr/share/bulkhead/claim-key"},
	))
}

func shareMounts() (string, error) {
	for _, dir := range Volumes {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return "", os.NewSyscallError("mount "+dir, err)
		}
	}
	return "", unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

func linkDevices() (string, error) {
	for name, target := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+target, "/dev/"+name); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return "", nil
}

func makeFolders() (string, error) {
	for _, dir := range []string{unit.RunDir, unit.SocketDir, unit.RunDir + "/etc"} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return "", nil
}

func machineID() (string, error) {
	id := make([]byte, 16)
	if _, err := unix.Getrandom(id, 0); err != nil {
		return "", err
	}
	return "", os.WriteFile(unit.RunDir+"/etc/machine-id", []byte(toHex(id)+"\n"), 0o444)
}

func secondModules() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	dir := "/usr/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/"
	return modules(dir+"bulkhead.list", dir)
}

func setSysctls() (string, error) {
	for _, s := range sysctls {
		err := os.WriteFile("/proc/sys/"+strings.ReplaceAll(s.name, ".", "/"), []byte(s.value+"\n"), 0) // some want the newline
		if err != nil && !s.optional {
			console.Say("bulkhead: ", s.name, " is not ", s.value, ": ", err.Error())
		}
	}
	return "", nil
}

func claimKey() (string, error) {
	for _, from := range []string{"/sys/firmware/qemu_fw_cfg/by_name/opt/dev.bulkhead/claim-key/raw", "/usr/share/bulkhead/claim-key"} {
		key, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return "", err
		}
		to := unit.RunDir + "/claim-key"
		if err = os.WriteFile(to, key, 0o400); err == nil {
			err = os.Chown(to, int(uid.Trustd), int(uid.Trustd))
		}
		return "", err
	}
	return "", nil
}
