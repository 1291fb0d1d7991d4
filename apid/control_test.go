package apid

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// fakeRegistry is a control plane's etcdd.
type fakeRegistry struct {
	clusterv1.UnimplementedRegistryServer
	etcdv1.UnimplementedPeersServer
	name  string
	away  atomic.Bool
	stuck atomic.Bool
	calls atomic.Int32 // of Report
	seen  atomic.Pointer[string]
}

func (f *fakeRegistry) AddMember(ctx context.Context, _ *etcdv1.AddMemberRequest) (*etcdv1.AddMemberResponse, error) {
	if f.stuck.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if f.away.Load() {
		return nil, errs.New(errs.Unavailable, "no quorum")
	}
	name, control, ok := peer.NodeFrom(ctx)
	return &etcdv1.AddMemberResponse{MemberId: fmt.Sprint(f.name, " saw ", name, " ", control, " ", ok)}, nil
}

func (f *fakeRegistry) Report(ctx context.Context, _ *clusterv1.ReportRequest) (*clusterv1.ReportResponse, error) {
	f.calls.Add(1)
	if f.away.Load() {
		return nil, errs.New(errs.Unavailable, "no quorum")
	}
	name, _, ok := peer.NodeFrom(ctx)
	if !ok {
		return nil, errs.New(errs.Denied, "not from a node: %q", name)
	}
	f.seen.Store(&name)
	return &clusterv1.ReportResponse{}, nil
}

// registries starts an etcdd on each control plane.
func (c *cluster) registries() map[string]*fakeRegistry {
	out := map[string]*fakeRegistry{}
	for name, n := range c.nodes {
		if roleOf(name) == controlPlane {
			f := &fakeRegistry{name: name}
			out[name] = f
			n.serve(n.bind("etcdd"), func(s *grpc.Server) {
				clusterv1.RegisterRegistryServer(s, f)
				etcdv1.RegisterPeersServer(s, f)
			})
		}
	}
	return out
}

// A daemon of a node asks whichever control plane answers: of a control plane, itself first.
func TestControlPlanes(t *testing.T) {
	t.Parallel() // it waits for time-outs
	c := newCluster(t, "cp1", "cp2", "cp3", "w1")
	etcd := c.registries()
	ctx := with(c.nodes["w1"].ctx(), peer.NodeKey, peer.ControlPlanes)
	ask := func(node string, id uid.ID) (string, error) {
		r, err := etcdv1.NewPeersClient(c.nodes[node].as(id)).AddMember(ctx, &etcdv1.AddMemberRequest{}, grpc.WaitForReady(false))
		return r.GetMemberId(), err
	}
	got, err := ask("w1", uid.Machined)
	if err != nil || !strings.HasSuffix(got, " saw w1 false true") {
		t.Errorf("from a worker: %q, %v", got, err)
	}
	first, _, _ := strings.Cut(got, " ")
	for range 3 {
		if again, err := ask("w1", uid.Kubeletd); err != nil || again != got {
			t.Errorf("the next call: %q, %v; want the same control plane", again, err)
		}
	}
	if got, err := ask("cp2", uid.Etcdd); err != nil || got != "cp2 saw cp2 true true" {
		t.Errorf("from a control plane: %q, %v", got, err)
	}
	// Those that cannot answer, in every way, are passed over.
	etcd["cp2"].away.Store(true)
	if got, err := ask("cp2", uid.Etcdd); err != nil || !strings.HasSuffix(got, "saw cp2 true true") || strings.HasPrefix(got, "cp2") {
		t.Errorf("from a control plane whose etcdd has no quorum: %q, %v", got, err)
	}
	etcd["cp2"].away.Store(false)
	etcd[first].stuck.Store(true)
	begin := time.Now()
	if got, err := ask("w1", uid.Machined); err != nil || strings.HasPrefix(got, first) || time.Since(begin) > anyTime+2*time.Second {
		t.Errorf("the control plane asked last is stuck: %q, %v after %s", got, err, time.Since(begin))
	}
	etcd[first].stuck.Store(false)
	// A caller that has less patience than one of them is given comes to the next one all the same, by calling again.
	second, _, _ := strings.Cut(func() string { got, _ := ask("w1", uid.Machined); return got }(), " ")
	etcd[second].stuck.Store(true)
	for try := 0; ; try++ {
		short, cancel := context.WithTimeout(ctx, time.Second)
		r, err := etcdv1.NewPeersClient(c.nodes["w1"].as(uid.Machined)).AddMember(short, &etcdv1.AddMemberRequest{}, grpc.WaitForReady(false))
		cancel()
		if err == nil && !strings.HasPrefix(r.GetMemberId(), second) {
			break
		}
		if try == 3 {
			t.Fatalf("the control plane asked last is stuck, for a caller with a second: %v, %v", r, err)
		}
	}
	etcd[second].stuck.Store(false)
	for i := range 3 {
		c.answer(fmt.Sprintf("10.5.0.%d", 11+i), func(context.Context) (net.Conn, error) { return nil, errors.New("cut off") })
	}
	c.tell(func(s *trustv1.TrustState) { // new calls need new connections
		for _, n := range s.Nodes {
			n.Key += "'"
		}
	})
	c.nodes["w1"].waitTrust(func(s *trustv1.TrustState) bool { return s.GetNodes()[0].GetKey() == "cp1'" })
	_, err = ask("w1", uid.Machined)
	says(t, "none is reached", err, codes.Unavailable, "no control plane can answer", "cp1: node \"cp1\" does not answer: 10.5.0.11:50000: cut off", "cp3")
}

