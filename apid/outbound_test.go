package apid

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// authorityOf is what a control plane's trustd does for joiners: it answers with what apid put into the request.
type authorityOf struct {
	trustv1.UnimplementedJoinServer
	trustv1.UnimplementedNodesServer
	trustv1.UnimplementedClaimServer
	block chan struct{} // if set, Join waits for it
	in    chan struct{}
	next  chan *trustv1.TrustState
	gone  chan struct{}
}

func (a *authorityOf) Join(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
	if a.block != nil {
		a.in <- struct{}{}
		select {
		case <-a.block:
		case <-ctx.Done():
		}
	}
	if r.GetTokenId() == "wrong" {
		return nil, errs.New(errs.Unauthenticated, "no such token")
	}
	return &trustv1.JoinResponse{Proof: r.GetChannelBinding(), Role: r.GetRemoteAddress(), Certificate: r.GetCsr()}, nil
}

func (a *authorityOf) Challenge(_ context.Context, r *trustv1.AttestChallengeRequest) (*trustv1.AttestChallengeResponse, error) {
	return &trustv1.AttestChallengeResponse{Id: r.GetRemoteAddress(), Nonce: r.GetEndorsementKey()}, nil
}

func (a *authorityOf) JoinAttested(_ context.Context, r *trustv1.JoinAttestedRequest) (*trustv1.JoinAttestedResponse, error) {
	return &trustv1.JoinAttestedResponse{Answer: r.GetJoin().GetChannelBinding(), Signature: []byte(r.GetJoin().GetRemoteAddress())}, nil
}

func (a *authorityOf) JoinCluster(_ context.Context, r *trustv1.JoinClusterRequest) (*trustv1.JoinClusterResponse, error) {
	return &trustv1.JoinClusterResponse{Ca: r.GetChannelBinding(), Role: r.GetName()}, nil
}

func (a *authorityOf) SignForNode(_ context.Context, r *trustv1.SignForNodeRequest) (*trustv1.SignCertificateResponse, error) {
	return &trustv1.SignCertificateResponse{Certificate: r.GetProof().GetName(), Ca: r.GetProof().GetRemoteAddress()}, nil
}

func (a *authorityOf) WatchCluster(r *trustv1.WatchClusterRequest, s grpc.ServerStreamingServer[trustv1.TrustState]) error {
	defer func() { a.gone <- struct{}{} }()
	if r.GetProof().GetName() == "wrong" {
		return errs.New(errs.Unauthenticated, "not your key")
	}
	if err := s.Send(&trustv1.TrustState{NodeName: r.GetProof().GetName(), Names: []string{r.GetProof().GetRemoteAddress()}}); err != nil {
		return err
	}
	for {
		select {
		case <-s.Context().Done():
			return s.Context().Err()
		case next := <-a.next:
			if err := s.Send(next); err != nil {
				return err
			}
		}
	}
}

// joinable starts a control plane whose trustd takes joins.
func joinable(t testing.TB, a *authorityOf) *node {
	t.Helper()
	f := newFakeTrustd(t)
	f.own()
	n := bareNode(t, f, nil)
	n.serve(n.bind("trustd"), func(s *grpc.Server) {
		trustv1.RegisterSignerServer(s, f)
		trustv1.RegisterJoinServer(s, a)
		trustv1.RegisterNodesServer(s, a)
		trustv1.RegisterClaimServer(s, a)
	})
	n.start()
	return n
}

// exchange makes one call through a node's apid as its trustd does.
func (n *node) exchange(ctx context.Context, open *outboundv1.Open, request proto.Message) (outboundv1.Outbound_ExchangeClient, *outboundv1.Opened, error) {
	n.t.Helper()
	s, err := outboundv1.NewOutboundClient(n.as(uid.Trustd)).Exchange(ctx)
	n.must(err)
	n.must(s.Send(&outboundv1.ExchangeRequest{What: &outboundv1.ExchangeRequest_Open{Open: open}}))
	r, err := s.Recv()
	if err != nil {
		return s, nil, err
	}
	raw, err := proto.Marshal(request)
	n.must(err)
	n.must(s.Send(&outboundv1.ExchangeRequest{What: &outboundv1.ExchangeRequest_Message{Message: raw}}))
	return s, r.GetOpened(), nil
}

