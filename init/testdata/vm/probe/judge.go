package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

const sock = "/run/bulkhead/sock/"

var console = os.NewFile(4, "console")

func expect(ok bool, what string, got ...any) {
	word := "ok"
	if !ok {
		word = "WRONG"
	}
	fmt.Fprintln(console, "TEST", word, what, fmt.Sprint(got...))
}

func judge() {
	ready()
	c := must(initctl.Dial(""))
	if os.Getenv("BULKHEAD_UNIT") != "judge" {
		panic("wrong unit")
	}
	seen := make(chan initctl.Status, 10000)
	go func() { fmt.Println(c.Watch(context.Background(), func(s initctl.Status) { seen <- s })) }()
	until := func(what string, limit time.Duration, ok func(s initctl.Status) bool) initctl.Status {
		for end := time.After(limit); ; {
			select {
			case s := <-seen:
				if ok(s) {
					return s
				}
			case <-end:
				expect(false, what, "not within ", limit)
				return initctl.Status{}
			}
		}
	}
	state := func(name string) initctl.Status {
		for _, s := range must(c.Status()) {
			if s.Name == name {
				return s
			}
		}
		return initctl.Status{}
	}
	wait := func(name, want string) initctl.Status {
		for range 300 {
			if s := state(name); s.State == want {
				return s
			}
			time.Sleep(20 * time.Millisecond)
		}
		expect(false, name+" is not "+want, state(name))
		return initctl.Status{}
	}

	if strings.Contains(must(readAll("/proc/cmdline")), "test.freeze") {
		fmt.Fprintln(console, "TEST PID 1 is stopped now")
		c.Start("freezer")
		select {}
	}
	if strings.Contains(must(readAll("/proc/cmdline")), "test.nolandlock") { // a kernel that lacks what a unit needs
		until("caged does not start", 20*time.Second, func(s initctl.Status) bool {
			return s.Name == "caged" && s.LastExit == "exit 126: it could not be confined"
		})
		text := read(must(c.Logs("caged")))
		expect(strings.HasPrefix(text, "confine caged: landlock: operation not supported\n") && !strings.Contains(text, "\ncaged:"), "and says why", text)
		wait("plain", "up")
		fmt.Fprintln(console, "TEST done")
		c.Reboot()
		select {}
	}
	plain := wait("plain", "up")
	confined(plain.PID)
	answer := ask()
	for _, want := range []string{
		`argv=["plain" "plain" "argument"] env=["PATH=/usr/sbin:/usr/bin:/sbin:/bin" "BULKHEAD_UNIT=plain" "BULKHEAD_FDS=unix,tcp:50000,console" "EXTRA=1"]`,
		" links=1", " share=0,<nil>", " fd0=/dev/null", " nofile=512", " umask=077", " wd=/", fmt.Sprint(" sid=", plain.PID),
	} {
		expect(strings.Contains(answer, want), "plain says", want)
	}
	fmt.Fprintln(console, "TEST note", answer)
	fmt.Fprintln(console, "TEST note RSS of PID 1:", field(1, "VmRSS"), field(1, "RssAnon"), field(1, "RssFile"), "threads", field(1, "Threads"), "fds", len(must(os.ReadDir("/proc/1/fd"))))

	// Killed: the next call is answered by the next process.
	for _, limit := range []time.Duration{time.Second, 2 * time.Second, 3 * time.Second} {
		expect(unix.Kill(plain.PID, unix.SIGKILL) == nil, "kill plain")
		start := time.Now()
		again := ask()
		took := time.Since(start)
		expect(!strings.Contains(again, fmt.Sprintf("pid=%d ", plain.PID)) && took < limit, "plain serves again after", took)
		plain = wait("plain", "up")
	}
	expect(plain.LastExit == "killed by SIGKILL" && plain.Restarts == 3, "plain's record", plain)
	until("watch shows the restart", 5*time.Second, func(s initctl.Status) bool { return s.Name == "plain" && s.Restarts == 3 && s.State == "up" })

	// Logs.
	log := must(c.Logs("plain"))
	text := read(log)
	expect(strings.Count(text, "plain runs as") == 4, "plain's log has every life", strings.Count(text, "plain runs as"))
	log = must(c.Logs("plain"))
	start := time.Now()
	log.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	_, err := log.Read(make([]byte, 1))
	expect(errors.Is(err, os.ErrDeadlineExceeded) && time.Since(start) < time.Second, "reading a log can be ended", err)
	log.Close()
	wait("loud", "up")
	text = read(must(c.Logs("loud")))
	expect(strings.Contains(text, "all written") && len(text) <= 1<<20, "loud was not held up", len(text))
	expect(strings.Contains(read(must(c.Logs("bare"))), "fd3=/dev/null"), "bare has no ready pipe")

	// Mounts.
	wait("mounter", "up")
	text = read(must(c.Logs("mounter")))
	expect(strings.Contains(text, "mounts state: <nil> <nil>") && strings.Contains(text, "mounts a disk: <nil> <nil>") && strings.Contains(text, "sees share: 0"), "mounter", text)
	_, err = os.Stat("/state/.mounted")
	expect(err == nil, "a mount on a volume is seen here", err)
	_, err = os.Stat("/proc/1/root/state/.mounted")
	expect(err == nil, "and by PID 1", err)
	_, err = os.Stat("/proc/1/root/tmp/private")
	expect(err != nil, "no other is", err)
	share := must(os.ReadDir("/usr/share"))
	expect(len(share) > 0, "hidden folders are hidden for one only", len(share))

	// The workload side: who lives there waits for it.
	expect(state("work-a").State == "waiting" && state("work-a").Restarts == 0, "work-a waits", state("work-a"))
	must(0, os.WriteFile("/run/bulkhead/judge/mine", nil, 0o600))
	expect(c.Start("workload") == nil, "start workload")
	inside(wait("workload", "up").PID, "workload", "/hold")
	var before []initctl.Status
	for _, name := range []string{"work-a", "work-b", "prowler"} {
		before = append(before, wait(name, "up"))
		inside(state(name).PID, name, "/"+name)
		expect(state(name).Restarts == 0, name+" was started once", state(name))
	}
	prowled := func() {
		text := read(must(c.Logs("prowler")))
		expect(strings.Count(text, "prowl ok") > 30, "the prowler prowls", strings.Count(text, "prowl ok"))
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, "prowl ok") {
				expect(false, "the prowler:", line)
			}
		}
	}
	prowled()
	expect(must(readAll("/sys/fs/cgroup/bulkhead/workload/work-b/memory.max")) == "67108864\n", "work-b's memory")
	// The holder's end is everybody's, and everybody comes back.
	holder := state("workload")
	unix.Kill(holder.PID, unix.SIGTERM)
	time.Sleep(100 * time.Millisecond)
	expect(state("workload").PID == holder.PID, "the holder hears nothing", state("workload"))
	unix.Kill(holder.PID, unix.SIGKILL)
	until("the holder comes back", 5*time.Second, func(s initctl.Status) bool { return s.Name == "workload" && s.State == "up" && s.PID != holder.PID })
	for _, b := range before {
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if s := state(b.Name); s.State == "up" && s.PID != b.PID {
				break
			}
		}
		expect(state(b.Name).State == "up" && state(b.Name).PID != b.PID, b.Name+" comes back with it", state(b.Name))
		expect(state(b.Name).LastExit == "killed by SIGKILL" && state(b.Name).Restarts == 1, b.Name+" ended with its holder", state(b.Name))
		inside(state(b.Name).PID, b.Name, "/"+b.Name)
	}
	prowled()
	text = read(must(c.Logs("work-a"))) + read(must(c.Logs("work-b")))
	expect(strings.Count(text, "found nothing, mounts: <nil>") == 2 && strings.Count(text, "sees the volume: <nil>") == 4, "each life of workload has mounts of its own", text)
	a := state("work-a")
	unix.Kill(a.PID, unix.SIGKILL)
	b := state("work-b")
	unix.Kill(b.PID, unix.SIGKILL)
	for _, was := range []initctl.Status{a, b} {
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && state(was.Name).PID == was.PID; {
			time.Sleep(20 * time.Millisecond)
		}
		expect(wait(was.Name, "up").PID != was.PID, was.Name+" comes back by itself", state(was.Name))
	}
	text = read(must(c.Logs("work-a"))) + read(must(c.Logs("work-b")))
	expect(strings.Count(text, "found what was mounted before") == 2, "workload's mounts outlive both", text)
	_, err = os.Stat("/tmp/kept")
	expect(err != nil, "and are not here", err)
	_, err = os.Stat("/run/bulkhead/judge/mine")
	expect(err == nil, "what is inside cannot take folders away here", err)
	expect(c.Stop("work-b") == nil && wait("work-b", "down").LastExit == "exit 0", "work-b is asked to end", state("work-b"))
	expect(c.Start("work-b") == nil && wait("work-b", "up").PID != 0, "start work-b")
	expect(strings.Contains(field(state("work-a").PID, "CapEff"), "1ffffffffff") && field(state("work-b").PID, "CapEff") == "0000000000200001" &&
		field(state("work-b").PID, "CapBnd") == "0000000000200001" && field(state("work-b").PID, "NoNewPrivs") == "1", "capabilities of root units", field(state("work-b").PID, "CapEff"))

	// Files and system calls.
	until("caged is ended", 20*time.Second, func(s initctl.Status) bool {
		return s.Name == "caged" && s.LastExit == "killed by SIGSYS: a system call that its unit does not allow"
	})
	expect(c.Stop("caged") == nil && wait("caged", "down").State == "down", "stop caged")
	text = read(must(c.Logs("caged")))
	expect(strings.Contains(text, "caged: true false true <nil> true") && !strings.Contains(text, "not ended"), "caged is refused", text)
	kernel := make([]byte, 1<<20)
	n := must(unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, kernel))
	expect(regexp.MustCompile(`type=1326 .*comm="probe".* syscall=162 `).Match(kernel[:n]), "the kernel's log names the call")

	// Policies.
	expect(state("ends").State == "down" && state("ends").LastExit == "exit 125", "ends stays down", state("ends"))
	expect(state("missing").State == "down", "missing stays down", state("missing"), read(must(c.Logs("missing"))))
	expect(c.Start("fails") == nil, "start fails")
	time.Sleep(time.Second)
	fails := state("fails")
	expect(fails.Restarts >= 2 && fails.Restarts <= 5 && fails.LastExit == "exit 1", "fails is tried again", fails)
	expect(c.Stop("fails") == nil && wait("fails", "down").State == "down", "stop fails")
	expect(c.Start("never") == nil, "start never")
	until("never is killed, for it is not ready", 5*time.Second, func(s initctl.Status) bool { return s.Name == "never" && s.LastExit == "killed by SIGKILL" })
	expect(c.Stop("never") == nil && wait("never", "down").State == "down", "stop never")
	expect(c.Start("leaver") == nil, "start leaver")
	until("leaver is started again, though it leaves something", 10*time.Second, func(s initctl.Status) bool { return s.Name == "leaver" && s.Restarts == 3 })
	expect(c.Stop("leaver") == nil && wait("leaver", "down").LastExit != "killed by SIGKILL", "stop leaver", state("leaver"))
	time.Sleep(200 * time.Millisecond)
	procs, err := readAll("/sys/fs/cgroup/bulkhead/leaver/cgroup.procs")
	expect(err == nil && procs == "", "nothing of leaver is left", procs, err)
	old := state("plain")
	expect(c.Restart("plain") == nil, "restart plain")
	until("plain comes back", 5*time.Second, func(s initctl.Status) bool { return s.Name == "plain" && s.State == "up" && s.PID != old.PID })
	expect(state("plain").Restarts == 3, "a restart that was asked for is not counted")

	// The control socket.
	expect(errors.Is(c.Start("nobody"), initctl.NotFound), "no such unit")
	garbage()
	expect(len(must(c.Status())) == 17, "all units", len(must(c.Status())))
	id := must(readAll("/etc/machine-id"))
	expect(regexp.MustCompile("^[0-9a-f]{32}\n$").MatchString(id), "machine id", id)
	fw, err := os.Stat("/run/bulkhead/claim-key")
	expect(err == nil && fw.Mode() == 0o400 && fw.Size() == 9, "claim key", err)
	expect(strings.TrimSpace(must(readAll("/proc/sys/net/ipv4/ip_forward"))) == "1", "a kernel parameter")
	expect(time.Now().Year() >= 2024, "the time", time.Now())
	fmt.Fprintln(console, "TEST note RSS of PID 1:", field(1, "VmRSS"), field(1, "RssAnon"), field(1, "RssFile"), "threads", field(1, "Threads"), "fds", len(must(os.ReadDir("/proc/1/fd"))))
	fmt.Fprintln(console, "TEST done")
	if strings.Contains(must(readAll("/proc/cmdline")), "test.off") {
		c.PowerOff()
	} else {
		c.Reboot()
	}
	select {}
}

