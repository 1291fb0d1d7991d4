package machine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/test/history"
	"github.com/bulkhead-os/bulkhead/test/tokens"
)

// Bounds under software emulation. For each of two stages each of three members starts anew, and every daemon gets new certificates twice.
const (
	rotateLimit  = 10 * time.Minute
	rotateSettle = time.Minute             // until every node says that it is well
	rotatePause  = 1200 * time.Millisecond // of each client, as in TestFaults: three emulated machines on two cores are busy with a handful of calls a second
)

// TestRotate replaces all authorities of three control planes at once while clients make, revoke and list join tokens at all of them: no call fails, no write is lost, and then
// each node is as well as before, with the second generation of each authority.
func TestRotate(t *testing.T) {
	n := newNode(t)
	if os.Getenv("BULKHEAD_ROTATE") == "" {
		t.Skip("the long run: make test-faults")
	}
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	c := &cluster{n: n, image: n.build(t, otherImage{version: "9.1.0"}), nodes: []string{"test-1", "test-2", "test-3"}}
	s := &storm{c: c, record: history.Begin(), counts: map[string]int{}}
	t.Cleanup(func() { s.calm(t) })
	if out, err := n.try(t.Context(), 10*time.Minute, "bhctl", "up", "--name", n.name, "--controlplanes", "3", "--image", c.image, "--memory", "1024", "--cpus", "1"); err != nil {
		t.Fatalf("bhctl up: %v\n%s", err, out)
	}
	c.states(t, 2*time.Minute, c.ready())
	c.well(t, rotateSettle)
	endpoints := map[string]string{}
	for _, name := range c.nodes {
		endpoints[name] = fmt.Sprintf("127.0.0.1:%d", c.machine(t, name).Port(50000))
	}
	before := c.events(t)
	s.doors = tokens.New(n.credentials(t), endpoints)
	clients := history.Clients{Nodes: c.nodes, Writers: writers, Readers: readers, Open: s.doors.Open, Patience: 15 * time.Second, Most: tokens.Most, Seed: faultsSeed(t), Pause: rotatePause}
	s.record = history.Begin()
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	defer g.Wait()
	defer cancel()
	g.Go(func() { clients.Run(ctx, s.record) })
	g.Go(func() { s.renews(ctx, t) })
	if err := hold(ctx, 3*time.Second); err != nil {
		t.Fatal(err)
	}
	began := s.record.Now()
	out, err := n.try(ctx, rotateLimit, "bhctl", "trust", "rotate-ca", "--which", "all", "--now")
	s.say("rotate-ca took %s: %v\n%s", (s.record.Now() - began).Round(100*time.Millisecond), or(err, "done"), out)
	t.Logf("» all authorities were replaced in %s", (s.record.Now() - began).Round(100*time.Millisecond))
	if err != nil {
		t.Errorf("rotate-ca: %v", err)
	}
	ended := s.record.Now()
	c.well(t, rotateSettle)
	t.Logf("» every node was well %s later", (s.record.Now() - ended).Round(100*time.Millisecond))
	cancel()
	g.Wait()
	s.answered(t)
	s.judge(t)
	for _, name := range c.nodes {
		c.generation(t, name, 2)
	}
	if v := c.voters(t); !slices.Equal(v, c.nodes) {
		t.Errorf("voters: %v", v)
	}
	if err := clients.Look(t.Context(), s.record); err != nil {
		t.Error(err)
	}
	for name, all := range c.events(t) {
		for _, line := range strings.Split(strings.TrimPrefix(all, before[name]), "\n") {
			s.say("%s: %s", name, line)
			if strings.Contains(line, "etcdd") && !strings.Contains(line, "reached generation") {
				t.Errorf("%s tells: %s", name, line)
			}
		}
	}
}

// renews has clients use what is in the user's configuration, as others who share it do: rotate-ca renews it before the old authority goes.
func (s *storm) renews(ctx context.Context, t *testing.T) {
	path := filepath.Join(s.c.n.dir, "config.yaml")
	was, _ := os.ReadFile(path)
	for hold(ctx, 50*time.Millisecond) == nil {
		if now, err := os.ReadFile(path); err == nil && string(now) != string(was) {
			was = now
			s.doors.Renew(s.c.n.credentials(t))
		}
	}
}

// answered fails for each call that did.
func (s *storm) answered(t *testing.T) {
	t.Helper()
	ops := s.record.Ops()
	var longest time.Duration
	for _, op := range ops {
		longest = max(longest, op.Return-op.Call)
		if op.Error != "" {
			t.Errorf("%s %s at %s failed %s after the beginning, after %s: %s", op.Kind, op.Item, op.Node, op.Call.Round(time.Millisecond), (op.Return - op.Call).Round(time.Millisecond), op.Error)
		}
	}
	figures := history.Sum(ops, s.record.Now())
	t.Logf("» %s; the longest call took %s", figures, longest.Round(time.Millisecond))
	if figures.Added < leastWrites {
		t.Errorf("%d writes were acknowledged; fewer than %d prove nothing", figures.Added, leastWrites)
	}
}

// well waits until each node says itself that nothing is wrong with it.
func (c *cluster) well(t *testing.T, limit time.Duration) {
	t.Helper()
	for _, name := range c.nodes {
		eventually(t, limit, name+" is well", func() error {
			_, err := c.n.try(t.Context(), 20*time.Second, "bhctl", "-n", name, "health")
			return err
		})
	}
}

// generation wants all authorities to be of it, and no others to be there.
func (c *cluster) generation(t *testing.T, name string, want int) {
	t.Helper()
	var all []struct {
		Profile, State string
		Generation     int
	}
	if err := c.ask(t, &all, "-n", name, "get", "certificates"); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	authorities := 0
	for _, a := range all {
		if a.State == "" {
			continue // signed by one
		}
		if authorities++; a.Generation != want || a.State != "signs" {
			t.Errorf("%s: authority %s of generation %d %s; want those of generation %d alone", name, a.Profile, a.Generation, a.State, want)
		}
	}
	if authorities != 4 {
		t.Errorf("%s has %d authorities, want four: %+v", name, authorities, all)
	}
}

// events are what each node has told until now.
func (c *cluster) events(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range c.nodes {
		var err error
		if out[name], err = c.n.try(t.Context(), time.Minute, "bhctl", "-n", name, "events"); err != nil {
			t.Errorf("%s: events: %v", name, err)
		}
	}
	return out
}
