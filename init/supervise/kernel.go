package supervise

import (
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/confine"
	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

const (
	root    = "/sys/fs/cgroup"
	cgroups = root + "/bulkhead"
	backlog = 4096
)

// linux is the kernel itself.
type linux struct{ null int }

// New makes what units need before any of them runs, and returns their supervisor. What cannot be made is told: a unit that
// lacks something does not start, which is better than a machine that does not.
//
// feed is called each second, and report at the start, when the late units are started, and each minute: neither may block.
func New(units []unit.Unit, feed, report func()) (*Supervisor, error) {
	var k linux
	var err error
	if k.null, err = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return nil, os.NewSyscallError("open /dev/null", err)
	}
	complain := func(what string, err error) {
		if err != nil {
			console.Say(what, ": ", err.Error())
		}
	}
	complain("bulkhead: control groups", delegate())
	var services []*service
	for i := range units {
		v := &service{Unit: &units[i]}
		services = append(services, v)
		complain("unit "+v.Name, v.prepare())
	}
	s, err := newSupervisor(services, k, unit.InitSocket)
	if err != nil {
		return nil, err
	}
	s.feed, s.report = feed, report
	s.hearSignals()
	return s, nil
}

// hearSignals wakes the loop at the end of a process. Go ends a process on most signals that it is not told to hand over, and PID 1
// must not end. To ignore them would be no help: that is inherited.
func (s *Supervisor) hearSignals() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE, unix.SIGPWR)
	go func() {
		for range c {
			s.nudge()
		}
	}()
}

// delegate hands the controllers that there are down to the units' control groups.
func delegate() error {
	f := console.First{Err: os.Mkdir(cgroups, 0o755)}
	for _, dir := range []string{root, cgroups} {
		f.Try("controllers", handDown(dir))
	}
	return f.Err
}

func handDown(dir string) error {
	var f console.First
	have, err := os.ReadFile(dir + "/cgroup.controllers")
	f.Try("controllers", err)
	for _, c := range strings.Fields(string(have)) {
		f.Try("controllers", os.WriteFile(dir+"/cgroup.subtree_control", []byte("+"+c), 0))
	}
	return f.Err
}

