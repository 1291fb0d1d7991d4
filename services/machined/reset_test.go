package machined

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// modelOthers are storaged and etcdd, as a reset sees them.
type modelOthers struct {
	members int
	gone    bool
	asked   error // instead of members
	stay    error // of LeaveEtcd
	listed  error // of LeaveCluster
	before  error // of Destroy, before there is no way back
	after   error // the same, afterwards
	calls   []string
}

func (m *modelOthers) Members(context.Context) (int, bool, error) { return m.members, m.gone, m.asked }

func (m *modelOthers) LeaveEtcd(context.Context) error {
	m.calls = append(m.calls, "leave etcd")
	return m.stay
}

func (m *modelOthers) LeaveCluster(context.Context) error {
	m.calls = append(m.calls, "leave the cluster")
	return m.listed
}

func (m *modelOthers) Destroy(_ context.Context, removeOS, force bool, say func(string, bool)) ([]string, error) {
	call := "destroy"
	if removeOS {
		call += " with the system"
	}
	if force {
		call += " by force"
	}
	m.calls = append(m.calls, call)
	say("give the TPM back", false)
	if m.before != nil {
		return nil, m.before
	}
	say("reset begin", true)
	if m.after != nil {
		return nil, m.after
	}
	return []string{"all is gone"}, nil
}

// reset calls Reset and returns the steps and the last message's facts.
func reset(t *testing.T, d *Daemon, r *machinev1.ResetRequest) (steps, facts []string, err error) {
	t.Helper()
	err = (&machineServer{d: d}).Reset(r, stream[machinev1.ResetProgress]{ctx: t.Context(), send: func(p *machinev1.ResetProgress) error {
		if p.Step != "" {
			steps = append(steps, p.Step)
		}
		facts = append(facts, p.Facts...)
		return nil
	}})
	return steps, facts, err
}

// TestReset: what uses the volumes is stopped in order, nothing is written to STATE any more, and the machine goes down.
func TestReset(t *testing.T) {
	for _, c := range []struct {
		order  *machinev1.ResetRequest
		call   string
		orders []string
	}{
		{&machinev1.ResetRequest{Node: "a"}, "destroy", []string{"stop kubeletd", "stop updated", "stop kubelet", "stop etcdd", "reboot"}},
		{&machinev1.ResetRequest{Node: "a", RemoveOs: true, PowerOff: true, Force: true}, "destroy with the system by force", []string{"stop kubeletd", "stop updated", "stop kubelet", "stop etcdd", "power off"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t)
			n.host.mounted = true
			n.init.set("kubelet", "up")
			d, stop := n.start()
			defer stop()
			if _, err := apply(d, doc("a")); err != nil {
				t.Fatal(err)
			}
			steps, facts, err := reset(t, d, c.order)
			if err != nil || !slices.Equal(facts, []string{"all is gone"}) || !slices.Equal(steps, []string{"stop kubeletd, updated", "stop kubelet", "stop etcdd", "give the TPM back", "reset begin"}) {
				t.Fatalf("%q, %q, %v", steps, facts, err)
			}
			written := n.written(t)
			time.Sleep(time.Hour)
			if !slices.Equal(n.others.calls, []string{c.call}) || !slices.Equal(n.init.did(), c.orders) {
				t.Errorf("calls %q, orders %q", n.others.calls, n.init.did())
			}
			if now := n.written(t); now != written {
				t.Errorf("STATE was written to afterwards:\n%s\nwas\n%s", now, written)
			}
			start := time.Now()
			if _, err := apply(d, doc("b")); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "the node is being reset") || time.Since(start) != 0 {
				t.Errorf("an apply to a node that is no more: %v, after %s; want a refusal at once", err, time.Since(start))
			}
			if _, _, err := reset(t, d, c.order); !errs.Is(err, errs.Unavailable) {
				t.Errorf("once more: %v", err)
			}
		})
	}
}

// written is all that machined has on STATE.
func (n *node) written(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	files, err := filepath.Glob(n.past.folder + "/*/*")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(f + "\n" + string(data))
	}
	n.host.mu.Lock()
	defer n.host.mu.Unlock()
	for name, data := range n.host.files {
		b.WriteString(name + "\n" + string(data))
	}
	return b.String()
}

