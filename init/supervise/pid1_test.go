package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// The test binary plays three parts: the test, PID 1 of a namespace of its own, and the judge, a unit of that PID 1.
const roleVariable = "BULKHEAD_TEST_PID1"

// A trial of PID 1 is what it is put through, and, when it is over, what came of it. It travels as JSON in files of Dir.
type endurance struct {
	Dir     string
	Workers int // units that are killed
	Kills   int
	Orphans int           // processes whose parent ends before them
	Hostile time.Duration // how long the units that misbehave may do so
	Short   bool          // the figures of memory mean little

	Wrong []string // what a person would call a defect
	Notes []string // figures
	Took  time.Duration
}

func (e *endurance) wrong(format string, args ...any) {
	e.Wrong = append(e.Wrong, fmt.Sprintf(format, args...))
}

func (e *endurance) note(format string, args ...any) {
	e.Notes = append(e.Notes, fmt.Sprintf(format, args...))
}

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	var e endurance
	if err := json.Unmarshal([]byte(os.Getenv(roleVariable+"_PLAN")), &e); err != nil || role == "init" && os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "not a part of the test:", role, os.Getpid(), err)
		os.Exit(1)
	}
	if role == "init" {
		e.asInit()
	} else {
		e.asJudge()
	}
	e.leave(role)
}

