package machine

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// TestNodes is the life of a cluster of three control planes and a worker, without Kubernetes, on an Ethernet between their machines: each node answers through any other,
// one is killed, one burns down and is replaced, what would lose the quorum is refused, and two restart in turn.
func TestNodes(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	c := &cluster{n: n, image: n.build(t, otherImage{version: "9.1.0"}), nodes: []string{"test-1", "test-2", "test-3", "test-w1"}}
	start := time.Now()
	c.up(t)
	t.Logf("» four nodes are ready after %s", time.Since(start).Round(time.Second))
	before := c.keys(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"again changes nothing", func(t *testing.T) {
			c.up(t)
			if now := c.keys(t); fmt.Sprint(now) != fmt.Sprint(before) {
				t.Errorf("members were %v, are %v", before, now)
			}
		}},
		{"every node through any other", c.forwards},
		{"a control plane is killed", c.survives},
		{"a machine burns down", func(t *testing.T) { c.replaces(t, before) }},
		{"no quorum is lost by order", c.keepsQuorum},
		{"a rolling restart", c.rolls},
		{"a reset leaves the cluster", c.resets},
	} {
		if !t.Run(part.name, part.run) {
			t.FailNow()
		}
	}
}

// cluster is the machines of "bhctl up --controlplanes 3 --workers 1".
type cluster struct {
	n     *node
	image string
	nodes []string
}

func (c *cluster) up(t *testing.T) {
	t.Helper()
	if out, err := c.n.try(t.Context(), 10*time.Minute, "bhctl", "up", "--name", c.n.name, "--controlplanes", "3", "--workers", "1", "--image", c.image, "--memory", "1024", "--cpus", "1"); err != nil {
		t.Fatalf("bhctl up: %v\n%s", err, out)
	}
}

// ask decodes what a command prints with -o json.
func (c *cluster) ask(t *testing.T, into any, args ...string) error {
	t.Helper()
	out, err := c.n.try(t.Context(), time.Minute, "bhctl", append(args, "-o", "json")...)
	if err == nil {
		err = json.Unmarshal([]byte(out), into)
	}
	return err
}

// keys are the members' public keys by name.
func (c *cluster) keys(t *testing.T) map[string]string {
	t.Helper()
	var members []struct{ Name, Key string }
	if err := c.ask(t, &members, "get", "members"); err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{}
	for _, m := range members {
		keys[m.Name] = m.Key
	}
	if len(keys) != len(c.nodes) {
		t.Errorf("members: %v, want %v", keys, c.nodes)
	}
	return keys
}

// states waits until the nodes are as wanted, by the cluster's own register.
func (c *cluster) states(t *testing.T, limit time.Duration, want map[string]string) {
	t.Helper()
	eventually(t, limit, fmt.Sprintf("the register says %v", want), func() error {
		var nodes []struct{ Name, State, Detail string }
		if err := c.ask(t, &nodes, "get", "nodes"); err != nil {
			return err
		}
		have := map[string]string{}
		for _, n := range nodes {
			have[n.Name] = n.State
			if want[n.Name] != n.State {
				return fmt.Errorf("%s is %s: %s", n.Name, n.State, n.Detail)
			}
		}
		if len(have) != len(want) {
			return fmt.Errorf("nodes: %v", have)
		}
		return nil
	})
}

func (c *cluster) ready() map[string]string {
	all := map[string]string{}
	for _, n := range c.nodes {
		all[n] = "ready"
	}
	return all
}

