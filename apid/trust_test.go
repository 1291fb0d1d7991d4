package apid

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// What a certificate makes of its holder: a node, a person, or nobody.
func TestTake(t *testing.T) {
	for _, c := range []struct {
		name, roles string
		node        string
		control, ok bool
		has         string
	}{
		{"node:w1", "node node-worker", "w1", false, true, "node node-worker"},
		{"node:cp1", "node-controlplane node", "cp1", true, true, "node node-controlplane"},
		{"ann", "admin king", "", false, true, "admin"},
		{"node:w1", "node", "", false, false, ""},
		{"node:w1", "node-worker", "", false, false, ""},
		{"node:w1", "node node-worker node-controlplane", "", false, false, ""},
		{"node:w1", "admin node node-worker", "", false, false, ""},
		{"node:w1", "admin", "", false, false, ""},
		{"node:w1", "", "", false, false, ""},
		{"node:", "node node-worker", "", false, false, ""},
		{"w1", "node node-worker", "", false, false, ""},
		{"ann", "admin node", "", false, false, ""},
		{"ann", "admin node-worker", "", false, false, ""},
	} {
		id := identity{name: c.name}
		err := id.take(strings.Fields(c.roles))
		if (err == nil) != c.ok || id.node != c.node || id.control != c.control || strings.Join(id.roles, " ") != c.has {
			t.Errorf("%s with %q: %+v, %v", c.name, c.roles, id, err)
		}
	}
	if got := known([]string{"node", "node-controlplane", "reader"}); fmt.Sprint(got) != "[reader]" {
		t.Errorf("a token's roles: %v", got)
	}
	for role, want := range map[string]bool{"node": true, "node-worker": false, "admin": false, "operator": false, "reader": false} {
		if holds([]string{role}, []authv1.Role{authv1.Role_NODE}) != want || holds([]string{role}, []authv1.Role{authv1.Role_JOIN}) {
			t.Errorf("%s: what nodes may, or what joiners may", role)
		}
	}
}

// A node is what TrustState lists, with the role it lists.
func TestAdmit(t *testing.T) {
	trust := &trustv1.TrustState{Revoked: []string{"bad", "t1"}, Nodes: []*trustv1.ClusterNode{{Name: "cp1", Role: "controlplane", Key: "k"}, {Name: "w1", Role: "worker", Key: "k"}}}
	for _, c := range []struct {
		id   identity
		text string
	}{
		{identity{name: "ann", id: "ok"}, ""},
		{identity{name: "ann", id: "bad"}, "your credentials (bad) were revoked"},
		{identity{name: "ci", id: "t1"}, "were revoked"},
		{identity{node: "w1", id: "1", key: "k"}, ""},
		{identity{node: "w1", id: "1", key: "removed"}, "no node of this cluster"},
		{identity{node: "w1", id: "1"}, "no node of this cluster"},
		{identity{node: "cp1", control: true, id: "1", key: "k"}, ""},
		{identity{node: "w1", control: true, id: "1", key: "k"}, `"w1" is no node of this cluster with the role`},
		{identity{node: "cp1", id: "1", key: "k"}, "no node of this cluster"},
		{identity{node: "w2", id: "1"}, "no node of this cluster"},
		{identity{node: "w1", id: "bad"}, "were revoked"},
	} {
		err := admit(c.id, trust)
		if (err == nil) != (c.text == "") || err != nil && (!strings.Contains(err.Error(), c.text) || !errs.Is(err, errs.Unauthenticated)) {
			t.Errorf("%+v: %v, want %q", c.id, err, c.text)
		}
	}
}

// within is what DESIGN promises about revocation.
const within = 5 * time.Second

func (c *cluster) revoke(t *testing.T, ids ...string) time.Time {
	t.Helper()
	c.tell(func(s *trustv1.TrustState) { s.Revoked = append(s.Revoked, ids...) })
	return time.Now()
}