// inside looks at a process of the workload side from outside: PID 1 knows it by its number here, and it has another one there.
func inside(pid int, name, group string) {
	proc := fmt.Sprintf("/proc/%d/", pid)
	expect(argv0("/proc", pid) == name, name+" is its unit's process", argv0("/proc", pid))
	expect(len(strings.Fields(field(pid, "NSpid"))) == 2, name+" has a number of its own in there", field(pid, "NSpid"))
	expect(field(pid, "PPid") == "1", name+"'s parent is PID 1", field(pid, "PPid"))
	expect(must(readAll(proc+"cgroup")) == "0::/bulkhead/workload"+group+"\n", name+"'s control group", must(readAll(proc+"cgroup")))
	for _, ns := range []string{"mnt", "pid", "cgroup"} {
		expect(must(os.Readlink(proc+"ns/"+ns)) != must(os.Readlink("/proc/1/ns/"+ns)), name+"'s namespace", ns)
	}
	for _, fd := range must(os.ReadDir(proc + "fd")) {
		to, _ := os.Readlink(proc + "fd/" + fd.Name())
		expect(name != "workload" && name != "work-b" || fd.Name() == "0" || strings.HasPrefix(to, "pipe:") || strings.HasPrefix(to, "anon_inode:[event") || strings.HasPrefix(to, "/sys/fs/cgroup/"), name+" has no descriptor that leads out", fd.Name(), to)
	}
}

