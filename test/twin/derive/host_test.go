package derive

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/confine"
	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
	"github.com/bulkhead-os/bulkhead/test/twin"
)

// twinKey is the environment's word for this program when it is to become a unit's twin; builtKey says where that program is.
const (
	twinKey  = "BULKHEAD_HOST_TWIN"
	builtKey = "BULKHEAD_HOST_TWIN_BUILT"
)

// killKey is the word for a filter that ends the process, as that of a real image; its value is the probe that is to be tried then.
const killKey = "BULKHEAD_HOST_TWIN_KILL"

// program is where that is, in its own mount namespace, for users who see nothing of root's folders.
const program = "/run/twin"

func TestMain(m *testing.M) {
	if name := os.Getenv(twinKey); name != "" {
		runtime.LockOSThread()
		units, err := confined()
		if err == nil {
			confine.Main(units, name, false) // exits
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// confined prepares the namespaces that this process was started in, and returns the units with this program in place of theirs.
func confined() ([]unit.Unit, error) {
	w, err := New(os.DirFS("../../.."))
	if err != nil {
		return nil, err
	}
	var out []unit.Unit
	err = errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"),
		os.Mkdir(unit.RunDir, 0o755),
		copyFile(program, os.Getenv(builtKey)),
	)
	for _, d := range twin.Daemons() {
		u := w.Units[d]
		dir := unit.RunDir + "/" + d
		err = errors.Join(err, os.Mkdir(dir, 0o755), os.Chown(dir, int(u.UID), int(u.UID)))
		u = here(u)
		var bad error
		u.Filter, bad = unitfile.Filter(u, false)
		if os.Getenv(killKey) == "" {
			u.Filter = unitfile.Answer(u.Filter, twin.Killed)
		}
		u.Landlock, u.Rules = unitfile.Landlock(u)
		err = errors.Join(err, bad)
		out = append(out, u)
	}
	return out, err
}

// here is a unit without what only a node has, and without capabilities that this machine's root cannot give.
func here(u unit.Unit) unit.Unit {
	u.Exec = []string{program}
	if probe := os.Getenv(killKey); probe != "" {
		u.Exec = append(u.Exec, probe)
	}
	u.MountNamespace, u.Listen, u.Console, u.Hide, u.OOMScoreAdj, u.Volume = "", nil, false, nil, 0, "" // without a volume to wait for, all rules are in force at once
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil {
		u.NoFile = min(nofile(u), files.Max)
	}
	for c := range 64 {
		if n, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0); err != nil || n == 0 {
			u.Capabilities &^= 1 << c
		}
	}
	return u
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close(), os.Chmod(to, 0o755))
}

// build makes the twin's program: this one may be linked with libraries, which a unit must not load. The flags are the Makefile's, so that little is compiled again.
func build(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "twin")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "grpcnotrace", "-trimpath", "-buildvcs=false", "-o", file, "./testdata/twin")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return file
}

// start makes the process of a unit's twin, in namespaces of its own.
func start(t *testing.T, built, daemon string, env ...string) (out []byte, state *os.ProcessState) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(append(os.Environ(), twinKey+"="+daemon, builtKey+"="+built), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil && (len(env) == 0 || cmd.ProcessState == nil) {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	return out, cmd.ProcessState
}

// TestHost has PID 1's own code confine a process as each daemon's unit says, in namespaces of its own on this machine's kernel, and tries there what needs no node.
// It is the quick part of TestVMTwin.
func TestHost(t *testing.T) {
	testns.Root(t)
	w, built := world(t), build(t)
	for _, d := range twin.Daemons() {
		t.Run(d, func(t *testing.T) {
			out, _ := start(t, built, d)
			var answers map[string]string
			if err := json.Unmarshal(out, &answers); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, p := range twin.Anywhere() {
				answer, ok := answers[p.ID()]
				if p.ID() == gate && answer == twin.NoGate && noGate() {
					continue
				}
				if diff := w.Want(here(w.Units[d]), p).Check(answer); diff != "" || !ok {
					t.Errorf("%s: %s", p.ID(), diff)
				}
			}
			t.Logf("» %d probes", len(answers))
		})
	}
	skipGate(t)
}

// gate is the probe that some hypervisors answer, without filters too: what a filter does there is only seen in TestVMTwin, then.
const gate = "system calls: getpid by the ABI i386"

func noGate() bool { return twin.Try("", gate)[gate] == twin.NoGate }

// skipGate says so if gate could not be tried.
func skipGate(t *testing.T) {
	if noGate() {
		t.Run(gate, func(t *testing.T) {
			t.Skip("this machine's hypervisor has no such gate: TestVMTwin tries it in a machine that has")
		})
	}
}

// TestHostKill: the filter of a real image ends the process where that of a twin answers.
func TestHostKill(t *testing.T) {
	testns.Root(t)
	w, built := world(t), build(t)
	for _, d := range twin.Daemons() {
		for _, p := range twin.Anywhere() {
			if !slices.Contains(killing, p.ID()) || w.Want(here(w.Units[d]), p).Answer != twin.Filter {
				continue
			}
			if p.ID() == gate && noGate() {
				continue
			}
			out, state := start(t, built, d, killKey+"="+p.ID())
			if status, ok := state.Sys().(syscall.WaitStatus); !ok || status.Signal() != unix.SIGSYS {
				t.Errorf("%s: %s: %v, want it to be killed by SIGSYS; it said %s", d, p.ID(), state, out)
			}
		}
	}
	skipGate(t)
}

// killing are the probes that are also tried with the filter of a real image: a call by its number, by another ABI, and for its arguments.
var killing = []string{
	"system calls: ptrace", "system calls: number 450", gate, "arguments of system calls: clone a process",
	"arguments of system calls: mprotect of written memory to be run", "network: socket: vsock",
}
