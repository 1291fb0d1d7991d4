package supervise

import (
	"errors"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/confine"
	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const (
	cgroups   = "/sys/fs/cgroup/bulkhead"
	backlog   = 4096
	logSize   = 1 << 20
	holdLimit = 10 * time.Second // for a mount namespace to be set up
)

// linux is the kernel itself.
type linux struct {
	null       int
	namespaces map[string]int
}

// New makes what units need before any of them runs, and returns their supervisor. What cannot be made is told: a unit that
// lacks something is better than a machine that does not start.
func New(units []unit.Unit) (*Supervisor, error) {
	k := linux{namespaces: map[string]int{}}
	var err error
	if k.null, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("open /dev/null", err)
	}
	complain := func(what string, err error) {
		if err != nil {
			console.Say("bulkhead: ", what, ": ", err.Error())
		}
	}
	complain("control groups", delegate())
	var services []*service
	for i := range units {
		v := &service{Unit: &units[i], ready: -1, cgroup: -1, since: time.Now()}
		services = append(services, v)
		complain("unit "+v.Name, v.makeFolder())
		complain("unit "+v.Name, v.bind())
		complain("unit "+v.Name, v.log.make())
		complain("unit "+v.Name, v.limit())
	}
	for i := range units {
		if u := &units[i]; confine.Named(u) && k.namespaces[u.MountNamespace] == 0 {
			k.namespaces[u.MountNamespace], err = hold(u.MountNamespace)
			complain("mount namespace "+u.MountNamespace, err)
		}
	}
	s, err := newSupervisor(services, k, unit.InitSocket)
	if err != nil {
		return nil, err
	}
	if s.dog, err = unix.Open("/dev/watchdog", unix.O_WRONLY|unix.O_CLOEXEC, 0); err == nil {
		console.Say("bulkhead: the hardware watchdog is on")
	}
	// Go ends a process on most signals that it is not told to hand over, and PID 1 must not end.
	// To ignore them would be no help: that is inherited.
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE, unix.SIGPWR)
	go func() {
		for range c {
			unix.Write(s.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		}
	}()
	return s, nil
}

