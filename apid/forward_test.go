package apid

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// says fails unless an error has a code and a text.
func says(t *testing.T, what string, err error, code codes.Code, texts ...string) {
	t.Helper()
	for _, text := range append(texts, "") {
		if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
			t.Errorf("%s: %v, want %v with %q", what, err, code, text)
		}
	}
}

func TestForward(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1")
	c.machines()
	ctx := c.nodes["cp1"].ctx()
	cert := c.admin("cp1")
	token := c.nodes["cp1"].dial(c.f.mint("prometheus", "reader", "etcd-backup"))
	for _, a := range []struct {
		conn *grpc.ClientConn
		node string
		want string
	}{
		{cert, "", "cp1: ann admin"}, {cert, "cp1", "cp1: ann admin"}, {cert, "cp2", "cp2: ann admin"}, {cert, "w1", "w1: ann admin"},
		{token, "w1", "w1: prometheus reader,etcd-backup"}, {c.admin("w1"), "w1", "w1: ann admin"},
	} {
		if got, err := version(on(ctx, a.node), a.conn); err != nil || got != a.want {
			t.Errorf("node %q: %q, %v; want %q", a.node, got, err, a.want)
		}
	}
	// The words of a client about itself, and about hops, count for nothing.
	got, err := version(with(on(ctx, "w1"), peer.CallerKey, "root", peer.RolesKey, "admin"), token)
	if err != nil || got != "w1: prometheus reader,etcd-backup" {
		t.Errorf("%q, %v", got, err)
	}
	for name, a := range map[string]struct {
		err  error
		code codes.Code
		text string
	}{
		"unknown node":      {getVersion(on(ctx, "w9"), cert), codes.NotFound, `no node "w9"; there are: cp1, cp2, w1`},
		"two nodes":         {getVersion(with(ctx, peer.NodeKey, "w1", peer.NodeKey, "cp2"), cert), codes.InvalidArgument, "2 times"},
		"no name":           {getVersion(with(ctx, peer.NodeKey, ""), cert), codes.InvalidArgument, "no name of a node"},
		"any control plane": {getVersion(with(ctx, peer.NodeKey, peer.ControlPlanes), cert), codes.InvalidArgument, "no name of a node"},
		"a hop":             {getVersion(with(on(ctx, "w1"), peer.HopKey, "1"), cert), codes.FailedPrecondition, "not passed on again"},
		"through a worker":  {getVersion(on(ctx, "cp2"), c.admin("w1")), codes.PermissionDenied, `"w1" is a worker and passes no calls on; ask a control plane: cp1 (10.5.0.11), cp2 (10.5.0.12)`},
		"a node":            {getVersion(on(ctx, "w1"), c.asNode("cp1", "cp2", "controlplane")), codes.PermissionDenied, "needs role reader"},
		"a stranger":        {getVersion(on(ctx, "w9"), c.nodes["cp1"].strangerConn()), codes.Unauthenticated, errStranger.Error()},
	} {
		says(t, name, a.err, a.code, a.text)
	}
	_, err = machinev1.NewMachineClient(token).Reboot(on(ctx, "w9"), &machinev1.RebootRequest{})
	says(t, "without the role nobody learns which nodes there are", err, codes.PermissionDenied, "needs role operator")
	_, err = trustv1.NewJoinClient(cert).Join(on(ctx, "w1"), &trustv1.JoinRequest{})
	says(t, "what is tied to its connection", err, codes.InvalidArgument, "connect with that node")

	// As gateway does, with its caller's token.
	viaGateway := with(on(ctx, "w1"), "authorization", "Bearer "+c.f.mint("ci", "reader").Token)
	if got, err := version(viaGateway, c.nodes["cp1"].as(uid.Gateway)); err != nil || got != "w1: ci reader" {
		t.Errorf("through gateway: %q, %v", got, err)
	}
	h := healthv1.NewHealthClient(cert)
	r, err := h.Check(on(ctx, "w1"), &healthv1.HealthCheckRequest{Service: "network.v1.Network"})
	if err != nil || r.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health of another node's service: %v, %v", r, err)
	}
}