// prepare makes what a unit keeps over all its lives.
func (v *service) prepare() error {
	var f console.First
	if v.Runtime != 0 {
		dir := unit.RunDir + "/" + v.Name
		f.Try("folder", os.Mkdir(dir, 0o700))
		// Each is a file system of its own: who is shown one cannot come from there to another, nor fill it.
		f.Try("mount "+dir, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,size=64m"))
		f.Try("folder", os.Chown(dir, int(v.UID), int(v.UID)))
		f.Try("folder", os.Chmod(dir, fs.FileMode(v.Runtime)))
	}
	for _, l := range v.Listen {
		fd, err := listen(l, unit.SocketDir+"/"+v.Name+".sock")
		f.Try("listen on "+l, err)
		v.listen = append(v.listen, fd)
	}
	var err error
	v.log, err = newLog()
	f.Try("log", err)
	if v.Inside == "" { // else it is made for each process anew
		f.Try("control group", v.limit())
	}
	v.broken = f.Err
	return f.Err
}

func (v *service) dir() string { return cgroups + "/" + v.Group() }

// limit makes the unit's control group.
func (v *service) limit() error {
	f := console.First{Err: os.Mkdir(v.dir(), 0o755)}
	if v.KillProcess && f.Err != nil && v.Inside != "" { // what it left lives on in there
		f.Err = nil
	}
	for file, value := range map[string]uint64{"memory.max": v.MemoryMax, "pids.max": v.PidsMax, "cpu.weight": v.CPUWeight} {
		if value != 0 {
			f.Try("limit", os.WriteFile(v.dir()+"/"+file, []byte(strconv.FormatUint(value, 10)), 0))
		}
	}
	var err error
	v.cgroup, err = unix.Open(v.dir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	f.Try("open", err)
	return f.Err
}

// listen opens a listener. PID 1 keeps it, so that callers wait in its backlog while the unit is started again.
func listen(what, path string) (int, error) {
	var f console.First
	family, addr := unix.AF_UNIX, unix.Sockaddr(&unix.SockaddrUnix{Name: path})
	kind, port, tcp := strings.Cut(what, ":")
	if tcp {
		n, err := strconv.ParseUint(port, 10, 16)
		f.Try("port", err)
		family, addr = unix.AF_INET6, &unix.SockaddrInet6{Port: int(n)}
		if kind == "loopback" {
			family, addr = unix.AF_INET, &unix.SockaddrInet4{Port: int(n), Addr: [4]byte{127, 0, 0, 1}}
		}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	f.Try("socket", err)
	if family == unix.AF_INET6 {
		f.Try("IPv4", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0))
	} else if family == unix.AF_INET { // lo is not up yet: networkd is one of the units
		f.Try("free bind", unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_FREEBIND, 1))
	}
	if tcp {
		f.Try("reuse", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	}
	f.Try("bind", unix.Bind(fd, addr))
	if !tcp {
		f.Try("mode", unix.Chmod(path, 0o666))
	}
	f.Try("listen", unix.Listen(fd, backlog))
	return fd, f.Err
}

func (k linux) spawn(v *service, ready int) (int, error) {
	if v.killed || v.Holds || v.Inside != "" {
		v.broken = v.renew()
	}
	if v.broken != nil {
		return 0, v.broken
	}
	if ready < 0 {
		ready = k.null
	}
	fds := append([]int{k.null, v.log.write, v.log.write, ready}, v.listen...)
	if v.Console {
		fd, err := unix.Open("/dev/console", unix.O_WRONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	flags := uintptr(unix.CLONE_NEWNS)
	if v.Holds {
		flags |= unix.CLONE_NEWPID
	}
	if v.Inside != "" {
		holder, tell, err := v.visit()
		if err != nil {
			return 0, err
		}
		defer unix.Close(holder)
		defer unix.Close(tell)
		flags, fds = 0, append(fds, holder, tell)
	}
	if v.Network == "none" {
		flags |= unix.CLONE_NEWNET
	}
	files := make([]uintptr, len(fds))
	for i, fd := range fds {
		files[i] = uintptr(fd)
	}
	return syscall.ForkExec("/proc/self/exe", []string{confine.Name, v.Name}, &syscall.ProcAttr{Env: []string{"GOMAXPROCS=1"}, Files: files,
		Sys: &syscall.SysProcAttr{Setsid: true, Cloneflags: flags, UseCgroupFD: true, CgroupFD: v.cgroup}})
}

// visit opens what the trampoline of a unit that lives inside needs: its holder, and a pipe to say in which process the unit is.
func (v *service) visit() (holder, tell int, err error) {
	var f console.First
	var pipe [2]int
	holder, err = unix.PidfdOpen(v.holder.pid, 0)
	f.Try("find "+v.Inside, err)
	if f.Err == nil {
		f.Try("pipe", unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	}
	v.told = pipe[0]
	return holder, pipe[1], f.Err
}

// learn takes note of the process that a unit's trampoline made inside, and says whether it has just been told: from then on that process is
// the unit's.
func (v *service) learn() bool {
	if v.told == 0 {
		return false
	}
	var b [16]byte
	n, err := unix.Read(v.told, b[:])
	if err == unix.EAGAIN || err == unix.EINTR {
		return false
	}
	unix.Close(v.told)
	v.told = 0
	pid, err := strconv.Atoi(string(b[:max(n, 0)]))
	if err == nil {
		v.pid = pid
	}
	return err == nil
}

func (k linux) kill(v *service, sig unix.Signal) {
	v.learn()
	if v.Holds { // it hears nothing else
		sig = unix.SIGKILL
	}
	unix.Kill(v.pid, sig)
}

func (k linux) sweep(v *service) {
	memory, _ := os.ReadFile(v.dir() + "/memory.events") // before the group is made anew, and its counts with it
	kills := memoryKills(string(memory))
	if kills > v.kills && v.end == initctl.Killed && v.value == uint8(unix.SIGKILL) {
		v.end = initctl.Exhausted
	}
	v.kills = kills
	events, _ := os.ReadFile(v.dir() + "/cgroup.events")
	if !v.KillProcess && strings.Contains(string(events), "populated 1") {
		os.WriteFile(v.dir()+"/cgroup.kill", []byte("1"), 0)
		v.killed = true
	}
}

// memoryKills is how many processes the kernel has killed for a group's limit, by its memory.events.
func memoryKills(events string) int {
	_, rest, _ := strings.Cut(events, "\noom_kill ")
	digits, _, _ := strings.Cut(rest, "\n")
	n, _ := strconv.Atoi(digits)
	return n
}

// renew makes a control group anew in which cgroup.kill was used. Linux, 6.12 at least, kills whatever is cloned straight into
// such a group ever after: it compares the group's count of kills with that of the parent's group. In a holder's groups others may have
// used it. A holder's own group handed controllers down, and takes no process any more.
func (v *service) renew() error {
	if err := removeGroup(v.dir()); err != nil && err != unix.ENOENT && !v.KillProcess { // something in it is still dying
		return err
	}
	if v.cgroup > 0 {
		unix.Close(v.cgroup)
	}
	v.cgroup, v.killed, v.kills = 0, false, 0
	var f console.First
	if v.Inside != "" {
		f.Try("control group", handDown(v.holder.dir()))
	}
	f.Try("control group", v.limit())
	return f.Err
}

func removeGroup(dir string) error {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeGroup(dir + "/" + e.Name())
		}
	}
	return unix.Rmdir(dir)
}

func (k linux) wait() (pid int, status unix.WaitStatus) {
	pid, _ = unix.Wait4(-1, &status, unix.WNOHANG, nil)
	return pid, status
}