// delegate hands the controllers that there are down to the units' control groups, and to those of pods.
func delegate() error {
	if err := os.Mkdir(cgroups, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, dir := range []string{"/sys/fs/cgroup", cgroups} {
		have, err := os.ReadFile(dir + "/cgroup.controllers")
		if err != nil {
			return err
		}
		for _, c := range strings.Fields(string(have)) {
			if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// limit makes the unit's control group.
func (v *service) limit() error {
	dir := v.dir()
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, l := range []struct {
		file  string
		value uint64
	}{{"memory.max", v.MemoryMax}, {"pids.max", v.PidsMax}, {"cpu.weight", v.CPUWeight}} {
		if l.value == 0 {
			continue
		}
		if err := os.WriteFile(dir+"/"+l.file, []byte(strconv.FormatUint(l.value, 10)), 0); err != nil {
			return err
		}
	}
	if v.Delegate {
		for _, file := range []string{"", "/cgroup.procs", "/cgroup.subtree_control", "/cgroup.threads"} {
			if err := os.Chown(dir+file, int(v.UID), int(v.UID)); err != nil {
				return err
			}
		}
	}
	var err error
	v.cgroup, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return err
}

func (v *service) makeFolder() error {
	if v.Runtime == 0 {
		return nil
	}
	dir := unit.RunDir + "/" + v.Name
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = os.Chown(dir, int(v.UID), int(v.UID))
	}
	if err == nil {
		err = os.Chmod(dir, fs.FileMode(v.Runtime))
	}
	return err
}

// bind opens the unit's listeners. PID 1 keeps them, so that callers wait while the unit is started again.
func (v *service) bind() error {
	for _, l := range v.Listen {
		fd, err := listen(l, unit.SocketDir+"/"+v.Name+".sock")
		if err != nil {
			return os.NewSyscallError("listen on "+l, err)
		}
		v.listen = append(v.listen, fd)
	}
	return nil
}

func listen(what, path string) (fd int, err error) {
	const flags = unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	if what == "unix" {
		if fd, err = unix.Socket(unix.AF_UNIX, flags, 0); err != nil {
			return -1, err
		}
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err == nil {
			err = unix.Chmod(path, 0o666)
		}
	} else {
		port, err := strconv.ParseUint(strings.TrimPrefix(what, "tcp:"), 10, 16)
		if err != nil {
			return -1, err
		}
		if fd, err = unix.Socket(unix.AF_INET6, flags, 0); err != nil {
			return -1, err
		}
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err = unix.Bind(fd, &unix.SockaddrInet6{Port: int(port)}); err != nil {
			return -1, err
		}
	}
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	return fd, err
}

func (k linux) spawn(v *service, ready int) (int, error) {
	if err := v.renew(); err != nil {
		return 0, err
	}
	if len(v.listen) != len(v.Listen) || v.cgroup < 0 || v.log.write == 0 {
		return 0, unix.ENODEV // it was told at the start
	}
	if ready < 0 {
		ready = k.null
	}
	fds := []int{k.null, v.log.write, v.log.write, ready}
	fds = append(fds, v.listen...)
	if v.Console {
		fd, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	flags := uintptr(unix.CLONE_NEWNS)
	if confine.Named(v.Unit) {
		flags = 0
		fds = append(fds, k.namespaces[v.MountNamespace])
	}
	if v.Network == "none" {
		flags |= unix.CLONE_NEWNET
	}
	return fork(v.Name, fds, &syscall.SysProcAttr{Setsid: true, Cloneflags: flags, UseCgroupFD: true, CgroupFD: v.cgroup})
}

// fork starts the trampoline.
func fork(what string, fds []int, how *syscall.SysProcAttr) (int, error) {
	files := make([]uintptr, len(fds))
	for i, fd := range fds {
		files[i] = uintptr(fd)
	}
	return syscall.ForkExec("/proc/self/exe", []string{confine.Name, what}, &syscall.ProcAttr{Env: []string{"GOMAXPROCS=1"}, Files: files, Sys: how})
}

// kill signals the main process; what it leaves behind is swept when it has ended.
func (k linux) kill(v *service, sig unix.Signal) { unix.Kill(v.pid, sig) }

func (k linux) sweep(v *service) {
	events, _ := os.ReadFile(v.dir() + "/cgroup.events")
	if !v.KillProcess && strings.Contains(string(events), "populated 1") {
		os.WriteFile(v.dir()+"/cgroup.kill", []byte("1"), 0)
		v.killed = true
	}
}

// renew makes a control group anew in which cgroup.kill was used. Linux up to 6.12 at least kills what is cloned straight
// into such a group, for good: it compares the group's count of kills with that of the parent's group.
func (v *service) renew() error {
	if !v.killed {
		return nil
	}
	unix.Close(v.cgroup)
	v.cgroup = -1
	if err := removeGroup(v.dir()); err != nil { // something in it is still dying
		return err
	}
	v.killed = false
	return v.limit()
}

func removeGroup(dir string) error {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroup(dir + "/" + e.Name()); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}

func (v *service) dir() string { return cgroups + "/" + v.Name }

func (k linux) wait() (pid int, status unix.WaitStatus) {
	pid, _ = unix.Wait4(-1, &status, unix.WNOHANG, nil)
	return pid, status
}

// hold has a process set up a mount namespace and returns a descriptor of it, which keeps it after that process.
func hold(name string) (int, error) {
	var ready, stay [2]int
	if err := unix.Pipe2(ready[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(ready[0])
	if err := unix.Pipe2(stay[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(stay[1])
	pid, err := fork(confine.Namespace+name, []int{0, 1, 2, ready[1], stay[0]}, &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS})
	unix.Close(ready[1])
	unix.Close(stay[0])
	if err != nil {
		return 0, err
	}
	poll := []unix.PollFd{{Fd: int32(ready[0]), Events: unix.POLLIN}}
	unix.Poll(poll, int(holdLimit.Milliseconds()))
	if poll[0].Revents&unix.POLLIN == 0 {
		unix.Kill(pid, unix.SIGKILL)
		return 0, errors.New("it was not set up")
	}
	return unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}