// Both sides write who did it: the near one to which node, the far one through which.
func TestForwardIsAudited(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	for name, n := range c.nodes {
		n.daemon.spec.Set(spec{generation: 1, hostname: name})
	}
	ctx := c.nodes["cp1"].ctx()
	_, err := machinev1.NewMachineClient(c.admin("cp1")).Reboot(on(ctx, "w1"), &machinev1.RebootRequest{})
	c.nodes["cp1"].must(err)
	for name, want := range map[string][]string{
		"cp1": {"who=ann", "roles=admin", "node=cp1", "target=w1", "code=OK", "Reboot"},
		"w1":  {"who=ann", "roles=admin", "node=w1", "via=cp1", "code=OK", "Reboot"},
	} {
		lines := c.nodes[name].audits()
		if len(lines) != 1 {
			t.Fatalf("%s: %d lines, want 1: %v", name, len(lines), lines)
		}
		for _, w := range want {
			if !strings.Contains(lines[0], w) {
				t.Errorf("%s: no %q in %s", name, w, lines[0])
			}
		}
	}
}

// Only a control plane's word about the caller counts, and the role is checked on the far side too.
func TestFarSideChecks(t *testing.T) {
	c := newCluster(t, "cp1", "w1", "w2")
	c.machines()
	n := c.nodes["w1"]
	ctx := n.ctx()
	passed := with(ctx, peer.HopKey, "1", peer.CallerKey, "eve", peer.RolesKey, "reader", peer.RolesKey, "node", peer.RolesKey, "king")
	control := c.asNode("w1", "cp1", "controlplane")
	if got, err := version(passed, control); err != nil || got != "w1: eve reader" {
		t.Errorf("%q, %v", got, err)
	}
	_, err := machinev1.NewMachineClient(control).Reboot(passed, &machinev1.RebootRequest{})
	says(t, "a role that the caller lacks", err, codes.PermissionDenied, `"eve" has reader`)
	says(t, "in the name of a node", getVersion(with(ctx, peer.HopKey, "1", peer.CallerKey, "node:w2"), control), codes.PermissionDenied, "for nobody")
	says(t, "for another node", getVersion(with(passed, peer.NodeKey, "w2"), control), codes.FailedPrecondition, `this is node "w1"`, "not passed on again")
	says(t, "without a hop", getVersion(with(ctx, peer.CallerKey, "eve", peer.RolesKey, "admin"), control), codes.PermissionDenied, "needs role reader")
	says(t, "from a worker", getVersion(passed, c.asNode("w1", "w2", "worker")), codes.PermissionDenied, `"node:w2" has node, node-worker`)
	says(t, "from a worker with a control plane's certificate", getVersion(passed, c.asNode("w1", "w2", "controlplane")), codes.Unauthenticated, "is no node of this cluster with the role")
	says(t, "from a node that was never there", getVersion(passed, c.asNode("w1", "cp9", "controlplane")), codes.Unauthenticated, "is no node of this cluster")
	if got, err := version(passed, c.admin("w1")); err != nil || got != "w1: ann admin" {
		t.Errorf("a person who says so is a person: %q, %v", got, err)
	}
}

func TestForwardStreams(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	gone := make(chan struct{})
	var sent atomic.Int64
	c.nodes["w1"].machined(&fakeMachined{events: func(s grpc.ServerStreamingServer[machinev1.Event]) error {
		for i := 0; ; i++ {
			if err := s.Send(&machinev1.Event{Text: fmt.Sprint(i, " ", strings.Repeat("x", 1000))}); err != nil {
				close(gone)
				return err
			}
			sent.Store(int64(i))
		}
	}})
	conn := c.admin("cp1")
	ctx, cancel := context.WithCancel(on(c.nodes["cp1"].ctx(), "w1"))
	defer cancel()
	s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{})
	c.nodes["cp1"].must(err)
	recv := func(from, to int) {
		for i := from; i < to; i++ {
			e, err := s.Recv()
			c.nodes["cp1"].must(err)
			if text, _, _ := strings.Cut(e.GetText(), " "); text != fmt.Sprint(i) {
				t.Fatalf("event %d is %q", i, text)
			}
		}
	}
	recv(0, 1)
	// Back-pressure: who does not read stops the far daemon, after what the windows on the way hold, and holds up nobody else.
	for range 200 {
		c.nodes["cp1"].must(getVersion(ctx, conn))
	}
	last := sent.Load()
	if last > 3000 {
		t.Errorf("the far daemon sent %d KiB to a client that does not read", last)
	}
	recv(1, int(last)+1)
	cancel()
	<-gone // the far daemon learns that the client has left
}

