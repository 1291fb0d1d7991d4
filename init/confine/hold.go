package confine

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// A holder is process 1 of namespaces for mounts, processes and control groups in which other units live: the workload side. What is not
// for them is not covered there but taken off, for they are root with every capability, and could lift a cover. furnish makes the namespaces
// ready, Hold keeps them, and enter puts a unit's process in there.

// Inside is argv[0] of the trampoline of a unit that lives in a holder's namespaces, once it is in there.
const Inside = "confine-inside"

// program is this program, on the root that all namespaces have.
const program = "/sbin/init"

// kept are mounts of the host that stay: devices, and what shows the kernel. Of all others only what the unit shows is there.
var kept = []string{"/", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/bpf", "/sys/kernel/security"}

// fresh are mounts that the namespaces have for themselves.
var fresh = []struct {
	point, fs string
	flags     uintptr
	data      string
}{
	{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// furnish turns the namespaces in which PID 1 has just made this process into those that it will hold. This process is the only one in there.
func furnish(u *unit.Unit) error {
	var f console.First
	f.Try("make mounts private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	// Not a flag of the clone: what is the root of control groups in there is the group of who asks for it, which must be ours.
	f.Try("unshare control groups", unix.Unshare(unix.CLONE_NEWCGROUP))
	trees := map[string]int{}
	for _, p := range u.Show {
		fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		f.Try("show "+p, err)
		if strings.HasPrefix(p, unit.RunDir+"/") { // a daemon's
			attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			f.Try("show "+p, unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr))
		}
		trees[p] = fd
	}
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	f.Try("read mounts", err)
	if f.Err != nil {
		return f.Err
	}
	for _, m := range slices.Backward(console.Mounts(text)) {
		if !slices.Contains(kept, m.Point) {
			unix.Unmount(m.Point, unix.MNT_DETACH) // it may have gone with another one; see below
		}
	}
	want := slices.Clone(kept)
	for _, m := range fresh {
		f.Try("mount "+m.point, unix.Mount(m.fs, m.point, m.fs, m.flags, m.data))
		want = append(want, m.point)
	}
	text, err = os.ReadFile("/proc/thread-self/mountinfo")
	f.Try("read mounts", err)
	for _, m := range console.Mounts(text) {
		if !slices.Contains(want, m.Point) {
			f.Try("take off "+m.Point, errors.New("it is still there"))
		}
	}
	for _, p := range u.Show {
		f.Try("show "+p, os.MkdirAll(p, 0o755))
		f.Try("show "+p, unix.MoveMount(trees[p], "", unix.AT_FDCWD, p, unix.MOVE_MOUNT_F_EMPTY_PATH))
	}
	// Pods may ask for mounts to be seen by others: by all in here, and by nobody else.
	f.Try("share mounts", unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""))
	// Into a leaf: a group that hands controllers down has no process itself.
	const leaf = "/sys/fs/cgroup/hold"
	f.Try("control group", unix.Mkdir(leaf, 0o755))
	f.Try("control group", os.WriteFile(leaf+"/cgroup.procs", []byte("0"), 0))
	return f.Err
}

// Held says whether this process is to hold the namespaces that it is in.
func Held(args []string) bool {
	return os.Getpid() == 1 && len(args) == 2 && args[1] == "hold" && !strings.HasPrefix(args[0], "/")
}

// Hold is the life of a holder. It hears nothing: who lives in there cannot end it, and PID 1 kills it. That nobody waits for children lets
// the kernel take those that have ended, orphans of all that lives in there, by itself.
func Hold() {
	signal.Ignore()
	unix.Write(3, []byte("\n"))
	unix.Close(3)
	for {
		unix.Pause()
	}
}

// enter makes the unit's process in the namespaces of the process behind the first descriptor, says its number on the second one, and ends.
// PID 1 then is its parent, as of all whose parent has ended, and has read the number before: see Supervisor.reap.
//
// PID 1 does not do this itself. Who lives in there sees a new process from its first instruction on, and may stop, trace or write to it:
// it must share no memory, no descriptor and no other namespace with a process out here.
func enter(u *unit.Unit, holder, tell int) error {
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	var f console.First
	f.Try("unshare", unix.Unshare(unix.CLONE_FS)) // threads have their own folders for a mount namespace of their own
	f.Try("enter", unix.Setns(holder, unix.CLONE_NEWNS|unix.CLONE_NEWCGROUP|unix.CLONE_NEWPID))
	f.Try("close descriptors", unix.CloseRange(uint(holder), uint(tell), unix.CLOSE_RANGE_CLOEXEC))
	pid := 0
	if f.Err == nil {
		var err error
		pid, err = fork(program, []string{Inside, u.Name}, []string{"GOMAXPROCS=1"})
		f.Try("fork", err)
	}
	if f.Err != nil {
		return f.Err
	}
	unix.Write(tell, []byte(strconv.Itoa(pid)))
	select {
	case <-term: // meant for the unit
		unix.Kill(pid, unix.SIGTERM)
	default:
	}
	os.Exit(0)
	return nil
}

// fork makes a child with a copy of this process's memory, where package syscall would have it use the memory itself for its first steps.
// The child does nothing but to become the program.
func fork(program string, argv, env []string) (int, error) {
	name, err := syscall.BytePtrFromString(program)
	args, err2 := syscall.SlicePtrFromStrings(argv)
	vars, err3 := syscall.SlicePtrFromStrings(env)
	if err := errors.Join(err, err2, err3); err != nil {
		return 0, err
	}
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&args[0])), uintptr(unsafe.Pointer(&vars[0])))
		for {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, unit.NotConfined, 0, 0)
		}
	}
	if errno != 0 {
		return 0, errno
	}
	return int(pid), nil
}