// Who may call through apid's socket, and what.
func TestDaemonsThroughApid(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	etcd := c.registries()
	n := c.nodes["w1"]
	report := func(ctx context.Context, id uid.ID) error {
		_, err := clusterv1.NewRegistryClient(n.as(id)).Report(ctx, &clusterv1.ReportRequest{}, grpc.WaitForReady(false))
		return err
	}
	any := with(n.ctx(), peer.NodeKey, peer.ControlPlanes)
	for _, id := range []uid.ID{uid.Machined, uid.Etcdd, uid.Kubeletd} {
		if err := report(any, id); err != nil {
			t.Errorf("%s: %v", id.Name(), err)
		}
	}
	if seen := etcd["cp1"].seen.Load(); seen == nil || *seen != "w1" {
		t.Errorf("etcdd saw %v", seen)
	}
	// A daemon's words about who it is count for nothing.
	if err := report(with(any, peer.CallerKey, "node:cp1", peer.RolesKey, "node", peer.RolesKey, "node-controlplane"), uid.Machined); err != nil || *etcd["cp1"].seen.Load() != "w1" {
		t.Errorf("%v; etcdd saw %s", err, *etcd["cp1"].seen.Load())
	}
	says(t, "without a target", report(n.ctx(), uid.Machined), codes.InvalidArgument, "machined calls through apid only with bulkhead-node: @controlplane")
	says(t, "to one node", report(on(n.ctx(), "cp1"), uid.Machined), codes.InvalidArgument, "only with")
	wantCode(t, "gateway", report(any, uid.Gateway), codes.Unauthenticated)
	wantCode(t, "trustd", report(any, uid.Trustd), codes.PermissionDenied)
	says(t, "machined reads at a control plane", getVersion(any, n.as(uid.Machined)), codes.PermissionDenied, "may not call it")
	for _, id := range []uid.ID{uid.Networkd, uid.Storaged} {
		if err := report(any, id); err == nil {
			t.Errorf("%s may call through apid", id.Name())
		}
	}
	if _, err := etcdv1.NewPeersClient(n.as(uid.Kubeletd)).AddMember(any, &etcdv1.AddMemberRequest{}); err != nil {
		t.Error(err)
	}
	lines := strings.Join(n.audits(), "\n")
	for _, want := range []string{"who=node:w1", "peer=kubeletd", "target=@controlplane", "etcd.v1.Peers/AddMember", "cluster.v1.Registry/Report"} {
		if !strings.Contains(lines, want) {
			t.Errorf("no %q in\n%s", want, lines)
		}
	}
	// Every node reports every ten seconds; of these only those that failed are in the log.
	for _, l := range n.audits() {
		if strings.Contains(l, "Registry/Report") && strings.Contains(l, "code=OK") {
			t.Errorf("a report is audited: %s", l)
		}
	}
	c.tell(func(s *trustv1.TrustState) { s.Nodes = s.Nodes[1:] })
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetNodes()) == 1 })
	says(t, "no control plane is known", report(any, uid.Machined), codes.Unavailable, "none is known yet")
}

