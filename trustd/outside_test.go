package trustd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// open lets other nodes call the box: with a certificate of its own trustd, as apid has one.
func (b *box) open() {
	b.t.Helper()
	key, csr := request(b.t, x509.CertificateRequest{})
	resp, err := trustv1.NewSignerClient(b.conn[uid.Apid]).SignCertificate(b.t.Context(), &trustv1.SignCertificateRequest{Profile: "apid-server", Csr: csr})
	b.must(err)
	b.openWith(tls.Certificate{Certificate: [][]byte{parsePEM(b.t, resp.GetCertificate()).Raw}, PrivateKey: key}, &b.apid)
}

func (b *box) endpoint() string { return b.door.Addr().String() }

// openWith serves as apid does: it ends the connection, and says what it was and from where.
func (b *box) openWith(cert tls.Certificate, to *latest.Cell[*grpc.ClientConn]) {
	b.t.Helper()
	b.openJoin(cert, joinDoor{to: to}, func(s *grpc.Server) { trustv1.RegisterNodesServer(s, nodesDoor{to: to}) })
}

func (b *box) openJoin(cert tls.Certificate, j trustv1.JoinServer, more ...func(*grpc.Server)) {
	b.t.Helper()
	l, err := net.Listen("tcp", b.address()+":0")
	b.must(err)
	b.door = l
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})))
	trustv1.RegisterJoinServer(s, j)
	for _, m := range more {
		m(s)
	}
	go func() { _ = s.Serve(l) }()
	b.t.Cleanup(s.Stop)
}

func (b *box) address() string {
	ip, _ := b.ip.Get()
	return ip
}

// inside is the connection to the box's trustd.
func inside(to *latest.Cell[*grpc.ClientConn]) (*grpc.ClientConn, error) {
	if c, _ := to.Get(); c != nil {
		return c, nil
	}
	return nil, errs.New(errs.Unavailable, "trustd does not run")
}

func seen(ctx context.Context, label string) (binding []byte, address string) {
	p, _ := grpcpeer.FromContext(ctx)
	host, _, _ := net.SplitHostPort(p.Addr.String())
	binding, _ = join.Binding(p.AuthInfo.(credentials.TLSInfo).State, label)
	return binding, strings.Replace(host, "127.0.0.", "10.5.0.", 1)
}

type joinDoor struct {
	trustv1.UnimplementedJoinServer
	to *latest.Cell[*grpc.ClientConn]
}

func (j joinDoor) Join(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
	r.ChannelBinding, r.RemoteAddress = seen(ctx, join.Label)
	c, err := inside(j.to)
	if err != nil {
		return nil, err
	}
	return trustv1.NewJoinClient(c).Join(ctx, r)
}

func (j joinDoor) Challenge(ctx context.Context, r *trustv1.AttestChallengeRequest) (*trustv1.AttestChallengeResponse, error) {
	_, r.RemoteAddress = seen(ctx, attest.Label)
	c, err := inside(j.to)
	if err != nil {
		return nil, err
	}
	return trustv1.NewJoinClient(c).Challenge(ctx, r)
}

func (j joinDoor) JoinAttested(ctx context.Context, r *trustv1.JoinAttestedRequest) (*trustv1.JoinAttestedResponse, error) {
	r.Join.ChannelBinding, r.Join.RemoteAddress = seen(ctx, attest.Label)
	c, err := inside(j.to)
	if err != nil {
		return nil, err
	}
	return trustv1.NewJoinClient(c).JoinAttested(ctx, r)
}

// joinFunc is a Join of the test's own.
type joinFunc struct {
	trustv1.UnimplementedJoinServer
	f func(context.Context, *trustv1.JoinRequest) (*trustv1.JoinResponse, error)
}

func (j joinFunc) Join(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
	return j.f(ctx, r)
}

type nodesDoor struct {
	trustv1.UnimplementedNodesServer
	to *latest.Cell[*grpc.ClientConn]
}