// What is refused, or fails before there is no way back, leaves the node as it was.
func TestResetRefused(t *testing.T) {
	order := &machinev1.ResetRequest{Node: "a"}
	for name, c := range map[string]struct {
		spoil func(*modelOthers)
		order *machinev1.ResetRequest
		kind  errs.Kind
		want  string
	}{
		"another node":       {func(*modelOthers) {}, &machinev1.ResetRequest{Node: "b"}, errs.Invalid, `node: "b" is not the name of this node, and nothing was changed: its name is "a"`},
		"no node":            {func(*modelOthers) {}, &machinev1.ResetRequest{}, errs.Invalid, `its name is "a"`},
		"one of three":       {func(m *modelOthers) { m.members, m.stay = 3, errs.New(errs.Precondition, "no quorum") }, order, errs.Precondition, "one of 3 members of etcd and cannot leave now: no quorum; nothing was destroyed. By force"},
		"left, and then":     {func(m *modelOthers) { m.members, m.before = 3, errs.New(errs.Precondition, "the TPM does not") }, order, errs.Precondition, "the TPM does not; this node has left etcd, and comes back with: bhctl etcd rejoin"},
		"etcdd is silent":    {func(m *modelOthers) { m.asked = errs.New(errs.Unavailable, "no answer") }, order, errs.Precondition, "etcdd does not say: no answer"},
		"storaged refuses":   {func(m *modelOthers) { m.before = errs.New(errs.Precondition, "the TPM does not") }, order, errs.Precondition, "storaged: the TPM does not"},
		"storaged is absent": {func(m *modelOthers) { m.before = errs.New(errs.Unavailable, "no answer") }, order, errs.Unavailable, "storaged: no answer"},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t)
			n.host.mounted = true
			d, stop := n.start()
			defer stop()
			if _, err := apply(d, doc("a")); err != nil {
				t.Fatal(err)
			}
			c.spoil(n.others)
			if _, _, err := reset(t, d, c.order); !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.want) {
				t.Errorf("%s: got %v, want %s", name, err, c.want)
			}
			synctest.Wait()
			units, _ := n.init.Status() // of a model: cannot fail
			for _, u := range units {
				if u.Name != "kubelet" && u.State != "up" {
					t.Errorf("%s: %s is %s", name, u.Name, u.State)
				}
			}
			if r, err := apply(d, doc("a2")); err != nil || r.GetGeneration() != 2 {
				t.Errorf("%s: the next configuration: %v, %v", name, r, err)
			}
			if orders := n.init.did(); slices.Contains(orders, "reboot") {
				t.Errorf("%s: orders %q", name, orders)
			}
			*n.others = modelOthers{members: 3}
			if _, _, err := reset(t, d, &machinev1.ResetRequest{Node: "a2", Force: true}); err != nil {
				t.Errorf("%s: by force: %v", name, err)
			}
		})
	}
}

// TestResetLeaves: a node that is one of several leaves etcd before anything is destroyed, and the cluster's list after all is.
func TestResetLeaves(t *testing.T) {
	listed := errs.New(errs.Unavailable, "no control plane can answer")
	for name, c := range map[string]struct {
		others modelOthers
		doc    string
		force  bool
		calls  []string
		facts  []string
	}{
		"one of three":            {modelOthers{members: 3}, doc("a"), false, []string{"leave etcd", "destroy", "leave the cluster"}, []string{"all is gone"}},
		"the only one":            {modelOthers{members: 1}, doc("a"), false, []string{"destroy"}, []string{"all is gone"}},
		"it left before":          {modelOthers{gone: true}, doc("a"), false, []string{"destroy", "leave the cluster"}, []string{"all is gone"}},
		"in no cluster yet":       {modelOthers{}, doc("a"), false, []string{"destroy"}, []string{"all is gone"}},
		"a worker":                {modelOthers{}, doc("a") + "role: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.0.0.5:6443\n", false, []string{"destroy", "leave the cluster"}, []string{"all is gone"}},
		"by force":                {modelOthers{members: 3}, doc("a"), true, []string{"destroy by force"}, []string{"all is gone"}},
		"nobody takes note of it": {modelOthers{members: 2, listed: listed}, doc("a"), false, []string{"leave etcd", "destroy", "leave the cluster"}, []string{"all is gone", "The cluster may have this node on its list still; at another node, run: bhctl node remove a (no control plane can answer)"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := newNode(t)
			n.host.mounted = true
			d, stop := n.start()
			defer stop()
			if _, err := apply(d, c.doc); err != nil {
				t.Fatal(err)
			}
			*n.others = c.others
			_, facts, err := reset(t, d, &machinev1.ResetRequest{Node: "a", Force: c.force})
			if err != nil || !slices.Equal(n.others.calls, c.calls) || !slices.Equal(facts, c.facts) {
				t.Errorf("%s: calls %q, facts %q, %v; want %q, %q", name, n.others.calls, facts, err, c.calls, c.facts)
			}
			time.Sleep(time.Minute)
			if orders := n.init.did(); orders[len(orders)-1] != "reboot" {
				t.Errorf("%s: orders %q", name, orders)
			}
		})
	}
}

// What was begun is gone on with: by the next start, after a failure; by the next process, if this one ends.
func TestResetGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		if _, err := apply(d, doc("a")); err != nil {
			t.Fatal(err)
		}
		n.others.after = errs.New(errs.Internal, "a disk that fails")
		if _, facts, err := reset(t, d, &machinev1.ResetRequest{Node: "a", PowerOff: true}); err == nil || len(facts) > 0 || !strings.Contains(errs.Text(err), "a disk that fails") {
			t.Errorf("%q, %v", facts, err)
		}
		time.Sleep(time.Minute)
		if orders := n.init.did(); orders[len(orders)-1] != "reboot" {
			t.Errorf("orders %q", orders)
		}
		stop()

		*n.others = modelOthers{}
		d, stop = n.start()
		defer stop()
		time.Sleep(time.Minute)
		if orders := n.init.did(); !slices.Equal(n.others.calls, []string{"destroy"}) || orders[len(orders)-1] != "power off" {
			t.Errorf("calls %q, orders %q", n.others.calls, orders)
		}
		start := time.Now()
		if _, err := apply(d, doc("b")); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "the node is being reset") || time.Since(start) != 0 {
			t.Errorf("an apply to a node that is no more: %v, after %s; want a refusal at once", err, time.Since(start))
		}
	})
}
