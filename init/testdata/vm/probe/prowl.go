package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	mounts "github.com/bulkhead-os/bulkhead/init/console"
)

// prowl is a privileged pod that wants out: root with every capability, in the namespaces of the workload side. It says what it could do, one line
// each: "prowl ok ..." or "prowl WRONG ...".
func prowl() {
	say := func(ok bool, what string, got ...any) {
		word := "ok"
		if !ok {
			word = "WRONG"
		}
		fmt.Println("prowl", word, what, fmt.Sprint(got...))
	}
	runtime.LockOSThread() // what it takes apart is its own, and ends with it
	neighbours := []string{"workload", "work-a", "work-b", "prowler", "pod"}
	own := map[string]string{}
	for _, ns := range []string{"mnt", "pid", "cgroup"} {
		own[ns] = must(os.Readlink("/proc/thread-self/ns/" + ns))
	}
	look := func(proc string) {
		for _, pid := range pids(proc) {
			name := argv0(proc, pid)
			for range 100 { // between two programs it has none
				if name != "" {
					break
				}
				time.Sleep(10 * time.Millisecond)
				name = argv0(proc, pid)
			}
			_, err := os.Stat(fmt.Sprintf("%s/%d", proc, pid))
			say(err != nil || slices.Contains(neighbours, name) || strings.HasPrefix(name, "confine"), "sees no stranger's process in "+proc, pid, " ", name)
			for ns := range own {
				for _, path := range must(filepath.Glob(fmt.Sprintf("%s/%d/task/*/ns/%s", proc, pid, ns))) {
					theirs, err := os.Readlink(path)
					say(err != nil || theirs == own[ns] || proc == "/proc" && name == "prowler", "no process leads elsewhere", path, " ", theirs, err)
				}
			}
		}
	}
	look("/proc")

	// The parent of the namespace of processes, and the neighbours of that of mounts.
	pid := must(unix.Open("/proc/self/ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0))
	_, err := unix.IoctlRetInt(pid, unix.NS_GET_PARENT)
	say(err == unix.EPERM, "the namespace of processes has no parent", err)
	mnt := must(unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0))
	for _, next := range []uint{0x8010b70b, 0x8010b70c} { // NS_MNT_GET_NEXT and _PREV of linux/nsfs.h: in Linux 6.12 as it came they led root from any to any other
		_, err = unix.IoctlRetInt(mnt, next)
		say(err == unix.EPERM, "the namespace of mounts has no neighbour", err)
	}

	// Signals.
	seen := pids("/proc")
	for n := 1; n < 1<<16; n++ {
		if err := unix.Kill(n, 0); err == nil && !slices.Contains(seen, n) && !slices.Contains(pids("/proc"), n) {
			_, err := os.Stat(fmt.Sprintf("/proc/%d/status", n)) // a thread
			say(err == nil, "nobody else can be signalled", n, err)
		}
	}

	// Sockets: the table is of the network's namespace, which is shared. None of the paths leads anywhere, and there is none without a path.
	table := must(readAll("/proc/net/unix"))
	found := 0
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) == 8 && f[0] != "Num" {
			found++
			for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET, unix.SOCK_DGRAM} {
				fd := must(unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0))
				err := unix.Connect(fd, &unix.SockaddrUnix{Name: f[7]})
				say(err == unix.ENOENT, "a socket does not answer", f[7], " ", err)
				unix.Close(fd)
			}
		}
	}
	say(found >= 2, "the daemons' sockets have names", found)

	// What is shown of a daemon is to be read.
	err = os.WriteFile("/run/bulkhead/plain/mine", nil, 0o600)
	say(errors.Is(err, unix.EROFS), "writes into a daemon's folder", err)
	text, err := readAll("/run/bulkhead/plain/hello")
	say(text == "hello", "reads what is shown", text, err)
	_, err = os.ReadFile("/etc/machine-id")
	say(err == nil, "reads the machine's id", err)

	// Control groups, mounted anew.
	must(0, os.MkdirAll("/tmp/cgroup", 0o700))
	must(0, unix.Mount("cgroup2", "/tmp/cgroup", "cgroup2", 0, ""))
	must(0, filepath.WalkDir("/tmp/cgroup", func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && path != "/tmp/cgroup" {
			top, _, _ := strings.Cut(strings.TrimPrefix(path, "/tmp/cgroup/"), "/")
			say(slices.Contains([]string{"hold", "work-a", "work-b", "prowler", "kubepods"}, top), "sees no stranger's control group", path)
		}
		return err
	}))
	err = os.WriteFile("/tmp/cgroup/memory.max", []byte("1M"), 0)
	say(err != nil, "the limits of all are not for those inside", err)

	// Everything taken off.
	must(0, unix.Unshare(unix.CLONE_NEWNS))
	must(0, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	for _, m := range slices.Backward(mounts.Mounts([]byte(must(readAll("/proc/thread-self/mountinfo"))))) {
		if m.Point != "/" && m.Point != "/proc" {
			unix.Unmount(m.Point, unix.MNT_DETACH)
		}
	}
	unix.Unmount("/proc", unix.MNT_DETACH)
	for _, dir := range []string{"/proc", "/run", "/state", "/var", "/tmp", "/sys", "/dev"} {
		under := must(os.ReadDir(dir))
		say(len(under) == 0, "nothing is under "+dir, under)
	}
	must(0, unix.Mount("proc", "/proc", "proc", 0, ""))
	look("/proc")
	ready()
	wait()
}

func pids(proc string) (all []int) {
	for _, e := range must(os.ReadDir(proc)) {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, n)
		}
	}
	return all
}

// argv0 is a process's name; of a thread of the kernel, "".
func argv0(proc string, pid int) string {
	text, _ := readAll(fmt.Sprintf("%s/%d/cmdline", proc, pid))
	name, _, _ := strings.Cut(text, "\x00")
	return name
}