// voters returns the names of etcd's voters, in order.
func (c *cluster) voters(t *testing.T) []string {
	t.Helper()
	var members []struct {
		Name    string
		Learner bool
	}
	if err := c.ask(t, &members, "etcd", "members"); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range members {
		if !m.Learner {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	return names
}

// machine is one of the cluster's.
func (c *cluster) machine(t *testing.T, name string) qemu.Machine {
	t.Helper()
	m, err := qemu.Load(name)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// forwards asks every node at every control plane, and a worker for another node, which it does not pass on.
func (c *cluster) forwards(t *testing.T) {
	for _, door := range c.nodes[:3] {
		endpoint := fmt.Sprintf("127.0.0.1:%d", c.machine(t, door).Port(50000))
		var answers []struct {
			Node   string
			Result struct{ Version string }
			Error  string
		}
		if err := c.ask(t, &answers, "--endpoint", endpoint, "--all", "version"); err != nil {
			t.Fatalf("through %s: %v", door, err)
		}
		var names []string
		for _, a := range answers {
			if names = append(names, a.Node); a.Result.Version == "" {
				t.Errorf("through %s: %s says %+v", door, a.Node, a)
			}
		}
		if !slices.Equal(names, c.nodes) {
			t.Errorf("through %s: %v answer, want %v", door, names, c.nodes)
		}
	}
	// Each is itself: the host's name is in what it answers.
	for _, name := range c.nodes {
		if out := c.n.run(t, "bhctl", "-n", name, "get", "config"); !strings.Contains(out, "hostname: "+name+"\n") {
			t.Errorf("-n %s: another node's document:\n%s", name, out)
		}
	}
	worker := fmt.Sprintf("127.0.0.1:%d", c.machine(t, "test-w1").Port(50000))
	if out, err := c.n.try(t.Context(), time.Minute, "bhctl", "--endpoint", worker, "-n", "test-2", "version"); err == nil || !strings.Contains(err.Error(), "is a worker and passes no calls on; ask a control plane: test-1") {
		t.Errorf("a worker passes a call on: %v\n%s", err, out)
	}
	if out, err := c.n.try(t.Context(), time.Minute, "bhctl", "-n", "nobody", "version"); err == nil || !strings.Contains(err.Error(), "test-1") {
		t.Errorf("a node that is not there: %v\n%s", err, out)
	}
}

// survives kills the machine of etcd's leader: the others take writes again, say that it is lost, and have it back when it is powered on.
func (c *cluster) survives(t *testing.T) {
	leader := c.leader(t)
	m := c.machine(t, leader)
	writes := c.tokenWrites(t, 1)
	writes.start(t.Context(), c.nodes[:3]...)
	writes.beatsAt(t, time.Minute, "each takes writes", time.Now(), c.nodes[:3]...)
	writes.takesOver(t, "writes", c.dies(t, leader))
	writes.end()
	lost := c.ready()
	lost[leader] = "lost"
	c.states(t, 2*time.Minute, lost)
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	c.states(t, 4*time.Minute, c.ready())
	if v := c.voters(t); !slices.Equal(v, c.nodes[:3]) {
		t.Errorf("voters: %v", v)
	}
}

// leader returns the name of the node whose member leads.
func (c *cluster) leader(t *testing.T) string {
	t.Helper()
	for _, name := range c.nodes[:3] {
		var st struct{ Leader bool }
		if err := c.ask(t, &st, "-n", name, "etcd", "status"); err != nil {
			t.Fatal(err)
		}
		if st.Leader {
			return name
		}
	}
	t.Fatal("no member leads")
	return ""
}

// replaces takes a control plane away for good, and makes another of its name, which is not the old one.
func (c *cluster) replaces(t *testing.T, before map[string]string) {
	c.n.run(t, "bhctl", "down", "--name", "test-3")
	if out, err := c.n.try(t.Context(), 3*time.Minute, "bhctl", "node", "remove", "test-3", "--yes"); err != nil {
		t.Fatalf("node remove: %v\n%s", err, out)
	}
	if v := c.voters(t); !slices.Equal(v, []string{"test-1", "test-2"}) {
		t.Errorf("voters: %v", v)
	}
	c.up(t)
	c.states(t, 2*time.Minute, c.ready())
	if v := c.voters(t); !slices.Equal(v, c.nodes[:3]) {
		t.Errorf("voters: %v", v)
	}
	after := c.keys(t)
	if after["test-3"] == before["test-3"] || after["test-1"] != before["test-1"] || after["test-w1"] != before["test-w1"] {
		t.Errorf("keys were %v, are %v", before, after)
	}
}

// keepsQuorum has one member away: the cluster must refuse to give up another.
func (c *cluster) keepsQuorum(t *testing.T) {
	m := c.machine(t, "test-2")
	killed := c.mustBoots(t)["test-2"]
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the others take writes", func() error {
		_, err := c.n.try(t.Context(), 20*time.Second, "bhctl", "jointoken", "create", "--role", "worker")
		return err
	})
	if out, err := c.n.try(t.Context(), time.Minute, "bhctl", "-n", "test-1", "etcd", "remove", "test-3"); err == nil || !strings.Contains(err.Error(), "quorum") {
		t.Errorf("a member is removed while another is away: %v\n%s", err, out)
	}
	if out, err := c.n.try(t.Context(), 2*time.Minute, "bhctl", "-n", "test-1", "reset", "--yes"); err == nil || !strings.Contains(err.Error(), "quorum") || !strings.Contains(err.Error(), "nothing was destroyed") {
		t.Errorf("a member is reset while another is away: %v\n%s", err, out)
	}
	if v := c.voters(t); !slices.Equal(v, c.nodes[:3]) {
		t.Errorf("voters: %v", v)
	}
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	// The register may still hold what the killed boot said last, which was ready.
	eventually(t, 4*time.Minute, "test-2 reports its new boot", func() error {
		now, err := c.boots(t)
		if err == nil && now["test-2"] == killed {
			err = fmt.Errorf("the register still tells boot %s", killed)
		}
		return err
	})
	c.states(t, 4*time.Minute, c.ready())
}

// resets has a control plane and the worker destroyed by their own order: each is out of etcd and off the cluster's list afterwards, without another word.
func (c *cluster) resets(t *testing.T) {
	for _, name := range []string{"test-3", "test-w1"} {
		out, err := c.n.try(t.Context(), 4*time.Minute, "bhctl", "-n", name, "reset", "--yes")
		if err != nil || strings.Contains(out, "bhctl node remove") {
			t.Fatalf("reset %s: %v\n%s", name, err, out)
		}
	}
	if v := c.voters(t); !slices.Equal(v, c.nodes[:2]) {
		t.Errorf("voters: %v", v)
	}
	eventually(t, time.Minute, "the two are off the list", func() error {
		var members []struct{ Name string }
		if err := c.ask(t, &members, "get", "members"); err != nil || len(members) != 2 {
			return fmt.Errorf("members: %v, %v", members, err)
		}
		return nil
	})
	c.states(t, 2*time.Minute, map[string]string{"test-1": "ready", "test-2": "ready"})
}