// leave writes what was found beside the plan and ends the process.
func (e *endurance) leave(role string) {
	found, err := json.Marshal(e)
	if err == nil {
		err = os.WriteFile(filepath.Join(e.Dir, role+".json"), found, 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// PID 1 in a namespace of its own, with real processes: orphans and kills without end and units that misbehave in every way we could
// think of. No restart is lost, no zombie is left for a second, no descriptor leaks, the memory stays as it is, and it answers.
//
// BULKHEAD_PID1=1 is the long run ("make test-pid1").
func TestPID1(t *testing.T) {
	testns.Root(t)
	e := endurance{Dir: t.TempDir(), Workers: 24, Kills: 240, Orphans: 2000, Hostile: 3 * time.Second, Short: true}
	limit := 90 * time.Second
	if os.Getenv("BULKHEAD_PID1") != "" {
		e = endurance{Dir: e.Dir, Workers: 48, Kills: 10000, Orphans: 100000, Hostile: 30 * time.Second}
		limit = 30 * time.Minute
	}
	plan, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=init", roleVariable+"_PLAN="+string(plan))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	life, err := cmd.StdinPipe() // PID 1 ends when this closes, and so when the test does
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(limit, func() { life.Close() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("PID 1 ended with %v after %v:\n%s", err, time.Since(start), out.String())
	}
	for _, role := range []string{"init", "judge"} {
		var found endurance
		text, err := os.ReadFile(filepath.Join(e.Dir, role+".json"))
		if err == nil {
			err = json.Unmarshal(text, &found)
		}
		if err != nil {
			t.Errorf("%s left nothing: %v", role, err)
		}
		for _, w := range found.Wrong {
			t.Errorf("%s: %s", role, w)
		}
		for _, n := range found.Notes {
			t.Logf("» %s", n)
		}
	}
	t.Logf("» %d kills and %d orphans in %.1f s", e.Kills, e.Orphans, time.Since(start).Seconds())
	if t.Failed() {
		t.Logf("the console:\n%s", out.String())
	}
}

// namespaced is Linux but for control groups and confinement, which would be the host's: a unit's processes are its process group.
type namespaced struct {
	linux
	group   map[*service]int
	orphans int
}

func (k *namespaced) spawn(v *service, ready int) (int, error) {
	if v.broken != nil {
		return 0, v.broken
	}
	if ready < 0 {
		ready = k.null
	}
	out := uintptr(v.log.write)
	if v.Name == "judge" {
		out = 2
	}
	pid, err := syscall.ForkExec(v.Exec[0], append([]string{v.Name}, v.Exec[1:]...), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{uintptr(k.null), out, out, uintptr(ready)}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if k.group[v] = pid; err != nil {
		k.group[v] = 0
	}
	return pid, err
}

func (k *namespaced) sweep(v *service) {
	if g := k.group[v]; g > 1 { // else it would be everybody
		unix.Kill(-g, unix.SIGKILL)
	}
}

func (k *namespaced) wait() (int, unix.WaitStatus) {
	pid, status := k.linux.wait()
	if pid > 0 {
		k.orphans++
		for _, g := range k.group {
			if g == pid {
				k.orphans--
			}
		}
	}
	return pid, status
}

// asInit is PID 1: the supervisor as it is, over a kernel that is namespaced.
func (e *endurance) asInit() {
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""))
	if null := unix.Mount("/dev/null", "/dev/kmsg", "", unix.MS_BIND, ""); null != unix.ENOENT { // the host's log is not ours
		err = errors.Join(err, null)
	}
	// A kernel that shares processors out among sessions first gives PID 1 no more than each of its units, and than whoever works beside the test. On a node the
	// units' control groups see to that. No such file: a kernel that does not.
	if sessions := os.WriteFile("/proc/self/autogroup", []byte("-20"), 0); !errors.Is(sessions, fs.ErrNotExist) {
		err = errors.Join(err, sessions)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		fmt.Println("PID 1: the test is gone, or its time is up")
		os.Exit(3)
	}()
	os.Setenv(roleVariable, "judge") // what children get to see
	<-time.After(time.Millisecond)   // Go's own two descriptors for timers are there from now on
	k := &namespaced{group: map[*service]int{}}
	k.null, _ = unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	units := e.units()
	var services []*service
	for i := range units {
		log, lerr := newLog()
		err = errors.Join(err, lerr)
		services = append(services, &service{Unit: &units[i], log: log})
	}
	s, serr := newSupervisor(services, k, e.socket())
	if err = errors.Join(err, serr); err != nil {
		fmt.Println("PID 1:", err)
		os.Exit(1)
	}
	s.hearSignals()
	s.begin(func() {})
	var judge *service
	var names []string
	for _, v := range s.units {
		names = append(names, v.Name)
		if v.Name == "judge" {
			judge = v
		}
	}
	s.loop(time.Time{}, func() bool { return judge.state == Down })
	if stuck := s.Drain(names); len(stuck) > 0 {
		e.wrong("when all is stopped, these had not ended: %v", stuck)
	}
	s.loop(time.Now().Add(200*time.Millisecond), func() bool { return len(processes1()) == 1 })
	if left := processes1(); len(left) != 1 {
		e.wrong("when all is stopped, %d processes are left: %v", len(left)-1, left)
	}
	if k.orphans < e.Orphans {
		e.wrong("%d orphans came to PID 1, want %d at least", k.orphans, e.Orphans)
	}
	e.note("%d orphans came to PID 1", k.orphans)
}

func (e *endurance) socket() string { return filepath.Join(e.Dir, "init.sock") }

// units are those of the trial.
func (e *endurance) units() []unit.Unit {
	const short = 200 * time.Millisecond
	shell := func(name, script string) unit.Unit {
		return unit.Unit{Name: name, Exec: []string{"/bin/sh", "-c", script}, Restart: "always", Owners: []uint32{uint32(os.Getuid())}}
	}
	var all []unit.Unit
	for i := range e.Workers {
		u := shell(worker(i), "exec sleep 1000000")
		if u.NotifyReady = i%2 == 0; u.NotifyReady {
			u.Exec[2] = "echo >&3; exec 3>&-; exec sleep 1000000"
		}
		u.Autostart = true
		all = append(all, u)
	}
	for i := range orphaners {
		u := shell(orphaner(i), fmt.Sprintf("i=0; while [ $i -lt %d ]; do (:&); i=$((i+1)); done", e.Orphans/orphaners/2))
		u.Restart = "never"
		all = append(all, u)
	}
	// On a node a unit's processes have one unit's share of the processor together, however many they are: that of its control group. There are none here.
	forker := shell("forker", `exec nice -n 19 /bin/sh -c "$0"`)
	forker.Exec = append(forker.Exec, "while :; do (sleep 0.2 &); sh -c 'sleep 0.1 & (sleep 0.3 &) ' & done")
	stubborn := shell("stubborn", "trap '' TERM; echo >&3; while :; do sleep 1; done")
	stubborn.NotifyReady, stubborn.StopTimeout = true, short
	loud := shell("loud", "echo >&3; while :; do echo "+strings.Repeat("x", 2000)+"; echo y >&2; done")
	loud.NotifyReady = true
	never := shell("never", "exec sleep 1000000")
	never.NotifyReady, never.StartTimeout = true, short
	closer := shell("closer", "exec 3>&-; exec sleep 1000000")
	closer.NotifyReady, closer.StartTimeout = true, short
	babbler := shell("babbler", "while :; do printf xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >&3 || exec sleep 1000000; done")
	babbler.NotifyReady, babbler.StartTimeout = true, short
	flapper := shell("flapper", "exit 1")
	missing := unit.Unit{Name: "missing", Exec: []string{"/nowhere"}, Restart: "always", Owners: flapper.Owners}
	judge := unit.Unit{Name: "judge", Exec: []string{"/proc/self/exe"}, Restart: "never", Autostart: true, Late: true}
	return append(all, forker, stubborn, loud, never, closer, babbler, flapper, missing, judge)
}

const orphaners = 2

func worker(i int) string   { return fmt.Sprintf("worker-%02d", i) }
func orphaner(i int) string { return fmt.Sprintf("orphaner-%d", i) }