// confined looks at plain from outside.
func confined(pid int) {
	for name, want := range map[string]string{
		"Uid": "104\t104\t104\t104", "Gid": "104\t104\t104\t104", "Groups": "109", "NoNewPrivs": "1", "Umask": "0077",
		"CapInh": "0000008000001000", "CapPrm": "0000008000001000", "CapEff": "0000008000001000", "CapBnd": "0000008000001000", "CapAmb": "0000008000001000",
	} {
		expect(field(pid, name) == want, "plain's "+name, field(pid, name))
	}
	proc := fmt.Sprintf("/proc/%d/", pid)
	for _, ns := range []string{"mnt", "net"} {
		expect(must(os.Readlink(proc+"ns/"+ns)) != must(os.Readlink("/proc/1/ns/"+ns)), "plain's namespace", ns)
	}
	expect(must(readAll(proc+"cgroup")) == "0::/bulkhead/plain\n", "plain's control group")
	expect(must(readAll("/sys/fs/cgroup/bulkhead/plain/memory.max")) == "67108864\n", "plain's memory")
	expect(must(readAll("/sys/fs/cgroup/bulkhead/plain/pids.max")) == "32\n", "plain's pids")
	expect(must(readAll(proc+"oom_score_adj")) == "-500\n", "plain's oom score")
	fi := must(os.Stat("/run/bulkhead/plain"))
	expect(fi.Mode().Perm() == 0o750, "plain's folder", fi.Mode())
}