func (n nodesDoor) SignForNode(ctx context.Context, r *trustv1.SignForNodeRequest) (*trustv1.SignCertificateResponse, error) {
	r.Proof.ChannelBinding, r.Proof.RemoteAddress = seen(ctx, join.NodeLabel)
	c, err := inside(n.to)
	if err != nil {
		return nil, err
	}
	return trustv1.NewNodesClient(c).SignForNode(ctx, r)
}

func (n nodesDoor) ConfirmRotation(ctx context.Context, r *trustv1.ConfirmRotationRequest) (*trustv1.ConfirmRotationResponse, error) {
	r.Proof.ChannelBinding, r.Proof.RemoteAddress = seen(ctx, join.NodeLabel)
	c, err := inside(n.to)
	if err != nil {
		return nil, err
	}
	return trustv1.NewNodesClient(c).ConfirmRotation(ctx, r)
}

func (n nodesDoor) WatchCluster(r *trustv1.WatchClusterRequest, out grpc.ServerStreamingServer[trustv1.TrustState]) error {
	r.Proof.ChannelBinding, r.Proof.RemoteAddress = seen(out.Context(), join.NodeLabel)
	c, err := inside(n.to)
	if err != nil {
		return err
	}
	s, err := trustv1.NewNodesClient(c).WatchCluster(out.Context(), r)
	for err == nil {
		var t *trustv1.TrustState
		if t, err = s.Recv(); err == nil {
			err = out.Send(t)
		}
	}
	return err
}

// fakeOutbound is apid's way out.
type fakeOutbound struct {
	outboundv1.UnimplementedOutboundServer
	b *box
}

func (f fakeOutbound) Exchange(s grpc.BidiStreamingServer[outboundv1.ExchangeRequest, outboundv1.ExchangeResponse]) error {
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	first, err := s.Recv()
	if err != nil {
		return err
	}
	o := first.GetOpen()
	away, changed := f.b.netAway.Get()
	if away {
		return errs.New(errs.Unavailable, "no route to host")
	}
	go func() {
		select {
		case <-changed:
			cancel()
		case <-ctx.Done():
		}
	}()
	cfg := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: join.ServerName, InsecureSkipVerify: o.GetRoots() == ""}
	if o.GetRoots() != "" {
		cfg.RootCAs = x509.NewCertPool()
		cfg.RootCAs.AppendCertsFromPEM([]byte(o.GetRoots()))
	}
	d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(f.b.address())}}, Config: cfg}
	raw, err := d.DialContext(ctx, "tcp", o.GetEndpoints()[0])
	if err != nil {
		return errs.New(errs.Unavailable, "%w", err)
	}
	defer raw.Close()
	binding, err := join.Binding(raw.(*tls.Conn).ConnectionState(), o.GetBindingLabel())
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return raw, nil }))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := s.Send(&outboundv1.ExchangeResponse{What: &outboundv1.ExchangeResponse_Opened{Opened: &outboundv1.Opened{Endpoint: o.GetEndpoints()[0], Binding: binding}}}); err != nil {
		return err
	}
	m, err := s.Recv()
	if err != nil {
		return err
	}
	return relay(ctx, conn, o.GetMethod(), m.GetMessage(), f.b.lost, s)
}

// relay passes bytes on as they are.
func relay(ctx context.Context, conn *grpc.ClientConn, method string, message []byte, lost func(), s grpc.BidiStreamingServer[outboundv1.ExchangeRequest, outboundv1.ExchangeResponse]) error {
	far, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	in := &emptypb.Empty{}
	if err := proto.Unmarshal(message, in); err != nil {
		return err
	}
	if err = errors.Join(far.SendMsg(in), far.CloseSend()); err != nil {
		return err
	}
	for {
		out := &emptypb.Empty{} // what it does not know it keeps
		if err := far.RecvMsg(out); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		data, err := proto.Marshal(out)
		if err != nil {
			return err
		}
		if lost != nil {
			lost()
			<-ctx.Done()
			return ctx.Err()
		}
		if err := s.Send(&outboundv1.ExchangeResponse{What: &outboundv1.ExchangeResponse_Message{Message: data}}); err != nil {
			return err
		}
	}
}

