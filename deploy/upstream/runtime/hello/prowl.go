package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// What a pod found that looked for ways out. The pod is privileged, in the host's namespaces where it may choose, and has the host's root at /host.
type found struct {
	Processes []string // argv[0] of all that it sees, also in a /proc of its own; sorted
	Strangers []int    // processes that it could signal without seeing them
	Groups    []string // control groups of a hierarchy mounted anew, without pods'; sorted
	Sockets   []string // Unix sockets, of all that have a name in the host's network, that took a connection; sorted
	Abstract  []string // such that have no path
	Files     []string // below /host/run/bulkhead and /host/state, and wherever a process's root or namespace of mounts leads to the same; sorted
	Under     []string // what was under mounts of /host that it took off; sorted
	Spaces    []string // ways to other namespaces that the kernel offered
	Written   []string // files of daemons that it could change
}

// Of linux/nsfs.h and asm/unistd.h.
const (
	nsGetParent  = 0xb702
	nsNextMounts = 0x8010b70b
	nsPrevMounts = 0x8010b70c
	setns        = 308
)

// prowl prints what it found below the host's root, as JSON. What it takes apart is in namespaces of this thread alone.
func prowl(out io.Writer, host string) error {
	runtime.LockOSThread()
	var f found
	err := errors.Join(f.processes("/proc"), f.roots(host), f.spaces(), f.sockets(host))
	if err == nil {
		err = f.anew(host)
	}
	for _, l := range []*[]string{&f.Processes, &f.Groups, &f.Sockets, &f.Files, &f.Under} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	return errors.Join(err, json.NewEncoder(out).Encode(f))
}

func pids(proc string) (all []int) {
	entries, _ := os.ReadDir(proc)
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, n)
		}
	}
	return all
}

func (f *found) names(proc string) (all []int) {
	all = pids(proc)
	for _, pid := range all {
		text, err := os.ReadFile(filepath.Join(proc, fmt.Sprint(pid), "cmdline"))
		if name, _, _ := strings.Cut(string(text), "\x00"); err == nil {
			f.Processes = append(f.Processes, name)
		}
	}
	return all
}

// processes notes all that a /proc of this namespace shows, and what can be signalled besides.
func (f *found) processes(proc string) error {
	all := f.names(proc)
	if len(all) == 0 {
		return fmt.Errorf("%s shows no process", proc)
	}
	for pid := 1; pid < 1<<16; pid++ {
		if syscall.Kill(pid, 0) == nil && !slices.Contains(all, pid) {
			// A thread, or one that has begun since.
			if _, err := os.Stat(filepath.Join(proc, fmt.Sprint(pid))); err != nil && syscall.Kill(pid, 0) == nil {
				f.Strangers = append(f.Strangers, pid)
			}
		}
	}
	return nil
}

// daemons notes the files of daemons below a root.
func (f *found) daemons(root string) {
	for _, dir := range []string{"run/bulkhead", "state"} {
		_ = filepath.WalkDir(filepath.Join(root, dir), func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				f.Files = append(f.Files, strings.TrimPrefix(path, strings.TrimSuffix(root, "/")))
			}
			return nil
		})
	}
}

// roots looks below the host's root, that of every process and in the namespace of mounts of every thread.
func (f *found) roots(host string) error {
	f.daemons(host)
	own, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return err
	}
	been := map[string]bool{own: true}
	for _, pid := range pids("/proc") {
		f.daemons(fmt.Sprintf("/proc/%d/root", pid))
		spaces, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/ns/mnt", pid))
		for _, path := range spaces {
			if name, err := os.Readlink(path); err != nil || been[name] {
				continue
			} else {
				been[name] = true
			}
			if space, err := os.Open(path); err == nil {
				done := make(chan bool)
				go func() { // on a thread that ends with it
					defer close(done)
					runtime.LockOSThread()
					if syscall.Unshare(syscall.CLONE_FS) != nil {
						return
					}
					if _, _, errno := syscall.RawSyscall(setns, space.Fd(), syscall.CLONE_NEWNS, 0); errno == 0 {
						f.daemons("/")
						f.names("/proc") // it may be of other numbers, so nothing there is signalled
					}
				}()
				<-done
				space.Close()
			}
		}
	}
	return nil
}

// spaces asks the kernel for the parent of the namespace of processes, and for the neighbours of that of mounts.
func (f *found) spaces() error {
	for name, asks := range map[string][]uintptr{"pid": {nsGetParent}, "mnt": {nsNextMounts, nsPrevMounts}} {
		// Those of the first process that it sees: in the host's namespaces, if the pod is.
		space, err := os.Open("/proc/1/ns/" + name)
		if err != nil {
			return err
		}
		for _, ask := range asks {
			if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, space.Fd(), ask, 0); errno == 0 {
				f.Spaces = append(f.Spaces, fmt.Sprintf("%s %#x", name, ask))
			}
		}
		space.Close()
	}
	return nil
}

// sockets calls at every name that the kernel has for a Unix socket in this network.
func (f *found) sockets(host string) error {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) != 8 || fields[7] == "Path" {
			continue
		}
		name := fields[7]
		if strings.HasPrefix(name, "@") {
			f.Abstract = append(f.Abstract, name)
			continue
		}
		for _, path := range []string{name, filepath.Join(host, name)} {
			for _, kind := range []int{syscall.SOCK_STREAM, syscall.SOCK_SEQPACKET, syscall.SOCK_DGRAM} {
				fd, err := syscall.Socket(syscall.AF_UNIX, kind|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
				if err != nil {
					return err
				}
				if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: path}); err == nil || err == syscall.EAGAIN {
					f.Sockets = append(f.Sockets, name)
				}
				syscall.Close(fd)
			}
		}
	}
	return nil
}

// anew mounts everything once more, tries to change what daemons keep, takes all mounts of the host's root off, and looks again.
func (f *found) anew(host string) error {
	dir, err := os.MkdirTemp("/dev/shm", "prowl")
	if err != nil {
		return err
	}
	if err := errors.Join(syscall.Unshare(syscall.CLONE_NEWNS), syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := syscall.Mount("cgroup2", dir, "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroup2: %w", err)
	}
	groups, err := os.ReadDir(dir)
	for _, e := range groups {
		if e.IsDir() {
			f.Groups = append(f.Groups, e.Name())
		}
	}
	if err := errors.Join(err, syscall.Mount("proc", dir, "proc", 0, ""), f.processes(dir)); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	for _, name := range []string{"networkd/hostname", "kubeletd/cni/prowl", "sock/prowl", "storaged/locked"} {
		path := filepath.Join(host, "run/bulkhead", name)
		if file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600); err == nil {
			file.Close()
			f.Written = append(f.Written, name)
		}
	}
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	for _, line := range slices.Backward(strings.Split(strings.TrimSpace(string(mounts)), "\n")) {
		if point := strings.Fields(line)[4]; strings.HasPrefix(point, host+"/") {
			_ = syscall.Unmount(point, syscall.MNT_DETACH) // it may have gone with another one
		}
	}
	for _, name := range []string{"run", "state", "var", "proc", "sys", "dev", "tmp"} {
		entries, err := os.ReadDir(filepath.Join(host, name))
		if err != nil {
			return err
		}
		for _, e := range entries {
			f.Under = append(f.Under, filepath.Join(name, e.Name()))
		}
	}
	return nil
}
