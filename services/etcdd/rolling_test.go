package etcdd

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// reports is a node's machined: it says how the node is, and restarts when it is told to.
type reports struct {
	mu     sync.Mutex
	boots  int      // guarded by mu
	orders []string // guarded by mu
}

func (r *reports) run(ctx context.Context, t *testing.T, c clusterv1.RegistryClient, name, role string) {
	for ctx.Err() == nil {
		r.mu.Lock()
		boot := fmt.Sprint("boot-", r.boots)
		r.mu.Unlock()
		resp, err := c.Report(ctx, &clusterv1.ReportRequest{Node: &clusterv1.Node{Name: name, Role: role, State: "ready", Version: "1", BootId: boot}})
		if err != nil && ctx.Err() == nil {
			t.Errorf("%s: report: %v", name, err)
			return
		}
		if o := resp.GetOrder(); o != nil {
			r.mu.Lock()
			r.boots++
			r.orders = append(r.orders, o.GetBootId()+" "+o.GetText())
			r.mu.Unlock()
		}
		_ = wait(ctx, 50*time.Millisecond)
	}
}

// A change that is ordered, watched, and carried out, over the socket: what nodes are told comes in the answers to their reports.
func TestRolling(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	n := newNode(t, ca, "n1", "127.0.0.1")
	n.volume(t)
	state := ca.State()
	state.Nodes = []*trustv1.ClusterNode{{Name: "n1", Role: "controlplane", Addresses: []string{"127.0.0.1"}}, {Name: "w1", Role: "worker", Addresses: []string{"127.0.0.2"}}}
	n.start(t)
	n.until(t, converged)
	n.trust.Set(state)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := clusterv1.NewRollingClient(n.dial(t, uid.Apid))
	if st, err := c.GetStatus(ctx, &clusterv1.GetStatusRequest{}); err != nil || st.GetState() != "none" {
		t.Errorf("before any: %v, %v, want none", st, err)
	}
	if _, err := c.Abort(ctx, &clusterv1.AbortRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "nothing to abort") {
		t.Errorf("abort of nothing: %v", err)
	}
	local, far := &reports{}, &reports{}
	var g sync.WaitGroup
	defer g.Wait()
	defer cancel()
	g.Go(func() { local.run(ctx, t, clusterv1.NewRegistryClient(n.dial(t, uid.Machined)), "n1", "controlplane") })
	g.Go(func() { far.run(asNode(ctx, "w1", peer.RoleWorker), t, n.registry(t), "w1", "worker") })
	registered(ctx, t, n, 2)

	alice := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "alice", peer.RolesKey, "operator")
	for _, bad := range []struct {
		r    *clusterv1.StartRequest
		kind errs.Kind
		text string
	}{
		{&clusterv1.StartRequest{Kind: "dance"}, errs.Invalid, `kind: "dance"; allowed are "reboot" and "upgrade"`},
		{&clusterv1.StartRequest{Kind: "upgrade"}, errs.Invalid, `"upgrade" needs one`},
		{&clusterv1.StartRequest{Kind: "reboot", OnTimeout: "pray"}, errs.Invalid, `allowed are "halt" and "force"`},
		{&clusterv1.StartRequest{Kind: "reboot", DrainTimeoutSeconds: 1e6}, errs.Invalid, "drain_timeout_seconds: 1000000; at most 86400"},
		{&clusterv1.StartRequest{Kind: "reboot", Nodes: []string{"n1", "n7"}}, errs.NotFound, `no node "n7" is registered; there are: n1, w1`},
	} {
		if _, err := c.Start(alice, bad.r); !errs.Is(err, bad.kind) || !strings.Contains(errs.Text(err), bad.text) {
			t.Errorf("%v: %v, want %q", bad.r, err, bad.text)
		}
	}
	first, err := c.Start(alice, &clusterv1.StartRequest{Kind: "reboot"})
	if err != nil {
		t.Fatal(err)
	}
	id := first.GetStatus().GetId()
	if _, err := c.Start(alice, &clusterv1.StartRequest{Kind: "reboot"}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "rolling reboot "+id+", ordered by alice, is running") {
		t.Errorf("a second one: %v, want the first to be named", err)
	}
	followed(ctx, t, n)
	last := watched(ctx, t, c)
	if last.GetState() != "done" || last.GetId() != id || last.GetOrderedBy() != "alice" || last.GetCoordinator() != "" || last.GetEnded() == nil {
		t.Errorf("in the end: %v", last)
	}
	if names := fmt.Sprint(last.GetNodes()[0].GetName(), last.GetNodes()[1].GetName()); names != "n1w1" {
		t.Errorf("order: %s, want control planes first", names)
	}
	figures := fmt.Sprint(n.cfg.Env.Metrics.Families())
	for _, want := range []string{"bulkhead_etcdd_rolling_change", "bulkhead_etcdd_rolling_nodes_left"} {
		if !strings.Contains(figures, want) {
			t.Errorf("no metric %s", want)
		}
	}
	if !strings.Contains(figures, `"done"`) || strings.Contains(figures, `"running"`) {
		t.Errorf("metrics do not say that it is done, and nothing else: %s", figures)
	}
	for _, r := range []*reports{local, far} {
		r.mu.Lock()
		if len(r.orders) != 1 || !strings.HasPrefix(r.orders[0], "boot-0 restart: rolling reboot "+id+", ordered by alice") {
			t.Errorf("orders: %q, want one", r.orders)
		}
		r.mu.Unlock()
	}
}

// registered waits for nodes in the registry.
func registered(ctx context.Context, t *testing.T, n *node, want int) {
	t.Helper()
	c := n.registry(t)
	for ctx.Err() == nil {
		l, err := c.ListNodes(ctx, &clusterv1.ListNodesRequest{})
		if err == nil && len(l.GetNodes()) == want {
			return
		}
		_ = wait(ctx, 50*time.Millisecond)
	}
	t.Fatal("nodes are not registered in time")
}

// followed waits until the member's daemon follows the record, which it begins to a moment after the member runs.
func followed(ctx context.Context, t *testing.T, n *node) {
	t.Helper()
	c := clusterv1.NewRollingClient(n.dial(t, uid.Apid))
	for ctx.Err() == nil {
		w, err := c.WatchStatus(ctx, &clusterv1.WatchStatusRequest{})
		if err == nil {
			_, err = w.Recv()
		}
		if err == nil {
			return
		}
		_ = wait(ctx, 50*time.Millisecond)
	}
	t.Fatal("the change is not followed in time")
}

// watched follows a change to its end.
func watched(ctx context.Context, t *testing.T, c clusterv1.RollingClient) *clusterv1.RollingStatus {
	t.Helper()
	w, err := c.WatchStatus(ctx, &clusterv1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		st, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		away := 0
		for _, x := range st.GetNodes() {
			if x.GetState() == "restarting" || x.GetState() == "settling" {
				away++
			}
		}
		if away > 1 {
			t.Errorf("two at once: %v", st)
		}
		if st.GetState() != "running" {
			return st
		}
	}
}
