package supervise

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// A model has processes that are numbers. It is ready at once, and ends when it is told.
type model struct {
	mu    sync.Mutex
	next  int            // guarded by mu
	alive map[string]int // guarded by mu
	ended []ending       // guarded by mu
	swept int            // guarded by mu
	wake  int
	gate  chan bool // late units wait for it
	flood bool      // guarded by mu: there is always one more orphan that has ended
	early bool      // guarded by mu: who lives inside ends before its trampoline does
}

type ending struct {
	pid    int
	status unix.WaitStatus
}

func (m *model) spawn(v *service, ready int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if v.Name == "impossible" {
		return 0, unix.ENOEXEC
	}
	if m.alive[v.Name] != 0 {
		panic("two processes of " + v.Name)
	}
	m.next++
	m.alive[v.Name] = m.next
	if ready >= 0 {
		unix.Write(ready, []byte("\n"))
	}
	if v.Inside != "" { // the process is a trampoline, which says another one's number and ends
		if m.alive[v.Inside] == 0 {
			panic(v.Name + " without its holder")
		}
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			panic(err)
		}
		v.told = pipe[0]
		trampoline := ending{m.next, 0}
		m.next++
		unix.Write(pipe[1], []byte(strconv.Itoa(m.next)))
		unix.Close(pipe[1])
		m.alive[v.Name] = m.next
		if m.early {
			m.ended = append(m.ended, ending{m.next, 3 << 8})
			delete(m.alive, v.Name)
		}
		m.ended = append(m.ended, trampoline)
		unix.Write(m.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		return trampoline.pid, nil
	}
	return m.next, nil
}

func (m *model) kill(v *service, sig unix.Signal) { m.end(v.Name, unix.WaitStatus(sig)) }
func (m *model) sweep(*service) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.swept++
}

func (m *model) wait() (int, unix.WaitStatus) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ended) == 0 {
		if m.flood {
			return 1000000, 0
		}
		return 0, 0
	}
	e := m.ended[0]
	m.ended = m.ended[1:]
	return e.pid, e.status
}

