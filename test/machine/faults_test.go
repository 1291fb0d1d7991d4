package machine

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/test/history"
	"github.com/bulkhead-os/bulkhead/test/tokens"
)

const (
	usualFaults = 10 * time.Minute // BULKHEAD_FAULTS says another length
	recovery    = 5 * time.Minute  // for all three members after a fault: two starts under emulation
	bootedTime  = 90 * time.Second
	leastWrites = 30 // fewer prove nothing
	writers     = 4
	readers     = 2
)

// TestFaults has one thing after the other go wrong with three control planes, while clients make, revoke and list join tokens at all of them: each is a key in etcd, which is read and
// written through trustd and apid. No acknowledged write may be lost, all answers together must be linearizable, and after each fault all three members must be back.
//
// BULKHEAD_FAULTS is for how long (10m), BULKHEAD_FAULTS_SEED repeats a run. The history, the faults and the consoles are kept in out/test-vm/TestFaults.
func TestFaults(t *testing.T) {
	n := newNode(t)
	length := faultsLength(t)
	seed := faultsSeed(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	c := &cluster{n: n, image: n.build(t, otherImage{version: "9.1.0"}), nodes: []string{"test-1", "test-2", "test-3"}}
	t.Logf("» seed %d, for %s; BULKHEAD_FAULTS_SEED=%d repeats it", seed, length, seed)
	s := &storm{c: c, record: history.Begin(), counts: map[string]int{}}
	t.Cleanup(func() { s.calm(t) })
	if out, err := n.try(t.Context(), 10*time.Minute, "bhctl", "up", "--name", n.name, "--controlplanes", "3", "--image", c.image, "--memory", "1024", "--cpus", "1"); err != nil {
		t.Fatalf("bhctl up: %v\n%s", err, out)
	}
	c.states(t, 2*time.Minute, c.ready())
	endpoints := map[string]string{}
	for _, name := range c.nodes {
		endpoints[name] = fmt.Sprintf("127.0.0.1:%d", c.machine(t, name).Port(50000))
	}
	s.doors = tokens.New(n.credentials(t), endpoints)
	s.record = history.Begin()
	clients := history.Clients{
		Nodes: c.nodes, Writers: writers, Readers: readers, Open: s.doors.Open, Patience: 10 * time.Second, Most: tokens.Most, Seed: seed,
		// Slow enough for the tokens to last until the end: three in four are changed once.
		Pause: writers * (length + recovery) / (tokens.Most * 7 / 4),
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); clients.Run(ctx, s.record) }()
	err := s.rage(ctx, newDeck(seed, c.nodes), length)
	end := s.record.Now()
	cancel()
	<-ended
	figures := history.Sum(s.record.Ops(), end)
	t.Logf("» %s", figures)
	t.Logf("» faults: %s", s.tally())
	defer s.judge(t) // also if the cluster does not come back: what it said until then was its word
	if figures.Added < leastWrites {
		t.Errorf("%d writes were acknowledged; fewer than %d prove nothing", figures.Added, leastWrites)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.states(t, 4*time.Minute, c.ready())
	if v := c.voters(t); !slices.Equal(v, c.nodes) {
		t.Errorf("voters: %v", v)
	}
	if err := clients.Look(t.Context(), s.record); err != nil {
		t.Fatal(err)
	}
}

// judge looks for lost writes and wrong answers in all that the clients saw.
func (s *storm) judge(t *testing.T) {
	start := time.Now()
	if err := history.Check(s.record.Ops(), 5*time.Minute); err != nil {
		t.Error(err)
		return
	}
	t.Logf("» 0 acknowledged writes lost, the history is linearizable (checked in %s)", time.Since(start).Round(10*time.Millisecond))
}

func faultsLength(t *testing.T) time.Duration {
	text := os.Getenv("BULKHEAD_FAULTS")
	if text == "" {
		return usualFaults
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > 2*time.Hour {
		t.Fatalf("BULKHEAD_FAULTS=%q: want a time such as 10m, at most 2h", text)
	}
	return d
}

func faultsSeed(t *testing.T) uint64 {
	text := os.Getenv("BULKHEAD_FAULTS_SEED")
	if text == "" {
		return rand.Uint64N(1 << 32)
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("BULKHEAD_FAULTS_SEED=%q: want a number", text)
	}
	return seed
}

// storm is what happens to a cluster.
type storm struct {
	c      *cluster
	doors  *tokens.Doors
	record *history.Record
	counts map[string]int
	lines  []string // what happened, and when
}

// rage has faults follow one another for a while. After each all three members must be back.
func (s *storm) rage(ctx context.Context, d *deck, length time.Duration) error {
	for s.record.Now() < length {
		f := d.deal()
		s.counts[f.kind]++
		s.say("%s", f)
		if err := s.do(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		s.say("healed")
		start := s.record.Now()
		if err := s.recovered(ctx); err != nil {
			return fmt.Errorf("after %s: %w", f, err)
		}
		s.say("all three members answer after %s", (s.record.Now() - start).Round(100*time.Millisecond))
		if err := hold(ctx, time.Duration(2+d.random.IntN(3))*time.Second); err != nil {
			return err
		}
	}
	return nil
}

func (s *storm) say(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf("%8s %s", s.record.Now().Round(100*time.Millisecond), fmt.Sprintf(format, args...)))
}

// do has a fault happen, and ends it.
func (s *storm) do(ctx context.Context, f fault) error {
	if len(f.rules) > 0 {
		return s.ethernet(ctx, f)
	}
	m, err := qemu.Load(s.c.nodes[f.node])
	if err != nil {
		return err
	}
	switch f.kind {
	case "freeze":
		return freeze(ctx, m, f.hold)
	case "kill":
		if err := m.Kill(ctx); err != nil {
			return err
		}
		if err := hold(ctx, f.hold); err != nil {
			return err
		}
		return m.Start(ctx, nil)
	case "clock":
		return s.clock(ctx, m, f)
	}
	return fmt.Errorf("no fault is called %q", f.kind)
}

func (s *storm) ethernet(ctx context.Context, f fault) error {
	control, err := qemu.LANControl(s.c.n.name)
	if err != nil {
		return err
	}
	if err := control.SetRules(ctx, f.rules...); err != nil {
		return err
	}
	return errors.Join(hold(ctx, f.hold), control.SetRules(ctx))
}

// freeze has a machine stand still, as a host does that is out of breath.
func freeze(ctx context.Context, m qemu.Machine, long time.Duration) error {
	pid := m.Status().PID
	if pid == 0 {
		return fmt.Errorf("machine %s does not run", m.Name)
	}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return err
	}
	return errors.Join(hold(ctx, long), unix.Kill(pid, unix.SIGCONT))
}

// clock is a start of a machine whose clock is wrong, and after a while one at which it is right again. A node takes the time from its hardware; there is no order to set it.
func (s *storm) clock(ctx context.Context, m qemu.Machine, f fault) error {
	if err := m.Kill(ctx); err != nil {
		return err
	}
	m.Extra = []string{"-rtc", "base=" + time.Now().Add(f.step).UTC().Format("2006-01-02T15:04:05")}
	if err := m.Start(ctx, nil); err != nil {
		return err
	}
	// Whether anybody listens to it with that clock is not asked: it must have started, so that its neighbours have met it.
	booted, cancel := context.WithTimeout(ctx, bootedTime)
	err := listens(booted, s.doors.Endpoint(m.Name))
	cancel()
	s.say("%s with that clock: %v", m.Name, or(err, "its API is up"))
	if err := hold(ctx, f.hold); err != nil {
		return err
	}
	if err := m.Kill(ctx); err != nil {
		return err
	}
	m.Extra = nil
	return m.Start(ctx, nil)
}

// listens waits until somebody answers at an endpoint, whoever it says it is: by its clock the certificate may be none.
func listens(ctx context.Context, endpoint string) error {
	dialer := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}}
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		conn, err := dialer.DialContext(try, "tcp", endpoint)
		cancel()
		if err == nil {
			return conn.Close()
		}
		if hold(ctx, time.Second) != nil {
			return err
		}
	}
}