// streaming opens a stream that says something now and then nothing.
func streaming(t *testing.T, ctx context.Context, conn *grpc.ClientConn) grpc.ClientStream {
	t.Helper()
	s, err := conn.NewStream(ctx, &echoDesc.Streams[0], "/test.Echo/Both")
	var m wrapperspb.StringValue
	if err == nil {
		err = s.SendMsg(wrapperspb.String("x"))
	}
	if err == nil {
		err = s.RecvMsg(&m)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Who is revoked loses what is open, and gets nothing new; others notice nothing.
func TestRevoked(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	token := n.dial(c.f.mint("ci", "reader"))
	creds := c.f.certificate(c.f.ca, "bob", "reader", -time.Minute, time.Hour)
	cert, other := n.dial(creds), c.admin("cp1")
	serial := n.serialOf(cert)
	open := map[string]grpc.ClientStream{
		"a token's": streaming(t, n.ctx(), token), "a token's on another node": streaming(t, on(n.ctx(), "w1"), token),
		"a certificate's": streaming(t, n.ctx(), cert), "a certificate's on another node": streaming(t, on(n.ctx(), "w1"), cert),
	}
	stays := streaming(t, on(n.ctx(), "w1"), other)
	begin := c.revoke(t, "id-of-ci", serial)
	for name, s := range open {
		var m wrapperspb.StringValue
		says(t, name+" stream", s.RecvMsg(&m), codes.Unauthenticated, "were revoked")
	}
	if took := time.Since(begin); took > within {
		t.Errorf("streams ended after %s", took)
	}
	says(t, "token", getVersion(n.ctx(), token), codes.Unauthenticated, "id-of-ci")
	says(t, "certificate", getVersion(n.ctx(), cert), codes.Unauthenticated, serial)
	says(t, "certificate on a new connection", getVersion(n.ctx(), n.dial(creds)), codes.Unauthenticated, "were revoked")
	n.must(stays.SendMsg(wrapperspb.String("y")))
	var m wrapperspb.StringValue
	n.must(stays.RecvMsg(&m))
}

// serialOf makes a call, and returns the serial of the caller's certificate as apid sees it.
func (n *node) serialOf(conn *grpc.ClientConn) string {
	n.t.Helper()
	s := streaming(n.t.(*testing.T), n.ctx(), conn)
	defer func() { n.must(s.CloseSend()) }()
	for _, c := range n.daemon.live.all() {
		if c.conn != nil && c.proved.name == "bob" {
			return c.proved.id
		}
	}
	n.t.Fatal("the call is not among those that are going on")
	return ""
}

// A handler that is in the middle of sending to a client who does not read does not keep the revoked connection open.
func TestRevokedWhoDoesNotRead(t *testing.T) {
	c := newCluster(t, "cp1")
	n := c.nodes["cp1"]
	over := make(chan struct{})
	n.machined(&fakeMachined{events: func(s grpc.ServerStreamingServer[machinev1.Event]) error {
		defer close(over)
		for {
			if err := s.Send(&machinev1.Event{Text: strings.Repeat("x", 10000)}); err != nil {
				return err
			}
		}
	}})
	conn := n.dial(c.f.certificate(c.f.ca, "bob", "reader", -time.Minute, time.Hour), grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	serial := n.serialOf(conn)
	s, err := machinev1.NewMachineClient(conn).StreamEvents(n.ctx(), &machinev1.StreamEventsRequest{})
	n.must(err)
	_, err = s.Recv()
	n.must(err)
	for range 200 { // until nothing moves
		n.must(getVersion(n.ctx(), conn))
	}
	c.revoke(t, serial)
	ctx, cancel := context.WithTimeout(n.ctx(), within)
	defer cancel()
	<-over
	if !conn.WaitForStateChange(ctx, connectivity.Ready) {
		t.Errorf("the connection is still open %s after the revocation", within)
	}
}

// A node that was removed is nobody: its calls end, and nothing is passed on to it.
func TestRemovedNode(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1")
	c.machines()
	cp1, w1 := c.nodes["cp1"], c.nodes["w1"]
	to := streaming(t, on(cp1.ctx(), "w1"), c.admin("cp1"))                                                                                    // passed on by cp1
	as := streaming(t, with(cp1.ctx(), peer.HopKey, "1", peer.CallerKey, "ann", peer.RolesKey, "reader"), c.asNode("w1", "cp2", controlPlane)) // by cp2
	c.tell(func(s *trustv1.TrustState) { s.Nodes = s.Nodes[:1] })
	begin := time.Now()
	var m wrapperspb.StringValue
	says(t, "a stream to the node", to.RecvMsg(&m), codes.Unavailable, `node "w1"`, "not in the cluster any more")
	says(t, "a stream that the node passed on", as.RecvMsg(&m), codes.Unauthenticated, `"cp2" is no node of this cluster`)
	if took := time.Since(begin); took > within {
		t.Errorf("it took %s", took)
	}
	says(t, "a call to the node", getVersion(on(cp1.ctx(), "w1"), c.admin("cp1")), codes.NotFound, "there are: cp1")
	_, err := clusterv1.NewRegistryClient(c.asNode("cp1", "w1", "worker")).Report(w1.ctx(), &clusterv1.ReportRequest{})
	says(t, "a call by the node", err, codes.Unauthenticated, `"w1" is no node of this cluster`)
}

// Another authority: who has a certificate of the old one is nobody, at once.
func TestAuthorityReplaced(t *testing.T) {
	c := newCluster(t, "cp1")
	c.machines()
	n := c.nodes["cp1"]
	s := streaming(t, n.ctx(), c.admin("cp1"))
	other := newAuthority(t)
	c.tell(func(s *trustv1.TrustState) { s.OsCa = text(other.cert) })
	var m wrapperspb.StringValue
	says(t, "a stream", s.RecvMsg(&m), codes.Unauthenticated, errStranger.Error())
}

// Nobody but a node calls what is for nodes, and a node nothing else.
func TestRoleNode(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	n.serve(n.bind("etcdd"), func(s *grpc.Server) { clusterv1.RegisterRegistryServer(s, &fakeRegistry{name: "cp1"}) })
	report := func(conn *grpc.ClientConn) error {
		_, err := clusterv1.NewRegistryClient(conn).Report(n.ctx(), &clusterv1.ReportRequest{})
		return err
	}
	n.must(report(c.asNode("cp1", "w1", "worker")))
	n.must(report(c.asNode("cp1", "cp1", controlPlane)))
	says(t, "an administrator", report(c.admin("cp1")), codes.PermissionDenied, "needs role node")
	says(t, "a token with the role", report(n.dial(c.f.mint("ci", "node", "node-controlplane"))), codes.PermissionDenied, `"ci" has no other`)
	says(t, "a token with the name", report(n.dial(c.f.mint("node:w1", "admin"))), codes.Unauthenticated, errStranger.Error())
	says(t, "a certificate with the role only", report(c.holding("cp1", pkix.Name{CommonName: "w1", Organization: []string{"bulkhead:node", "bulkhead:node-worker"}})), codes.Unauthenticated, errStranger.Error())
	says(t, "a node reads", getVersion(n.ctx(), c.asNode("cp1", "w1", "worker")), codes.PermissionDenied, "needs role reader")
	if err := report(n.strangerConn()); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a stranger: %v", err)
	}
}
