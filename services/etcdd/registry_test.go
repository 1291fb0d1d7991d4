package etcdd

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func report(name, role, state, boot string) *clusterv1.ReportRequest {
	return &clusterv1.ReportRequest{Node: &clusterv1.Node{Name: name, Role: role, State: state, BootId: boot, Version: "v1", Addresses: []string{"192.0.2.1"}}}
}

// text is a list of nodes as a person would read it.
func nodesText(r *clusterv1.ListNodesResponse) string {
	var out []string
	for _, n := range r.GetNodes() {
		out = append(out, fmt.Sprintf("%s %s %s %s", n.GetName(), n.GetRole(), n.GetState(), strings.Join(n.GetAddresses(), ",")))
	}
	return strings.Join(out, "; ")
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	var skew atomic.Int64 // added to the clock
	n.clock = func() time.Time { return time.Now().Add(time.Duration(skew.Load())) }
	n.start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	c := n.registry(t)
	if _, err := c.ListNodes(ctx, &clusterv1.ListNodesRequest{}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("list without a member: %v, want Unavailable", err)
	}
	n.volume(t)
	n.until(t, converged)
	w := &watcher{t: t}
	w.open(ctx, c)

	worker := asNode(ctx, "w1", peer.RoleWorker)
	if _, err := c.Report(worker, report("w1", "worker", "ready", "a")); err != nil {
		t.Fatal(err)
	}
	w.until("w1 worker ready 192.0.2.1")
	// This node's machined needs no apid.
	machined := clusterv1.NewRegistryClient(n.dial(t, uid.Machined))
	if _, err := machined.Report(ctx, report("n1", "controlplane", "not ready", "b")); err != nil {
		t.Fatal(err)
	}
	w.until("n1 controlplane not ready 192.0.2.1; w1 worker ready 192.0.2.1")
	t.Run("refused", func(t *testing.T) { reportsRefused(ctx, t, c, machined) })

	t.Run("anchors", func(t *testing.T) { auditAnchors(ctx, t, c, worker, &skew, w) })

	// What the cluster has seen counts more than what a node says.
	state := n.ca.State()
	state.Nodes = []*trustv1.ClusterNode{{Name: "n1", Role: "controlplane", Addresses: []string{"127.0.0.1"}}, {Name: "w1", Role: "worker", Addresses: []string{"198.51.100.7"}}}
	n.trust.Set(state)
	w.until("n1 controlplane not ready 127.0.0.1; w1 worker ready 198.51.100.7")

	skew.Add(int64(lostAfter - 5*time.Second))
	if _, err := c.Report(worker, report("w1", "worker", "ready", "a")); err != nil {
		t.Fatal(err)
	}
	skew.Add(int64(6 * time.Second))
	w.until("n1 controlplane lost 127.0.0.1; w1 worker ready 198.51.100.7")

	// A disk was copied: the second machine reports, and the first one goes on.
	if _, err := c.Report(worker, report("w1", "worker", "ready", "c")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Report(worker, report("w1", "worker", "ready", "a")); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "one has a copy of the other's disk") {
		t.Errorf("the first machine reports again: %v, want that it hears of the other", err)
	}
	l := w.until("n1 controlplane lost 127.0.0.1; w1 worker not ready 198.51.100.7")
	if d := l.GetNodes()[1].GetDetail(); !strings.Contains(d, "two machines report under this name") {
		t.Errorf("detail is %q, want that two machines have one name", d)
	}
	n.tells(t, `two machines report under the name \"w1\"`)
	// Another machine under the same name has another key: what the old one reported is not told of it.
	members := func(w1 ...*trustv1.ClusterNode) {
		state := n.ca.State()
		state.Nodes = append([]*trustv1.ClusterNode{{Name: "n1", Role: "controlplane", Addresses: []string{"127.0.0.1"}}}, w1...)
		n.trust.Set(state)
	}
	skew.Add(int64(2 * clashShown))
	old := &trustv1.ClusterNode{Name: "w1", Role: "worker", Addresses: []string{"198.51.100.9"}, Key: "old"}
	members(old)
	w.until("n1 controlplane lost 127.0.0.1; w1 worker lost 198.51.100.9")
	if _, err := c.Report(worker, report("w1", "worker", "ready", "a")); err != nil {
		t.Fatal(err)
	}
	w.until("n1 controlplane lost 127.0.0.1; w1 worker ready 198.51.100.9")
	members(&trustv1.ClusterNode{Name: "w1", Role: "worker", Addresses: []string{"198.51.100.8"}, Key: "new"})
	w.until("n1 controlplane lost 127.0.0.1")
	members(old)
	w.until("n1 controlplane lost 127.0.0.1; w1 worker ready 198.51.100.9")
	// Who was removed from the cluster goes from the list with its membership, not when it has been silent for long enough.
	members()
	w.until("n1 controlplane lost 127.0.0.1")

	if l, err := n.as(t, "etcd-root").Leases(ctx); err != nil || len(l.Leases) != 2 {
		t.Errorf("leases: %v, %v, want one for each node", l, err)
	}
	// The list outlives etcdd, and so does when a node was heard of last.
	n.stop(t)
	n.start(t)
	n.until(t, converged)
	w.open(ctx, n.registry(t))
	w.until("n1 controlplane lost 127.0.0.1")
}

