// Command probe is every unit of the VM test: what it plays is its first argument. The judge looks at the others from outside
// and prints what it finds on the console, one line each: "TEST ok ..." or "TEST WRONG ...".
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	switch os.Args[1] {
	case "judge":
		judge()
	case "plain":
		plain()
	case "bare":
		fmt.Println("bare:", self())
		wait()
	case "work":
		work()
	case "prowl":
		prowl()
	case "mounter":
		mounter()
	case "loud":
		loud()
	case "caged":
		caged()
	case "freezer":
		freeze(1)
		wait()
	case "exit":
		var code int
		fmt.Sscan(os.Args[2], &code)
		fmt.Println("exits with", code)
		os.Exit(code)
	case "leaver": // ends, but leaves a process behind
		must(os.StartProcess("/usr/lib/probe", []string{"left", "silent"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}}))
		time.Sleep(100 * time.Millisecond)
		os.Exit(1)
	case "silent": // never ready, and does not end
		signal.Ignore(syscall.SIGTERM)
		time.Sleep(time.Hour)
	}
}

func ready() {
	f := os.NewFile(3, "ready")
	f.WriteString("\n")
	f.Close()
}

// freeze holds a process: it is not scheduled any more.
func freeze(pid int) {
	const group = "/sys/fs/cgroup/frozen"
	if err := errors.Join(os.Mkdir(group, 0o755), os.WriteFile(group+"/cgroup.procs", fmt.Append(nil, pid), 0), os.WriteFile(group+"/cgroup.freeze", []byte("1"), 0)); err != nil {
		panic(err)
	}
}

func wait() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
	fmt.Println("asked to end")
}

// plain answers on its socket with what it knows about itself.
func plain() {
	fmt.Println("plain runs as", os.Getpid())
	l, err := net.FileListener(os.NewFile(4, "unix"))
	if err != nil {
		panic(err)
	}
	t, err := net.FileListener(os.NewFile(5, "tcp"))
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(os.NewFile(6, "console"), "TEST ok plain writes to the console; its TCP listener is", t.Addr())
	must(0, os.WriteFile("/run/bulkhead/plain/hello", []byte("hello"), 0o644))
	ready()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				panic(err)
			}
			io.WriteString(c, self())
			c.Close()
		}
	}()
	wait()
}

// self is what a process sees of itself.
func self() string {
	var b strings.Builder
	fmt.Fprintf(&b, "pid=%d argv=%q env=%q", os.Getpid(), os.Args, os.Environ())
	ifs, _ := net.Interfaces()
	fmt.Fprintf(&b, " links=%d", len(ifs))
	hidden, err := os.ReadDir("/usr/share")
	fmt.Fprintf(&b, " share=%d,%v", len(hidden), err)
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		to, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		fmt.Fprintf(&b, " fd%s=%s", fd.Name(), to)
	}
	var files unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &files)
	wd, _ := os.Getwd()
	fmt.Fprintf(&b, " nofile=%d umask=%#o wd=%s sid=%d", files.Max, unix.Umask(0), wd, must(unix.Getsid(0)))
	return b.String()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// work mounts something when it finds nothing mounted, and says what it found.
func work() {
	if _, err := os.Stat("/tmp/kept"); err != nil {
		fmt.Println("found nothing, mounts:", unix.Mount("tmpfs", "/tmp", "tmpfs", 0, ""), os.WriteFile("/tmp/kept", nil, 0o600))
	} else {
		fmt.Println("found what was mounted before")
	}
	_, err := os.Stat("/var/written")
	fmt.Println("sees the volume:", err)
	if os.Getenv("BULKHEAD_UNIT") == "work-a" { // a pod
		os.MkdirAll("/sys/fs/cgroup/kubepods/pod", 0o755)
		p := must(os.StartProcess("/usr/lib/probe", []string{"pod", "bare"}, &os.ProcAttr{}))
		fmt.Println("pod:", os.WriteFile("/sys/fs/cgroup/kubepods/pod/cgroup.procs", fmt.Append(nil, p.Pid), 0))
	}
	ready()
	wait()
}

// mounter mounts on a volume, as storaged does.
func mounter() {
	fmt.Println("mounts state:", unix.Mount("tmpfs", "/state", "tmpfs", 0, "mode=0755"), os.WriteFile("/state/.mounted", nil, 0o644))
	fmt.Println("mounts a disk:", unix.Mount("/dev/vdb", "/var", "ext4", 0, ""), os.WriteFile("/var/written", []byte("x"), 0o644))
	fmt.Println("mounts elsewhere:", unix.Mount("tmpfs", "/tmp", "tmpfs", 0, ""), os.WriteFile("/tmp/private", nil, 0o644))
	hidden, err := os.ReadDir("/usr/share")
	fmt.Println("sees share:", len(hidden), err)
	ready()
	wait()
}

// loud writes far more than its pipe holds.
func loud() {
	line := strings.Repeat("x", 99) + "\n"
	for range 30000 {
		os.Stdout.WriteString(line)
	}
	fmt.Println("all written")
	ready()
	for range time.Tick(time.Second) {
		fmt.Println("tick")
	}
}

// caged tries what its unit does not give it: what Landlock and its /proc refuse, and then a system call, which ends it.
func caged() {
	_, share := os.ReadFile("/usr/share/something")
	_, id := os.ReadFile("/etc/machine-id")
	_, first := os.Stat("/proc/1")
	_, own := os.ReadFile("/proc/self/status")
	fmt.Println("caged:", errors.Is(share, os.ErrPermission), errors.Is(id, os.ErrPermission), errors.Is(first, os.ErrNotExist), own,
		unix.Exec("/sbin/init", []string{"init"}, nil) == unix.EACCES)
	ready()
	time.Sleep(time.Second) // so that it is seen to be up
	unix.Sync()
	fmt.Println("caged: not ended")
	wait()
}
