package machine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Bounds under software emulation. A node's restart takes a minute or two there.
const (
	rollLimit  = 20 * time.Minute
	writeLimit = 45 * time.Second // between two writes that were acknowledged: an election, and a client that tries the next endpoint
)

// rollingStatus is what "bhctl rolling status -o json" says.
type rollingStatus struct {
	ID, State, Detail, Coordinator string
	Nodes                          []struct{ Name, State, Detail string }
}

// boots are the boots that run, by node, as the register tells them: a node that was killed keeps its last until it reports again.
func (c *cluster) boots(t *testing.T) (map[string]string, error) {
	t.Helper()
	var nodes []struct {
		Name   string
		BootID string `json:"bootId"`
	}
	if err := c.ask(t, &nodes, "get", "nodes"); err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, n := range nodes {
		out[n.Name] = n.BootID
	}
	return out, nil
}

// mustBoots is boots where every control plane is up.
func (c *cluster) mustBoots(t *testing.T) map[string]string {
	t.Helper()
	boots, err := c.boots(t)
	if err != nil {
		t.Fatal(err)
	}
	return boots
}

// rolls orders a rolling restart of etcd's leader and of the worker, kills the client in the middle of it, and watches. All nodes take turns in "make test-ha".
func (c *cluster) rolls(t *testing.T) {
	before := c.mustBoots(t)
	turns := []string{c.leader(t), "test-w1"}
	order := []string{"reboot", "--cluster", "--only", strings.Join(turns, ",")}
	w := &appender{c: c}
	writing, stop := context.WithCancel(t.Context())
	var g sync.WaitGroup
	g.Go(func() { w.run(writing) })
	defer g.Wait()
	defer stop()

	ordered, kill := context.WithCancel(t.Context())
	defer kill()
	client := make(chan error, 1)
	go func() {
		_, err := c.n.try(ordered, rollLimit, "bhctl", order...)
		client <- err
	}()
	watch := &watcher{c: c, seen: map[string]bool{}, coordinators: map[string]bool{}}
	eventually(t, 3*time.Minute, "a node restarts", func() error {
		st, err := watch.look(t)
		if err == nil && st.away() == "" {
			err = fmt.Errorf("no node restarts: %+v", st)
		}
		return err
	})
	kill()
	if err := <-client; err == nil {
		t.Error("the command that was to be killed ended by itself")
	}
	if out, err := c.n.try(t.Context(), time.Minute, "bhctl", order...); err == nil || !strings.Contains(err.Error(), "one at a time") {
		t.Errorf("another one meanwhile: %v\n%s", err, out)
	}
	eventually(t, rollLimit, "both have restarted", func() error {
		st, err := watch.look(t)
		switch {
		case err != nil:
			return err
		case st.State == "halted" || st.State == "aborted":
			t.Fatalf("it %s: %s", st.State, st.Detail)
		case st.State != "done":
			return fmt.Errorf("it is %s: %+v", st.State, st.Nodes)
		}
		return nil
	})
	c.states(t, time.Minute, c.ready())
	after := c.mustBoots(t)
	for _, name := range c.nodes {
		turn := slices.Contains(turns, name)
		if (after[name] != before[name]) != turn || after[name] == "" {
			t.Errorf("%s: boot %q before, %q after; its turn: %t", name, before[name], after[name], turn)
		}
		if !turn {
			continue
		}
		// Once, and in order: its own list of boots says so.
		var boots []struct {
			ID, End, Detail string
		}
		if err := c.ask(t, &boots, "-n", name, "get", "boots"); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if len(boots) < 2 || boots[1].ID != before[name] || !strings.Contains(boots[1].Detail, "rolling reboot") {
			t.Errorf("%s: boots %+v, want the one before to be %s, and to have ended by a rolling reboot", name, boots, before[name])
		}
		if !watch.seen[name] {
			t.Logf("» %s was not seen away", name)
		}
	}
	stop()
	g.Wait()
	w.report(t)
	t.Logf("» coordinators: %v", watch.coordinators)
}

// away is the node that restarts; with two it names both.
func (s rollingStatus) away() string {
	var names []string
	for _, n := range s.Nodes {
		if n.State == "restarting" || n.State == "settling" {
			names = append(names, n.Name)
		}
	}
	return strings.Join(names, " ")
}

// watcher looks at the change and at the register, and never wants two nodes away.
type watcher struct {
	c                  *cluster
	seen, coordinators map[string]bool
}

func (w *watcher) look(t *testing.T) (rollingStatus, error) {
	t.Helper()
	var st rollingStatus
	if err := w.c.ask(t, &st, "rolling", "status"); err != nil {
		return st, err
	}
	if away := st.away(); strings.Contains(away, " ") {
		t.Errorf("two nodes at once: %s", away)
	} else {
		w.seen[away] = true
	}
	w.coordinators[st.Coordinator] = true
	var nodes []struct{ Name, State string }
	if err := w.c.ask(t, &nodes, "get", "nodes"); err != nil {
		return st, err
	}
	var lost []string
	for _, n := range nodes {
		if n.State == "lost" {
			lost = append(lost, n.Name)
		}
	}
	if len(lost) > 1 {
		t.Errorf("lost at once: %v", lost)
	}
	return st, nil
}

// appendEvery is the time between two writes: more of them take the processors from the machines that restart.
const appendEvery = time.Second

// appender makes join tokens, which are writes to etcd.
type appender struct {
	c *cluster

	done    int
	longest time.Duration // between two that were acknowledged
	last    error
}

func (a *appender) run(ctx context.Context) {
	at := time.Now()
	for ctx.Err() == nil {
		if _, err := a.c.n.try(ctx, writeLimit, "bhctl", "jointoken", "create", "--role", "worker", "--ttl", "10m"); err != nil {
			a.last = err
			continue
		}
		a.done++
		a.longest, at = max(a.longest, time.Since(at)), time.Now()
		select {
		case <-ctx.Done():
		case <-time.After(appendEvery):
		}
	}
}

func (a *appender) report(t *testing.T) {
	t.Helper()
	t.Logf("» %d writes, the longest pause between two %s", a.done, a.longest.Round(100*time.Millisecond))
	if a.done < 10 || a.longest > writeLimit {
		t.Errorf("%d writes, with a pause of %s; want them to go on within %s; the last error: %v", a.done, a.longest, writeLimit, a.last)
	}
}
