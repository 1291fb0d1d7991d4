package boot

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/init/watchdog"
	"github.com/bulkhead-os/bulkhead/internal/hardening"
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

// operation are kernel parameters that a node needs for its work. What protects it is in package hardening.
var operation = []hardening.Param{
	// First: it sets what depends on whether a machine forwards back to its default.
	{Name: "net.ipv4.ip_forward", Value: "1"},
	{Name: "net.ipv4.conf.all.forwarding", Value: "1"},
	{Name: "net.ipv6.conf.all.forwarding", Value: "1"},
	// A machine that forwards would pass over router advertisements.
	{Name: "net.ipv6.conf.default.accept_ra", Value: "2"},
	{Name: "fs.inotify.max_user_instances", Value: "8192"},
	{Name: "fs.inotify.max_user_watches", Value: "524288"},
	{Name: "kernel.printk_devkmsg", Value: "on"}, // our own lines are few, and none of them may be dropped
	{Name: "vm.max_map_count", Value: "262144"},
	// What kubelet expects with protectKernelDefaults; kernel.panic_on_oops is in package hardening.
	{Name: "kernel.keys.root_maxbytes", Value: "25000000"},
	{Name: "kernel.keys.root_maxkeys", Value: "1000000"},
	{Name: "kernel.panic", Value: "10"},
	{Name: "vm.overcommit_memory", Value: "1"},
	{Name: "vm.panic_on_oom", Value: "0"},
	{Name: "net.bridge.bridge-nf-call-iptables", Value: "1", Late: true}, // of a late module
	{Name: "net.bridge.bridge-nf-call-ip6tables", Value: "1", Late: true},
}

// Second runs on the verified root and leaves it ready for units.
func Second(dog *watchdog.Dog) {
	unix.Umask(0o022)
	const tmpfs = "/run: it must be a tmpfs"
	run(append(mountSteps(secondMounts),
		step{"share mounts", shareMounts, "the image: it needs the folders /state and /var"},
		step{"link /dev/fd", linkDevices, "/dev: it must be a devtmpfs"},
		step{"make " + unit.RunDir, func() error { return os.Mkdir(unit.RunDir, 0o755) }, tmpfs},
		step{"make " + unit.SocketDir, makeSockets, tmpfs},
		step{"hand on what the boot loader passed", handOn, tmpfs},
		step{"make the machine's id", machineID, tmpfs},
		// Before links appear, which take their own from the defaults.
		step{"set kernel parameters", func() error { return setParams(false) }, "/proc/sys"},
		step{"load modules", func() error { return rootModules(false, func() { dog.Find(); dog.Feed() }) }, "/usr/lib/modules: is it of this kernel?"},
		step{"hand out what the firmware keeps", firmware, "the firmware"},
		step{"take the claim key", claimKey, "QEMU's fw_cfg entry opt/dev.bulkhead/claim-key, or /usr/share/bulkhead/claim-key"},
	), dog)
}

// OnTrial reports whether the boot loader counts this boot: then the version has to prove itself. Without UEFI nothing is counted.
func OnTrial() bool {
	_, err := os.Stat(variables + "/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f") // systemd-boot's
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

// makeSockets makes the folder of sockets a file system of its own: whoever is shown another folder of /run cannot come from there to it.
func makeSockets() error {
	f := console.First{Err: os.Mkdir(unit.SocketDir, 0o755)}
	f.Try("mount", unix.Mount("tmpfs", unit.SocketDir, "tmpfs", noExec, "mode=0755"))
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

// Late does what only Kubernetes waits for, beside units that run already, and then closes the kernel for modules. What cannot be
// done is told.
func Late() {
	// A thread of its own, which ends with this goroutine, so that it alone gives way to the daemons.
	runtime.LockOSThread()
	unix.Setpriority(unix.PRIO_PROCESS, 0, 10)
	if err := rootModules(true, func() {}); err != nil {
		console.Say("bulkhead: cannot load modules: ", err.Error())
	}
	setParams(true)
}

// variables is where stage 1 mounts the firmware's, if there is a firmware that has some.
const variables = "/sys/firmware/efi/efivars"

// firmware gives the records of kernel panics that the firmware or the memory kept to machined, which stores them and then deletes them there.
func firmware() error {
	if os.Chown("/sys/fs/pstore", int(uid.Machined), int(uid.Machined)) == nil { // none: the kernel keeps no records
		return os.Chmod("/sys/fs/pstore", 0o700)
	}
	return nil
}

func rootModules(late bool, loaded func()) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	dir := "/usr/lib/modules/" + unix.ByteSliceToString(u.Release[:]) + "/"
	start := time.Now()
	n, err := modules(dir+"bulkhead.list", dir, late, loaded)
	sayModules(n, start)
	return err
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