func (m *model) end(name string, status unix.WaitStatus) {
	m.mu.Lock()
	if m.alive[name] != 0 {
		m.ended = append(m.ended, ending{1000000, 0}, ending{m.alive[name], status}) // and an orphan of somebody
		delete(m.alive, name)
	}
	m.mu.Unlock()
	unix.Write(m.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// start runs a supervisor of the units until the test ends.
func start(t *testing.T, units ...unit.Unit) (*model, *initctl.Client) {
	m := &model{alive: map[string]int{}, gate: make(chan bool, 1)}
	var services []*service
	for i := range units {
		units[i].Owners = []uint32{uint32(os.Getuid())}
		v := &service{Unit: &units[i]}
		var err error
		if v.log, err = newLog(); err != nil {
			t.Fatal(err)
		}
		services = append(services, v)
	}
	path := filepath.Join(t.TempDir(), "init.sock")
	s, err := newSupervisor(services, m, path)
	if err != nil {
		t.Fatal(err)
	}
	m.wake = s.wake
	var end, done = make(chan bool), make(chan bool)
	go func() {
		defer close(done)
		s.begin(func() {
			if slices.ContainsFunc(units, func(u unit.Unit) bool { return u.Late }) {
				select {
				case <-m.gate:
				case <-t.Context().Done():
				}
			}
		})
		s.loop(time.Time{}, func() bool {
			select {
			case <-end:
				return true
			default:
				return false
			}
		})
	}()
	c, err := initctl.Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		close(end)
		unix.Write(m.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-done
	})
	return m, c
}

func status(t *testing.T, c *initctl.Client, name string) initctl.Status {
	t.Helper()
	all, err := c.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no unit %q in %v", name, all)
	return initctl.Status{}
}

// Who lives inside waits for its holder, is the process that its trampoline said, ends with its holder and comes back after it.
func TestInside(t *testing.T) {
	m, c := start(t,
		unit.Unit{Name: "holder", Restart: "always", NotifyReady: true, Holds: true},
		unit.Unit{Name: "lodger", Restart: "always", Autostart: true, Inside: "holder"})
	until := func(name string, ok func(initctl.Status) bool) initctl.Status {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if s := status(t, c, name); ok(s) {
				return s
			}
		}
		t.Fatalf("%s never came to that; it is %+v", name, status(t, c, name))
		return initctl.Status{}
	}
	up := func(after int) func(initctl.Status) bool {
		return func(s initctl.Status) bool { return s.State == "up" && s.PID > after }
	}
	time.Sleep(3 * firstPause) // long enough to try it several times
	if s := status(t, c, "lodger"); s.State != "waiting" || s.Restarts != 0 || s.PID != 0 {
		t.Errorf("without its holder: %+v", s)
	}
	if err := c.Start("holder"); err != nil {
		t.Fatal(err)
	}
	holder, first := until("holder", up(0)), until("lodger", up(0))
	m.mu.Lock()
	if first.PID != m.alive["lodger"] || first.Restarts != 0 {
		t.Errorf("process %+v, want %d", first, m.alive["lodger"])
	}
	m.mu.Unlock()
	// The kernel ends the lodger first: the holder's end is told when all others' are.
	m.end("lodger", unix.WaitStatus(unix.SIGKILL))
	m.end("holder", unix.WaitStatus(unix.SIGKILL))
	until("holder", up(holder.PID))
	if again := until("lodger", up(first.PID)); again.Restarts != 1 || again.LastExit != "killed by SIGKILL" {
		t.Errorf("after its holder's end: %+v", again)
	}
	// One that ends at once is seen to end, with its own code.
	m.mu.Lock()
	m.early = true
	m.mu.Unlock()
	m.end("lodger", 0)
	until("lodger", func(s initctl.Status) bool { return s.Restarts >= 3 && s.LastExit == "exit 3" })
	if err := c.Stop("lodger"); err != nil {
		t.Fatal(err)
	}
	until("lodger", func(s initctl.Status) bool { return s.State == "down" })
}

func TestSupervisor(t *testing.T) {
	m, c := start(t,
		unit.Unit{Name: "b", Restart: "always", Autostart: true, NotifyReady: true},
		unit.Unit{Name: "a", Restart: "on-failure"},
		unit.Unit{Name: "impossible", Restart: "never"})

	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan initctl.Status, 100)
	watched := make(chan error, 1)
	go func() { watched <- c.Watch(ctx, func(s initctl.Status) { seen <- s }) }()
	until := func(name string, ok func(initctl.Status) bool) initctl.Status {
		t.Helper()
		for end := time.After(5 * time.Second); ; {
			select {
			case s := <-seen:
				if s.Name == name && ok(s) {
					return s
				}
			case <-end:
				t.Fatalf("%s never came to that; it is %+v", name, status(t, c, name))
			}
		}
	}
	is := func(state string) func(initctl.Status) bool {
		return func(s initctl.Status) bool { return s.State == state }
	}

	first := until("b", is("up"))
	if all, err := c.Status(); err != nil || len(all) != 3 || all[0].Name != "a" || all[0].State != "down" || all[0].LastExit != "" {
		t.Errorf("status: %+v, %v", all, err)
	}
	m.end("b", unix.WaitStatus(unix.SIGKILL))
	again := until("b", func(s initctl.Status) bool { return s.State == "up" && s.PID != first.PID })
	if again.Restarts != 1 || again.LastExit != "killed by SIGKILL" || time.Since(again.Since) > time.Minute {
		t.Errorf("after a kill: %+v", again)
	}
	if err := c.Restart("b"); err != nil {
		t.Fatal(err)
	}
	until("b", func(s initctl.Status) bool { return s.State == "up" && s.PID > again.PID && s.Restarts == 1 })
	if err := c.Stop("b"); err != nil {
		t.Fatal(err)
	}
	until("b", is("down"))

	if err := c.Start("a"); err != nil {
		t.Fatal(err)
	}
	until("a", is("up"))
	m.end("a", 0)
	if s := until("a", is("down")); s.LastExit != "exit 0" || s.PID != 0 {
		t.Errorf("after exit 0: %+v", s)
	}
	if err := c.Start("impossible"); err != nil {
		t.Fatal(err)
	}
	if s := until("impossible", func(s initctl.Status) bool { return s.LastExit != "" }); !strings.HasPrefix(s.LastExit, "not started: exec format error") {
		t.Errorf("impossible: %+v", s)
	}

	if err := c.Start("nobody"); !errors.Is(err, initctl.NotFound) {
		t.Errorf("start nobody: %v", err)
	}
	if os.Getuid() != 101 {
		if err := c.Reboot(); !errors.Is(err, initctl.Denied) {
			t.Errorf("reboot: %v", err)
		}
		if _, err := c.Logs("a"); !errors.Is(err, initctl.Denied) {
			t.Errorf("logs: %v", err)
		}
	}
	cancel()
	if err := <-watched; !errors.Is(err, context.Canceled) {
		t.Errorf("watch ended with %v", err)
	}
}

