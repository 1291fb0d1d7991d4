package etcdd

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// trioOfReporters is three control planes with real members, and their machineds, which take turns in this goroutine.
type trioOfReporters struct {
	nodes  []*node
	boots  map[string]int
	orders []string // names, in the order in which they were told to restart
	conns  map[string]*grpc.ClientConn
}

// dial is a connection to a node's socket, one for each of its lives.
func (x *trioOfReporters) dial(t *testing.T, n *node, id uid.ID) *grpc.ClientConn {
	t.Helper()
	key := n.sock + " " + id.Name()
	if x.conns[key] == nil {
		x.conns[key] = n.dial(t, id)
	}
	return x.conns[key]
}

// up returns those that run, beginning with one.
func (x *trioOfReporters) up(first *node) []*node {
	var out []*node
	for _, n := range append([]*node{first}, x.nodes...) {
		if n.halt != nil && (len(out) == 0 || n != first) {
			out = append(out, n)
		}
	}
	return out
}

// report tells the cluster of a node at whichever control plane answers, as apid does, and returns what it is to do.
func (x *trioOfReporters) report(ctx context.Context, t *testing.T, n *node) *clusterv1.Order {
	t.Helper()
	st := &clusterv1.Node{Name: n.name, Role: "controlplane", State: "ready", Version: "1", BootId: fmt.Sprint(n.name, "-", x.boots[n.name])}
	if s := n.status(t); s.GetState() != "running" {
		st.State, st.Detail = "not ready", "etcd.converged: "+s.GetDetail()
	}
	for _, at := range x.up(n) {
		r, err := clusterv1.NewRegistryClient(x.dial(t, at, uid.Apid)).Report(asNode(ctx, n.name, peer.RoleControlPlane), &clusterv1.ReportRequest{Node: st})
		if err == nil {
			return r.GetOrder()
		}
		if !errs.Is(err, errs.Unavailable) {
			t.Fatalf("%s reports at %s: %v", n.name, at.name, err)
		}
	}
	return nil
}

// restart is what a machine does with an order. The others must be well when it comes, and take writes while it is away.
func (x *trioOfReporters) restart(ctx context.Context, t *testing.T, n *node) {
	t.Helper()
	x.orders = append(x.orders, n.name)
	for _, other := range x.up(n)[1:] {
		if st := other.status(t); st.GetState() != "running" {
			t.Errorf("%s is to restart while %s is %v", n.name, other.name, st)
		}
	}
	if len(x.up(n)) != 3 {
		t.Errorf("%s is to restart while another one is away", n.name)
	}
	n.stop(t)
	other := x.up(n)[0]
	for begin := time.Now(); ; {
		_, err := storev1.NewStoreClient(x.dial(t, other, uid.Trustd)).Write(ctx, &storev1.WriteRequest{Changes: []*storev1.Change{{Key: own + "while-" + n.name, Value: []byte("x")}}})
		if err == nil {
			break
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatalf("no writes while %s is away: %v", n.name, err)
		}
	}
	x.boots[n.name]++
	n.start(t)
	n.until(t, converged)
}

// status asks whoever answers.
func (x *trioOfReporters) status(ctx context.Context, t *testing.T) *clusterv1.RollingStatus {
	t.Helper()
	for _, at := range x.up(x.nodes[0]) {
		if st, err := clusterv1.NewRollingClient(x.dial(t, at, uid.Apid)).GetStatus(ctx, &clusterv1.GetStatusRequest{}); err == nil {
			return st
		}
	}
	return nil
}

// Three members restart in turn, the one that carries the change out too, and their leader last; writes go on.
func TestRollingMembers(t *testing.T) {
	x := &trioOfReporters{nodes: trio(t), boots: map[string]int{}, conns: map[string]*grpc.ClientConn{}}
	for _, n := range x.nodes[1:] {
		n.start(t)
		n.until(t, converged)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	leader := ""
	for _, n := range x.nodes {
		x.report(ctx, t, n)
		if n.status(t).GetLeader() {
			leader = n.name
		}
	}
	registered(ctx, t, x.nodes[0], 3)
	if _, err := clusterv1.NewRollingClient(x.nodes[0].dial(t, uid.Apid)).Start(ctx, &clusterv1.StartRequest{Kind: "reboot"}); err != nil {
		t.Fatal(err)
	}
	coordinators := map[string]bool{}
	for ctx.Err() == nil {
		st := x.status(ctx, t)
		coordinators[st.GetCoordinator()] = true
		if st.GetState() == "done" {
			break
		}
		if st != nil && st.GetState() != "running" {
			t.Fatalf("it is %v", st)
		}
		for _, n := range x.nodes {
			if o := x.report(ctx, t, n); o != nil && o.GetBootId() == fmt.Sprint(n.name, "-", x.boots[n.name]) {
				x.restart(ctx, t, n)
			}
		}
		_ = wait(ctx, 50*time.Millisecond)
	}
	if len(x.orders) != 3 || x.orders[2] != leader || strings.Count(strings.Join(x.orders, " "), "n") != 3 {
		t.Errorf("restarted: %v, want each once, and %s, which led, last", x.orders, leader)
	}
	if delete(coordinators, ""); len(coordinators) < 2 {
		t.Errorf("carried out by %v, want it to change hands, for each of them restarted", coordinators)
	}
	for _, n := range x.nodes {
		if x.boots[n.name] != 1 {
			t.Errorf("%s restarted %d times", n.name, x.boots[n.name])
		}
		if st := n.status(t); st.GetState() != "running" || len(st.GetMembers()) != 3 {
			t.Errorf("%s: %v", n.name, st)
		}
	}
}