// fakeStore is etcdd's store.v1 over the lab's map.
type fakeStore struct {
	storev1.UnimplementedStoreServer
	b *box
}

func (f fakeStore) away() error {
	if away, _ := f.b.etcdAway.Get(); away {
		return errs.New(errs.Unavailable, "etcd has no quorum")
	}
	return nil
}

func (l *lab) read(prefix string) ([]*storev1.Entry, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*storev1.Entry
	for _, k := range slices.Sorted(maps.Keys(l.data)) {
		if strings.HasPrefix(k, prefix) {
			out = append(out, l.data[k])
		}
	}
	return out, l.revision
}

func (f fakeStore) Read(_ context.Context, r *storev1.ReadRequest) (*storev1.ReadResponse, error) {
	if err := f.away(); err != nil {
		return nil, err
	}
	entries, revision := f.b.lab.read(r.GetPrefix())
	return &storev1.ReadResponse{Entries: entries, Revision: revision}, nil
}

func (f fakeStore) Write(_ context.Context, r *storev1.WriteRequest) (*storev1.WriteResponse, error) {
	if err := f.away(); err != nil {
		return nil, err
	}
	l := f.b.lab
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range r.GetConditions() {
		if l.data[c.GetKey()].GetRevision() != c.GetRevision() {
			return nil, errs.New(errs.Conflict, "%s has another revision", c.GetKey())
		}
	}
	l.revision++
	for _, c := range r.GetChanges() {
		if !strings.HasPrefix(c.GetKey(), "/bulkhead/trust/") {
			return nil, errs.New(errs.Denied, "%s is not trustd's", c.GetKey())
		}
		if delete(l.data, c.GetKey()); !c.GetDelete() {
			l.data[c.GetKey()] = &storev1.Entry{Key: c.GetKey(), Value: c.GetValue(), Revision: l.revision}
		}
	}
	l.changed.Set(l.revision)
	return &storev1.WriteResponse{Revision: l.revision}, nil
}

func (f fakeStore) Watch(r *storev1.WatchRequest, out grpc.ServerStreamingServer[storev1.WatchResponse]) error {
	sent := map[string]uint64{}
	for first := true; ; first = false {
		away, went := f.b.etcdAway.Get()
		if away {
			return f.away()
		}
		_, changed := f.b.lab.changed.Get()
		entries, revision := f.b.lab.read(r.GetPrefix())
		resp, have := &storev1.WatchResponse{Complete: first, Revision: revision}, map[string]bool{}
		for _, e := range entries {
			if have[e.GetKey()] = true; sent[e.GetKey()] != e.GetRevision() {
				sent[e.GetKey()] = e.GetRevision()
				resp.Entries = append(resp.Entries, e)
			}
		}
		for k := range sent {
			if !have[k] {
				delete(sent, k)
				resp.Deleted = append(resp.Deleted, k)
			}
		}
		if err := out.Send(resp); err != nil {
			return err
		}
		select {
		case <-out.Context().Done():
			return out.Context().Err()
		case <-changed:
		case <-went:
		}
	}
}

type fakeEtcd struct {
	etcdv1.UnimplementedEtcdServer
	b *box
}

func (f fakeEtcd) GetStatus(context.Context, *etcdv1.GetStatusRequest) (*etcdv1.Status, error) {
	out := &etcdv1.Status{State: "running"}
	names, _ := f.b.lab.members.Get()
	for _, n := range names {
		out.Members = append(out.Members, &etcdv1.Member{Name: n})
	}
	return out, nil
}
