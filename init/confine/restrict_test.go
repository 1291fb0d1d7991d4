package confine

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

// The test's program is started again, confines itself as a unit named in the environment, and then is that unit.
const (
	wordConfine = "BULKHEAD_TEST_CONFINE"
	wordUnit    = "BULKHEAD_TEST_UNIT"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(wordConfine) != "":
		runtime.LockOSThread()
		u, err := testUnit(os.Getenv(wordConfine))
		if err == nil {
			err = restrict(&u)
		}
		if err == nil {
			err = unix.Exec(u.Exec[0], u.Exec, []string{wordUnit + "=" + os.Getenv(wordConfine), "DIR=" + os.Getenv("DIR")})
		}
		fmt.Println("not started:", err)
		os.Exit(3)
	case os.Getenv(wordUnit) != "":
		os.Exit(probe(os.Getenv(wordUnit)))
	}
	os.Exit(m.Run())
}

// testUnit is a small daemon that may use one folder, as the generator would hand it over.
func testUnit(what string) (unit.Unit, error) {
	dir := os.Getenv("DIR")
	u, err := unitfile.Parse(fmt.Appendf(nil, `{"name": "x", "exec": [%q], "user": "root", "network": "host", "restart": "never",
		"syscalls": ["@basic", "@read", "@write", "@net", "getppid"], "sockets": ["inet"], "read": ["/dev/zero", %q], "write": [%q], "bind": [0]}`, os.Args[0], dir+"/read", dir+"/write"))
	if err != nil {
		return u, err
	}
	u.Filter, err = unitfile.Filter(u, false)
	u.Landlock, u.Rules = unitfile.Landlock(u)
	switch what {
	case "no such rule": // as on a kernel that knows fewer
		u.Landlock[0] |= 1 << 40
	case "no such scope":
		u.Landlock[2] |= 1 << 40
	case "broken filter":
		u.Filter = u.Filter[:1]
	}
	return u, err
}

// probe is what the unit does, and returns its exit code.
func probe(what string) int {
	dir := os.Getenv("DIR")
	switch what {
	case "files":
		_, read := os.ReadFile(dir + "/read/file")
		_, other := os.ReadFile(dir + "/other/file")
		_, device := os.ReadFile("/dev/full")
		fmt.Println(errors.Is(read, nil), errors.Is(other, os.ErrPermission), errors.Is(device, os.ErrPermission),
			errors.Is(os.WriteFile(dir+"/read/file", nil, 0o600), os.ErrPermission), os.WriteFile(dir+"/write/file", []byte("x"), 0o600) == nil,
			errors.Is(unix.Exec("/bin/true", []string{"true"}, nil), unix.EACCES))
	case "ports":
		s, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		fmt.Println(unix.Bind(s, &unix.SockaddrInet4{Port: 7}) == unix.EACCES, unix.Connect(s, &unix.SockaddrInet4{Port: 7, Addr: [4]byte{127, 0, 0, 1}}) == unix.EACCES,
			unix.Bind(s, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	case "signals":
		_, _, errno := syscall.RawSyscall(unix.SYS_TGKILL, uintptr(unix.Getppid()), uintptr(unix.Getppid()), 0)
		fmt.Println(errno)
	case "reboot":
		unix.Sync()
	case "family":
		_, _ = unix.Socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0)
	case "process":
		_, _, _ = syscall.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
	case "code":
		_, _ = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	}
	return 0
}

// TestRestrict applies a unit's rules and filter on this kernel.
func TestRestrict(t *testing.T) {
	if _, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, 1); errno != 0 {
		t.Skipf("this kernel has no Landlock: %v", errno)
	}
	dir := t.TempDir()
	// This one may be linked with libraries, which a unit must not load.
	program := filepath.Join(dir, "program")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	for _, d := range []string{"read", "write", "other"} {
		if err := errors.Join(os.Mkdir(filepath.Join(dir, d), 0o700), os.WriteFile(filepath.Join(dir, d, "file"), []byte(d), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		what, says string
		killed     bool
		code       int
	}{
		{"files", "true true true true true true", false, 0},
		{"ports", "true true <nil>", false, 0},
		{"signals", "operation not permitted", false, 0},
		{"reboot", "", true, 0},
		{"family", "", true, 0},
		{"process", "", true, 0},
		{"code", "", true, 0},
		{"no such rule", "not started: landlock: invalid argument", false, 3},
		{"no such scope", "not started: landlock: invalid argument", false, 3},
		{"broken filter", "not started: filter system calls: invalid argument", false, 3},
	} {
		cmd := exec.Command(program)
		cmd.Env = []string{wordConfine + "=" + c.what, "DIR=" + dir}
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		status := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if got := strings.TrimSpace(string(out)); got != c.says || c.killed != (status.Signaled() && status.Signal() == unix.SIGSYS) || !c.killed && status.ExitStatus() != c.code {
			t.Errorf("%s: says %q, ended with %v, want %q, killed %v\n%s", c.what, got, cmd.ProcessState, c.says, c.killed, stderr.String())
		}
	}
}