func ask() string {
	conn := must(net.Dial("unix", sock+"plain.sock"))
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	return string(must(io.ReadAll(conn)))
}

// garbage sends what PID 1 must not fall over, and keeps too many connections open.
func garbage() {
	open := func() int {
		fd := must(unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0))
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: sock + "init.sock"}); err != nil {
			panic(err)
		}
		return fd
	}
	buf := make([]byte, 200)
	for _, size := range []int{1, 39, 40, 41, 60000} {
		fd := open()
		unix.Write(fd, make([]byte, size))
		n, _ := unix.Read(fd, buf)
		end, err := unix.Read(fd, buf[100:])
		expect(n == initctl.RecordSize && initctl.Code(buf[0]) == initctl.Invalid && end == 0 && err == nil, "garbage of", size, n, end, err)
		unix.Close(fd)
	}
	var all []int
	refused := 0
	for range 80 {
		fd := open()
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000})
		if n, _ := unix.Read(fd, buf); n == initctl.RecordSize && initctl.Code(buf[0]) == initctl.Busy {
			refused++
		}
		all = append(all, fd)
	}
	expect(refused > 60, "too many connections are refused", refused)
	for _, fd := range all {
		unix.Close(fd)
	}
}

func field(pid int, name string) string {
	text := must(readAll(fmt.Sprintf("/proc/%d/status", pid)))
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func readAll(path string) (string, error) {
	b, err := os.ReadFile(path)
	return string(b), err
}

// read takes what a log pipe holds now.
func read(f *os.File) string {
	defer f.Close()
	var b strings.Builder
	buf := make([]byte, 1<<16)
	for {
		f.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := f.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			return b.String()
		}
	}
}