func or(err error, text string) any {
	if err != nil {
		return err
	}
	return text
}

// recovered waits until each member says that it runs, that it has a leader, and that all three vote.
func (s *storm) recovered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, recovery)
	defer cancel()
	for {
		var last error
		for _, name := range s.c.nodes {
			last = errors.Join(last, s.votes(ctx, name))
		}
		if last == nil {
			return nil
		}
		if hold(ctx, time.Second) != nil {
			return fmt.Errorf("not all three members are back within %s: %w", recovery, last)
		}
	}
}

func (s *storm) votes(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := s.doors.Dial(name)
	if err != nil {
		return err
	}
	defer conn.Close()
	st, err := etcdv1.NewEtcdClient(conn).GetStatus(ctx, &etcdv1.GetStatusRequest{})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	voters := slices.DeleteFunc(st.GetMembers(), func(m *etcdv1.Member) bool { return m.GetLearner() })
	if st.GetState() != "running" || len(voters) != len(s.c.nodes) {
		return fmt.Errorf("%s: its member is %q with %d voters: %s", name, st.GetState(), len(voters), st.GetDetail())
	}
	return nil
}

func (s *storm) tally() string {
	var out []string
	for _, kind := range slices.Sorted(maps.Keys(s.counts)) {
		out = append(out, fmt.Sprintf("%d %s", s.counts[kind], kind))
	}
	return strings.Join(out, ", ")
}