// Late units start when the others are up and what they wait for is done, and the loop goes on meanwhile.
func TestLate(t *testing.T) {
	m, c := start(t, unit.Unit{Name: "a", Restart: "always", Autostart: true, Late: true}, unit.Unit{Name: "b", Restart: "always", Autostart: true, NotifyReady: true})
	wait := func(name, state string) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); status(t, c, name).State != state; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s is %+v, want %s", name, status(t, c, name), state)
			}
		}
	}
	wait("b", "up")
	if s := status(t, c, "a"); s.State != "down" || s.PID != 0 {
		t.Errorf("the late unit is %+v before its time", s)
	}
	m.gate <- true
	wait("a", "up")
}

// Orphans without end, faster than they can be reaped, do not keep PID 1 from its other work.
func TestFlood(t *testing.T) {
	m, c := start(t, unit.Unit{Name: "a", Restart: "always"})
	set := func(flood bool) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.flood = flood
		unix.Write(m.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
	set(true)
	for range 20 {
		if err := c.Restart("a"); err != nil {
			t.Fatal(err)
		}
	}
	set(false)
	if s := status(t, c, "a"); s.Name != "a" {
		t.Errorf("%+v", s)
	}
}

// Who follows and does not read is not waited for, and hears of the last state when it does read.
func TestSlowWatcher(t *testing.T) {
	_, c := start(t, unit.Unit{Name: "a", Restart: "always"}, unit.Unit{Name: "b", Restart: "always"})
	hold, last := make(chan bool), make(chan initctl.Status, 10000)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go c.Watch(ctx, func(s initctl.Status) { <-hold; last <- s })
	for range 400 {
		for _, do := range []func(string) error{c.Start, c.Restart, c.Stop} {
			if err := do("a"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := c.Start("b"); err != nil {
		t.Fatal(err)
	}
	close(hold)
	seen := map[string]string{}
	for end := time.After(5 * time.Second); seen["a"] != "down" || seen["b"] != "up"; {
		select {
		case s := <-last:
			seen[s.Name] = s.State
		case <-end:
			t.Fatalf("last heard of %v", seen)
		}
	}
}

// A unit is never held up by a log that nobody reads.
func TestLogRelief(t *testing.T) {
	l, err := newLog()
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 3000)) // a page each: the pipe is full long before its bytes are
	unix.SetNonblock(l.write, true)
	written := 0
	for range 2000 {
		n, err := unix.Write(l.write, line)
		if err == unix.EAGAIN {
			if !l.relieve("test") {
				t.Fatal("full, and not relieved")
			}
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		written += n
	}
	left, err := unix.IoctlGetInt(l.read, unix.TIOCINQ)
	if err != nil || left+l.lost != written || l.lost == 0 {
		t.Errorf("%d written, %d lost, %d left, %v", written, l.lost, left, err)
	}
}