func TestForwardBothWays(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	left := make(chan time.Duration, 1)
	c.nodes["w1"].machined(&fakeMachined{version: func(ctx context.Context) (*machinev1.GetVersionResponse, error) {
		deadline, _ := ctx.Deadline()
		left <- time.Until(deadline)
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	conn := c.admin("cp1")
	n := c.nodes["cp1"]
	open := func() grpc.ClientStream {
		s, err := conn.NewStream(on(n.ctx(), "w1"), &echoDesc.Streams[0], "/test.Echo/Both")
		n.must(err)
		return s
	}
	b := open()
	var m wrapperspb.StringValue
	for _, w := range []string{"one", "two"} {
		n.must(b.SendMsg(wrapperspb.String(w)))
		n.must(b.RecvMsg(&m))
		if m.Value != "re: "+w {
			t.Errorf("got %q", m.Value)
		}
	}
	n.must(b.CloseSend()) // half-closed: the far daemon still answers
	n.must(b.RecvMsg(&m))
	if err := b.RecvMsg(&m); m.Value != "end" || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %q, %v", m.Value, err)
	}
	b = open()
	n.must(b.SendMsg(wrapperspb.String("fail")))
	says(t, "a stream that the far daemon ends", b.RecvMsg(&m), codes.Aborted, "as you wish")

	short, cancel := context.WithTimeout(on(n.ctx(), "w1"), 300*time.Millisecond)
	defer cancel()
	wantCode(t, "the client's deadline", getVersion(short, conn), codes.DeadlineExceeded)
	if d := <-left; d <= 0 || d > 300*time.Millisecond {
		t.Errorf("the far daemon had %s", d)
	}
	// More calls at once than one connection takes.
	var open300 []grpc.ClientStream
	two := []*grpc.ClientConn{c.admin("cp1"), c.admin("cp1"), c.admin("cp1")}
	for i := range 300 {
		s, err := two[i%3].NewStream(on(n.ctx(), "w1"), &echoDesc.Streams[0], "/test.Echo/Both")
		n.must(err)
		n.must(s.SendMsg(wrapperspb.String("one")))
		n.must(s.RecvMsg(&m))
		open300 = append(open300, s)
	}
	if got := c.dialled("10.5.0.12"); got != 3 {
		t.Errorf("%d calls at once took %d connections, want 3", len(open300), got)
	}
}

// A peer that restarts delays calls that may be repeated, and fails none; another one's streams end with UNAVAILABLE that names the node.
func TestPeerRestarts(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	near, far := c.nodes["cp1"], bareNode(t, c.nodes["w1"].trustd, c.dial)
	f := far.trustd
	far.serve(far.bind("trustd"), func(s *grpc.Server) { trustv1.RegisterSignerServer(s, f) })
	c.place("10.5.0.12", far.address)
	stop := far.start()
	far.machined(&fakeMachined{events: func(s grpc.ServerStreamingServer[machinev1.Event]) error {
		if err := s.Send(&machinev1.Event{}); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}})
	conn := c.admin("cp1", grpc.WithDisableRetry())
	ctx := on(near.ctx(), "w1")
	near.must(getVersion(ctx, conn))
	s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{})
	near.must(err)
	_, err = s.Recv()
	near.must(err)
	stop()
	_, err = s.Recv()
	says(t, "a stream of the peer that stopped", err, codes.Unavailable, `node "w1" (10.5.0.12)`)
	answer := make(chan error, 1)
	go func() { answer <- getVersion(ctx, conn) }() // waits in the listener's backlog
	far.start()
	if err := <-answer; err != nil {
		t.Errorf("a call while the peer restarted: %v", err)
	}
}

// New calls use a certificate that was renewed; streams that are open go on, on the old connection, which is closed after them.
func TestNearCertificateChanges(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	conn := c.admin("cp1")
	ctx := on(n.ctx(), "w1")
	s, err := conn.NewStream(ctx, &echoDesc.Streams[0], "/test.Echo/Both")
	n.must(err)
	var m wrapperspb.StringValue
	say := func() {
		t.Helper()
		n.must(s.SendMsg(wrapperspb.String("x")))
		n.must(s.RecvMsg(&m))
	}
	say()
	_, changed := n.daemon.far.Pair()
	n.daemon.far.Renew()
	<-changed
	n.must(getVersion(ctx, conn))
	n.must(getVersion(ctx, conn))
	say()
	if got := c.dialled("10.5.0.12"); got != 2 {
		t.Errorf("%d connections, want the old one and a new one", got)
	}
	// The peer's certificate: nothing changes for connections that are open.
	_, changed = c.nodes["w1"].daemon.leaf.Pair()
	c.nodes["w1"].daemon.leaf.Renew()
	<-changed
	say()
	n.must(getVersion(ctx, conn))
	n.must(s.CloseSend())
	n.must(s.RecvMsg(&m))
	// The address: new calls go there.
	c.place("10.5.0.99", c.nodes["w1"].address)
	c.tell(func(s *trustv1.TrustState) { s.Nodes[1].Addresses = []string{"10.5.0.99"} })
	n.waitTrust(func(s *trustv1.TrustState) bool { return s.GetNodes()[1].GetAddresses()[0] == "10.5.0.99" })
	n.must(getVersion(ctx, conn))
	if c.dialled("10.5.0.99") != 1 || c.dialled("10.5.0.12") != 2 {
		t.Error("the new address was not used")
	}
}

// Whatever is at a node's address: an error in bounded time that names node, address and reason.
func TestPeerNeverAnswers(t *testing.T) {
	t.Parallel() // it waits for time-outs
	c := newCluster(t, "cp1", "w1", "w2", "w3", "w4", "w5", "w6")
	c.machines()
	n := c.nodes["cp1"]
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections into its backlog and says nothing
	n.must(err)
	t.Cleanup(func() { silent.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	n.must(err)
	closed.Close()
	mute, err := tls.Listen("tcp", "127.0.0.1:0", c.nodes["w6"].daemon.tls.config()) // a node that ends TLS and speaks no HTTP/2
	n.must(err)
	t.Cleanup(func() { mute.Close() })
	go func() {
		for {
			conn, err := mute.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake()
		}
	}()
	c.answer("10.5.0.12", func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() })
	c.place("10.5.0.13", silent.Addr().String())
	c.place("10.5.0.14", closed.Addr().String())
	c.place("10.5.0.15", c.nodes["w5"].address)
	c.place("10.5.0.17", mute.Addr().String())
	conn := c.admin("cp1", grpc.WithDisableRetry())
	wants := map[string]string{
		"w1": `node "w1" does not answer: 10.5.0.12:50000: no answer within 5.4s`, // packets are lost
		"w2": `node "w2" does not answer: 10.5.0.13:50000: no answer within 5.4s`, // frozen
		"w3": `node "w3" does not answer: 10.5.0.14:50000: dial tcp`,
		"w4": `node "w4" does not answer: 10.5.0.15:50000: another node answers there: its certificate is for bulkhead, w5`,
		"w6": `node "w6" does not answer: no connection within 6s to 10.5.0.17, port 50000`,
	}
	begin := time.Now()
	for r := range client.Each(n.ctx(), slices.Collect(maps.Keys(wants)), len(wants), func(ctx context.Context, _ string) (struct{}, error) {
		return struct{}{}, getVersion(ctx, conn)
	}) {
		says(t, r.Node, r.Err, codes.Unavailable, wants[r.Node])
	}
	if took := time.Since(begin); took > dialTime+4*time.Second {
		t.Errorf("it took %s", took)
	}
}

// A node whose clock is wrong by years takes nobody's certificate: the caller learns that it is not about theirs.
func TestPeerClock(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	conn := c.admin("cp1", grpc.WithDisableRetry())
	for _, years := range []time.Duration{10, -10} {
		c.nodes["w1"].ahead.Store(int64(years * 365 * 24 * time.Hour))
		says(t, "call", getVersion(on(n.ctx(), "w1"), conn), codes.Unavailable, `node "w1" (10.5.0.12) does not accept this node's certificate: its clock may be wrong`)
	}
	c.nodes["w1"].ahead.Store(0)
	n.must(getVersion(on(n.ctx(), "w1"), conn))
}

// A node with an address that does not answer is reached at the next one, and from then on there at once.
func TestSecondAddress(t *testing.T) {
	c := newCluster(t, "cp1", "w1")
	c.machines()
	n := c.nodes["cp1"]
	c.answer("10.9.9.9", func(context.Context) (net.Conn, error) { return nil, errors.New("no route") })
	c.tell(func(s *trustv1.TrustState) { s.Nodes[1].Addresses = []string{"10.9.9.9", "10.5.0.12"} })
	n.waitTrust(func(s *trustv1.TrustState) bool { return len(s.GetNodes()[1].GetAddresses()) == 2 })
	conn := c.admin("cp1")
	n.must(getVersion(on(n.ctx(), "w1"), conn))
	c.nodes["w1"].tcp.Close()
	if c.dialled("10.9.9.9") != 1 || c.dialled("10.5.0.12") != 1 {
		t.Errorf("dialled %d and %d times", c.dialled("10.9.9.9"), c.dialled("10.5.0.12"))
	}
}

// What Each is for: every node answers for itself, and one that is away holds up nobody.
func TestFanOut(t *testing.T) {
	c := newCluster(t, "cp1", "cp2", "w1", "w2")
	c.machines()
	c.answer("10.5.0.13", func(context.Context) (net.Conn, error) { return nil, errors.New("no route to host") })
	conn := c.admin("cp1")
	var got []string
	for r := range client.Each(c.nodes["cp1"].ctx(), []string{"cp1", "cp2", "w1", "w2", "w9"}, 2, func(ctx context.Context, _ string) (string, error) { return version(ctx, conn) }) {
		got = append(got, fmt.Sprint(r.Node, "=", r.Value, status.Code(r.Err)))
	}
	slices.Sort(got)
	if want := "[cp1=cp1: ann adminOK cp2=cp2: ann adminOK w1=: Unavailable w2=w2: ann adminOK w9=: NotFound]"; fmt.Sprint(got) != want {
		t.Errorf("got %v\nwant %s", got, want)
	}
	if n := c.dialled("10.5.0.13"); n != 1 {
		t.Errorf("the node that is away was called %d times: it was waited for more than once", n)
	}
}

// freezable is a connection to a node that can freeze: nothing comes any more, and what is sent goes nowhere, as if its link were cut.
type freezable struct {
	net.Conn
	frozen *atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (f *freezable) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if f.frozen.Load() {
		<-f.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (f *freezable) Write(p []byte) (int, error) {
	if f.frozen.Load() {
		return len(p), nil
	}
	return f.Conn.Write(p)
}

func (f *freezable) Close() error {
	f.once.Do(func() { close(f.closed) })
	return f.Conn.Close()
}

// A node that freezes in the middle of a call, or while its connection waits for the next: the call ends in bounded time, without a deadline of its own.
func TestPeerFreezes(t *testing.T) {
	t.Parallel() // it waits for time-outs
	c := newCluster(t, "cp1", "w1")
	var frozen atomic.Bool
	c.answer("10.5.0.12", func(ctx context.Context) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.nodes["w1"].address)
		return &freezable{Conn: conn, frozen: &frozen, closed: make(chan struct{})}, err
	})
	reached := make(chan struct{})
	c.nodes["w1"].machined(&fakeMachined{reboot: func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	}})
	ctx := on(t.Context(), "w1")
	conn := c.admin("cp1", grpc.WithDisableRetry())
	begin := time.Now()
	during, between := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := machinev1.NewMachineClient(conn).Reboot(ctx, &machinev1.RebootRequest{})
		during <- err
	}()
	<-reached
	frozen.Store(true)
	go func() { between <- getVersion(ctx, conn) }()
	says(t, "during the call", <-during, codes.Unavailable, `node "w1" (10.5.0.12)`)
	says(t, "before the call", <-between, codes.Unavailable, `node "w1" (10.5.0.12)`, "no answer within 5.4s")
	if took, most := time.Since(begin), 2*(farAlive+farSilent)+dialTime; took > most {
		t.Errorf("it took %s, more than %s", took, most)
	}
}