// fakeTrial is a node's machined, for a version on trial.
type fakeTrial struct {
	machinev1.UnimplementedTrialServer
	seen atomic.Pointer[string]
}

func (f *fakeTrial) Witness(ctx context.Context, _ *machinev1.WitnessRequest) (*machinev1.WitnessResponse, error) {
	name, control, _ := peer.NodeFrom(ctx)
	name = fmt.Sprint(name, " ", control)
	f.seen.Store(&name)
	return &machinev1.WitnessResponse{}, nil
}

// etcdd of a control plane shows a node that it can be called, itself too, over the network; nobody else may name a node, and it for nothing else.
func TestWitness(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1")
	trials := map[string]*fakeTrial{}
	for name, n := range c.nodes {
		trials[name] = &fakeTrial{}
		n.serve(n.bind("machined"), func(s *grpc.Server) { machinev1.RegisterTrialServer(s, trials[name]) })
	}
	witness := func(from string, id uid.ID, to string) error {
		n := c.nodes[from]
		_, err := machinev1.NewTrialClient(n.as(id)).Witness(on(n.ctx(), to), &machinev1.WitnessRequest{}, grpc.WaitForReady(false))
		return err
	}
	for _, to := range []string{"w1", "cp2", "cp1"} {
		if err := witness("cp1", uid.Etcdd, to); err != nil {
			t.Errorf("to %s: %v", to, err)
		} else if seen := *trials[to].seen.Load(); seen != "cp1 true" {
			t.Errorf("%s saw %q, want cp1, a control plane", to, seen)
		}
	}
	says(t, "an unknown node", witness("cp1", uid.Etcdd, "w9"), codes.NotFound, `no node "w9"`)
	says(t, "another daemon", witness("cp1", uid.Machined, "w1"), codes.InvalidArgument, "only with")
	says(t, "from a worker", witness("w1", uid.Etcdd, "cp1"), codes.InvalidArgument, "only with")
	_, err := clusterv1.NewRegistryClient(c.nodes["cp1"].as(uid.Etcdd)).Report(on(c.nodes["cp1"].ctx(), "cp2"), &clusterv1.ReportRequest{}, grpc.WaitForReady(false))
	says(t, "another method", err, codes.InvalidArgument, "only with")
	_, err = machinev1.NewTrialClient(c.admin("cp1")).Witness(on(c.nodes["cp1"].ctx(), "w1"), &machinev1.WitnessRequest{})
	wantCode(t, "a person", err, codes.PermissionDenied)
}

func TestCandidates(t *testing.T) {
	trust := &trustv1.TrustState{NodeName: "a", NodeRole: "controlplane"}
	for _, n := range []string{"a", "b", "c", "d"} {
		trust.Nodes = append(trust.Nodes, &trustv1.ClusterNode{Name: n, Role: "controlplane"})
	}
	trust.Nodes = append(trust.Nodes, &trustv1.ClusterNode{Name: "w", Role: "worker"})
	names := func(own, role, last string) string {
		trust.NodeName, trust.NodeRole = own, role
		var out []string
		for _, n := range candidates(trust, last) {
			out = append(out, n.GetName())
		}
		return strings.Join(out, "")
	}
	if got := names("a", "controlplane", "c"); len(got) != 4 || !strings.HasPrefix(got, "ac") {
		t.Errorf("a control plane: %s, want itself, then who answered last, then the others", got)
	}
	begins := map[byte]bool{}
	for i := range 40 {
		got := names(fmt.Sprint("w", i), "worker", "")
		if len(got) != 4 {
			t.Fatalf("a worker: %s, want all four", got)
		}
		begins[got[0]] = true
	}
	if len(begins) != 4 {
		t.Errorf("40 workers begin with %d of 4 control planes", len(begins))
	}
	if got := names("w", "worker", "gone"); len(got) != 4 {
		t.Errorf("%s", got)
	}
}