// calm ends whatever fault is still there, and keeps what was seen. It is for the end of the test, also of one that failed.
func (s *storm) calm(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dir := filepath.Join(s.c.n.root, "out", "test-vm", t.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Error(err)
	}
	if control, err := qemu.LANControl(s.c.n.name); err == nil {
		if err := control.SetRules(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Logf("rules of the switch: %v", err)
		}
	}
	members, err := qemu.Members(s.c.n.name)
	if err != nil {
		t.Error(err)
	}
	for _, m := range members {
		if pid := m.Status().PID; pid != 0 {
			_ = unix.Kill(pid, unix.SIGCONT) // one that runs takes no notice
		}
		for _, name := range []string{"console.log", "console.1.log"} {
			if data, err := os.ReadFile(filepath.Join(m.Dir, name)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, m.Name+"-"+name), data, 0o644); err != nil {
					t.Log(err)
				}
			}
		}
		m.Extra = nil
		if err := m.Start(ctx, nil); err != nil {
			t.Logf("machine %s: %v", m.Name, err)
		}
	}
	s.keep(t, dir)
}

// keep saves the story and, of a test that failed, the logs.
func (s *storm) keep(t *testing.T, dir string) {
	ops := s.record.Ops()
	story := strings.Join(append(s.lines, history.Sum(ops, s.record.Now()).String(), "faults: "+s.tally()), "\n") + "\n"
	err := os.WriteFile(filepath.Join(dir, "faults.txt"), []byte(story), 0o644)
	err = errors.Join(err, save(filepath.Join(dir, "history.jsonl"), func(w io.Writer) error { return history.Save(w, ops) }))
	if err != nil {
		t.Errorf("history not kept: %v", err)
	}
	if !t.Failed() {
		return
	}
	for _, name := range s.c.nodes {
		for _, unit := range []string{"etcdd", "trustd", "apid", "machined"} {
			out, err := s.c.n.try(context.Background(), 15*time.Second, "bhctl", "-n", name, "logs", unit)
			if err != nil {
				out += err.Error()
			}
			_ = os.WriteFile(filepath.Join(dir, name+"-"+unit+".txt"), []byte(out), 0o644)
		}
	}
	t.Logf("history, consoles and logs are in %s", dir)
}

func save(path string, write func(io.Writer) error) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// hold is a pause that ends early with ctx.
func hold(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