func receive(t *testing.T, s outboundv1.Outbound_ExchangeClient, into proto.Message) {
	t.Helper()
	r, err := s.Recv()
	if err == nil {
		err = proto.Unmarshal(r.GetMessage(), into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Both halves of a join by TPM go through two apids, to somebody whom nobody vouches for; the second is tied to its connection, and says from where it came.
func TestExchangeByTPM(t *testing.T) {
	far, near := joinable(t, &authorityOf{}), newNode(t, false)
	ctx := near.ctx()
	open := &outboundv1.Open{Method: trustv1.Join_Challenge_FullMethodName, Endpoints: []string{far.address}, BindingLabel: attest.Label}
	s, _, err := near.exchange(ctx, open, &trustv1.AttestChallengeRequest{EndorsementKey: []byte("ek"), RemoteAddress: "192.0.2.1"})
	near.must(err)
	var c trustv1.AttestChallengeResponse
	if receive(t, s, &c); c.GetId() != "127.0.0.1" || string(c.GetNonce()) != "ek" {
		t.Errorf("the far trustd was asked %v", &c)
	}
	open.Method = trustv1.Join_JoinAttested_FullMethodName
	for _, r := range []*trustv1.JoinAttestedRequest{{}, {Join: &trustv1.JoinRequest{ChannelBinding: []byte("mine"), RemoteAddress: "192.0.2.1"}}} {
		s, opened, err := near.exchange(ctx, open, r)
		near.must(err)
		var seen trustv1.JoinAttestedResponse
		if receive(t, s, &seen); len(opened.GetBinding()) != join.BindingSize || !bytes.Equal(seen.GetAnswer(), opened.GetBinding()) || string(seen.GetSignature()) != "127.0.0.1" {
			t.Errorf("opened %v, the far trustd saw %v", opened, &seen)
		}
	}
	open.BindingLabel = join.Label
	_, _, err = near.exchange(ctx, open, &trustv1.JoinAttestedRequest{})
	says(t, "another label", err, codes.InvalidArgument, attest.Label)
}

// A node's trustd joins, has certificates signed and follows the cluster, through two apids; what ties its proofs to the connection is the same at both ends.
func TestExchange(t *testing.T) {
	a := &authorityOf{next: make(chan *trustv1.TrustState), gone: make(chan struct{}, 1)}
	far, near := joinable(t, a), newNode(t, false)
	ctx := near.ctx()
	first := &outboundv1.Open{Method: trustv1.Join_Join_FullMethodName, Endpoints: []string{"127.0.0.1:1", far.address}, BindingLabel: join.Label}
	s, opened, err := near.exchange(ctx, first, &trustv1.JoinRequest{Csr: []byte("csr"), ChannelBinding: []byte("mine"), RemoteAddress: "192.0.2.1"})
	near.must(err)
	var joined trustv1.JoinResponse
	receive(t, s, &joined)
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	if opened.GetEndpoint() != far.address || len(opened.GetBinding()) != join.BindingSize || !bytes.Equal(opened.GetBinding(), joined.GetProof()) || joined.GetRole() != "127.0.0.1" || string(joined.GetCertificate()) != "csr" {
		t.Errorf("opened %v, the far trustd saw %v", opened, &joined)
	}
	again, second, err := near.exchange(ctx, first, &trustv1.JoinRequest{TokenId: "wrong"})
	near.must(err)
	_, err = again.Recv()
	says(t, "a wrong token", err, codes.Unauthenticated, "no such token")
	if bytes.Equal(second.GetBinding(), opened.GetBinding()) {
		t.Error("two connections have one binding")
	}

	roots := text(far.trustd.ca.cert)
	s, _, err = near.exchange(ctx, &outboundv1.Open{Method: trustv1.Nodes_SignForNode_FullMethodName, Endpoints: []string{far.address}, Roots: roots, BindingLabel: join.NodeLabel},
		&trustv1.SignForNodeRequest{Proof: &trustv1.NodeProof{Name: "w1", RemoteAddress: "192.0.2.1"}})
	near.must(err)
	var signed trustv1.SignCertificateResponse
	receive(t, s, &signed)
	if signed.GetCertificate() != "w1" || signed.GetCa() != "127.0.0.1" {
		t.Errorf("signed %v", &signed)
	}
	watch := &outboundv1.Open{Method: trustv1.Nodes_WatchCluster_FullMethodName, Endpoints: []string{far.address}, Roots: roots, BindingLabel: join.NodeLabel}
	follow, cancel := context.WithCancel(ctx)
	defer cancel()
	s, _, err = near.exchange(follow, watch, &trustv1.WatchClusterRequest{Proof: &trustv1.NodeProof{Name: "w1"}})
	near.must(err)
	var state trustv1.TrustState
	receive(t, s, &state)
	a.next <- &trustv1.TrustState{NodeName: "again"}
	receive(t, s, &state)
	if state.GetNodeName() != "again" {
		t.Errorf("state %v", &state)
	}
	cancel()
	<-a.gone // the far trustd learns that the node has left
	s, _, err = near.exchange(ctx, watch, &trustv1.WatchClusterRequest{Proof: &trustv1.NodeProof{Name: "wrong"}})
	near.must(err)
	_, err = s.Recv()
	says(t, "a wrong proof", err, codes.Unauthenticated, "not your key")
}

// What trustd may not ask for, and what it learns about ends of the network that do not answer.
func TestExchangeRefuses(t *testing.T) {
	t.Parallel() // it waits for time-outs
	far, near := joinable(t, &authorityOf{}), newNode(t, true)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	near.must(err)
	defer silent.Close()
	ctx := near.ctx()
	sign := func(change func(*outboundv1.Open)) error {
		o := &outboundv1.Open{Method: trustv1.Nodes_SignForNode_FullMethodName, Endpoints: []string{far.address}, Roots: text(far.trustd.ca.cert), BindingLabel: join.NodeLabel}
		change(o)
		_, _, err := near.exchange(ctx, o, &trustv1.SignForNodeRequest{})
		return err
	}
	for name, c := range map[string]struct {
		change func(*outboundv1.Open)
		code   codes.Code
		text   string
	}{
		"nothing wrong":    {func(*outboundv1.Open) {}, codes.OK, ""},
		"another method":   {func(o *outboundv1.Open) { o.Method = "/machine.v1.Machine/Reboot" }, codes.PermissionDenied, "only Join, SignForNode, WatchCluster and ConfirmRotation"},
		"another label":    {func(o *outboundv1.Open) { o.BindingLabel = "EXPORTER-bulkhead-claim" }, codes.InvalidArgument, join.NodeLabel},
		"no roots":         {func(o *outboundv1.Open) { o.Roots = "" }, codes.InvalidArgument, "needs roots"},
		"roots of garbage": {func(o *outboundv1.Open) { o.Roots = "x" }, codes.InvalidArgument, "no PEM"},
		"no endpoints":     {func(o *outboundv1.Open) { o.Endpoints = nil }, codes.InvalidArgument, "0 endpoints; allowed are 1 to 16"},
		"many endpoints":   {func(o *outboundv1.Open) { o.Endpoints = make([]string, 17) }, codes.InvalidArgument, "17 endpoints"},
		"no port":          {func(o *outboundv1.Open) { o.Endpoints = []string{"10.0.0.1"} }, codes.InvalidArgument, "is not HOST:PORT"},
		"other authority":  {func(o *outboundv1.Open) { o.Roots = text(newAuthority(t).cert) }, codes.Unavailable, far.address + ": tls: failed to verify certificate"},
		"nobody there":     {func(o *outboundv1.Open) { o.Endpoints = []string{"127.0.0.1:1", silent.Addr().String()} }, codes.Unavailable, "127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused; " + silent.Addr().String() + ": no answer within 5s"},
	} {
		says(t, name, sign(c.change), c.code, c.text)
	}
	// A worker's certificate has not the name that is asked for.
	if cfg, err := exchangeTLS(&outboundv1.Open{Method: trustv1.Nodes_WatchCluster_FullMethodName, Endpoints: []string{far.address}, Roots: text(far.trustd.ca.cert), BindingLabel: join.NodeLabel}); err != nil || cfg.ServerName != "bulkhead-controlplane" {
		t.Errorf("anybody of the cluster is believed: %v", err)
	}
	for _, id := range []uid.ID{uid.Machined, uid.Etcdd, uid.Gateway, uid.Networkd} {
		short, cancel := context.WithTimeout(ctx, time.Second)
		s, err := outboundv1.NewOutboundClient(near.as(id)).Exchange(short, grpc.WaitForReady(false))
		if err == nil {
			_, err = s.Recv()
		}
		if err == nil {
			t.Errorf("%s may call other nodes", id.Name())
		}
		cancel()
	}
	s, err := outboundv1.NewOutboundClient(near.dial(near.trustd.mint("ann", "admin"))).Exchange(ctx)
	near.must(err)
	_, err = s.Recv()
	wantCode(t, "an administrator from outside", err, codes.Unimplemented)
	s, err = outboundv1.NewOutboundClient(near.as(uid.Trustd)).Exchange(ctx)
	near.must(err)
	near.must(s.Send(&outboundv1.ExchangeRequest{What: &outboundv1.ExchangeRequest_Message{Message: []byte("x")}}))
	_, err = s.Recv()
	says(t, "no open", err, codes.InvalidArgument, "the first message must be open")
}

// Joining needs no identity, and what a caller says about its connection does not count. Those who join keep nobody else out.
func TestJoin(t *testing.T) {
	a := &authorityOf{}
	n := joinable(t, a)
	ctx := n.ctx()
	stranger := n.strangerConn()
	r, err := trustv1.NewJoinClient(stranger).Join(ctx, &trustv1.JoinRequest{ChannelBinding: []byte("mine"), RemoteAddress: "192.0.2.1"})
	if err != nil || len(r.GetProof()) != join.BindingSize || r.GetRole() != "127.0.0.1" {
		t.Errorf("%v, %v", r, err)
	}
	_, err = trustv1.NewJoinClient(n.as(uid.Gateway)).Join(ctx, &trustv1.JoinRequest{})
	wantCode(t, "through gateway", err, codes.Unauthenticated)
	_, err = trustv1.NewClaimClient(stranger).JoinCluster(ctx, &trustv1.JoinClusterRequest{Name: "w1"})
	says(t, "a node with an owner joins nothing", err, codes.FailedPrecondition, "has an owner already")

	a.block, a.in = make(chan struct{}), make(chan struct{})
	var conns []*grpc.ClientConn
	for range 2 {
		conns = append(conns, n.strangerConn())
	}
	answers := make(chan error, maxClaims)
	for i := range maxClaims {
		go func() {
			_, err := trustv1.NewJoinClient(conns[i%2]).Join(ctx, &trustv1.JoinRequest{})
			answers <- err
		}()
	}
	for range maxClaims {
		<-a.in
	}
	_, err = trustv1.NewJoinClient(n.strangerConn()).Join(ctx, &trustv1.JoinRequest{})
	says(t, "one more than are let in at once", err, codes.ResourceExhausted, "try again")
	_, err = trustv1.NewTrustClient(n.dial(n.trustd.mint("ann", "admin"))).Bootstrap(ctx, &trustv1.BootstrapRequest{})
	wantCode(t, "an administrator meanwhile (the fake has no Trust)", err, codes.Unimplemented)
	if len(n.lines("msg=audit", "/trust.v1.Join/Join", "code=ResourceExhausted", "why=", "try again")) != 1 {
		t.Errorf("the audit log does not say why:\n%s", n.log)
	}
	close(a.block)
	for range maxClaims {
		n.must(<-answers)
	}

	free := newNode(t, false)
	_, err = trustv1.NewJoinClient(free.strangerConn()).Join(ctx, &trustv1.JoinRequest{})
	says(t, "at a node that nobody owns", err, codes.FailedPrecondition, "nobody owns this node")
	free.trustd.state.Set(&trustv1.TrustState{Locked: true})
	free.waitTrust((*trustv1.TrustState).GetLocked)
	_, err = trustv1.NewJoinClient(free.strangerConn()).Join(ctx, &trustv1.JoinRequest{})
	says(t, "at a locked node", err, codes.FailedPrecondition, "bhctl unlock")
	if !strings.Contains(strings.Join(n.audits(), "\n"), "trust.v1.Join/Join") {
		t.Error("joins are not audited")
	}
}

// JoinCluster is tied to the connection as a claim is.
func TestJoinClusterBinding(t *testing.T) {
	f := newFakeTrustd(t)
	n := bareNode(t, f, nil)
	n.serve(n.bind("trustd"), func(s *grpc.Server) {
		trustv1.RegisterSignerServer(s, f)
		trustv1.RegisterClaimServer(s, &authorityOf{})
	})
	n.start()
	r, err := trustv1.NewClaimClient(n.strangerConn()).JoinCluster(n.ctx(), &trustv1.JoinClusterRequest{Name: "w1", ChannelBinding: []byte("mine")})
	if err != nil || len(r.GetCa()) != join.BindingSize || r.GetRole() != "w1" {
		t.Errorf("%v, %v", r, err)
	}
}