// A watcher follows the list.
type watcher struct {
	t      *testing.T
	first  *clusterv1.ListNodesResponse // nil once it was looked at
	stream interface {
		Recv() (*clusterv1.ListNodesResponse, error)
	}
}

// open waits for the first list; before the member has been read there is none.
func (w *watcher) open(ctx context.Context, c clusterv1.RegistryClient) {
	w.t.Helper()
	for {
		s, err := c.WatchNodes(ctx, &clusterv1.WatchNodesRequest{})
		if err == nil {
			w.first, err = s.Recv()
		}
		if w.stream = s; err == nil {
			return
		}
		if !errs.Is(err, errs.Unavailable) || wait(ctx, 50*time.Millisecond) != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *watcher) until(want string) *clusterv1.ListNodesResponse {
	w.t.Helper()
	for {
		l, err := w.first, error(nil)
		if w.first = nil; l == nil {
			l, err = w.stream.Recv()
		}
		if err != nil {
			w.t.Fatalf("no list %q: %v", want, err)
		}
		if nodesText(l) == want {
			return l
		}
		w.t.Log(nodesText(l))
	}
}

func reportsRefused(ctx context.Context, t *testing.T, c, machined clusterv1.RegistryClient) {
	worker := asNode(ctx, "w1", peer.RoleWorker)
	long := report("w1", "worker", "ready", "a")
	long.Node.Detail = strings.Repeat("x", 2000)
	nowhere := report("w1", "worker", "ready", "a")
	nowhere.Node.Addresses = []string{"somewhere"}
	for _, x := range []struct {
		name string
		ctx  context.Context
		c    clusterv1.RegistryClient
		r    *clusterv1.ReportRequest
		kind errs.Kind
		text string
	}{
		{"of another node", worker, c, report("n1", "controlplane", "ready", "a"), errs.Denied, "of itself only"},
		{"as another role", worker, c, report("w1", "controlplane", "ready", "a"), errs.Denied, `joined as "worker"`},
		{"by a person", ctx, c, report("w1", "worker", "ready", "a"), errs.Denied, "of itself only"},
		{"of another node by machined", ctx, machined, report("w1", "worker", "ready", "a"), errs.Denied, "of itself only"},
		{"lost, by itself", worker, c, report("w1", "worker", "lost", "a"), errs.Invalid, `allowed are "ready"`},
		{"long", worker, c, long, errs.Invalid, "at most 1024"},
		{"no address", worker, c, nowhere, errs.Invalid, "is none"},
	} {
		if _, err := x.c.Report(x.ctx, x.r); !errs.Is(err, x.kind) || !strings.Contains(errs.Text(err), x.text) {
			t.Errorf("report %s: %v, want %q", x.name, err, x.text)
		}
	}
	if _, err := machined.ListNodes(ctx, &clusterv1.ListNodesRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("machined lists nodes: %v, want Denied", err)
	}
}
