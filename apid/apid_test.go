package apid

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/wrapperspb"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

const claimCode = "7F3KQM2X9T0AB1CDEFGH"

// fakeTrustd is the real one's protocol with a tenth of its rules.
type fakeTrustd struct {
	trustv1.UnimplementedClaimServer
	trustv1.UnimplementedSignerServer
	t     testing.TB
	ca    *authority
	token ed25519.PrivateKey
	state latest.Cell[*trustv1.TrustState]
}

func newFakeTrustd(t testing.TB) *fakeTrustd {
	f := &fakeTrustd{t: t, ca: newAuthority(t)}
	var err error
	if _, f.token, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	f.state.Set(&trustv1.TrustState{})
	return f
}

func text(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// own makes the node owned.
func (f *fakeTrustd) own() {
	der, err := x509.MarshalPKIXPublicKey(f.token.Public())
	if err != nil {
		f.t.Fatal(err)
	}
	f.state.Set(&trustv1.TrustState{Claimed: true, OsCa: text(f.ca.cert), TokenKeys: []*trustv1.TokenKey{{Id: "k", PublicKey: der}}})
}

func (f *fakeTrustd) Claim(_ context.Context, r *trustv1.ClaimRequest) (*trustv1.ClaimResponse, error) {
	if !claim.Equal(r.GetProof(), claim.ClientProof(claimCode, r.GetChannelBinding(), r.GetCsr())) {
		return nil, errs.New(errs.Unauthenticated, "the claim code is wrong")
	}
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, err
	}
	cert := f.ca.sign(f.t, csr.PublicKey, pkix.Name{CommonName: "admin", Organization: []string{"bulkhead:admin"}}, x509.ExtKeyUsageClientAuth, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	f.own()
	return &trustv1.ClaimResponse{Ca: f.ca.cert.Raw, Certificate: cert.Raw, Proof: claim.ServerProof(claimCode, r.GetChannelBinding(), f.ca.cert.Raw, cert.Raw)}, nil
}

func (f *fakeTrustd) WatchTrust(_ *trustv1.WatchTrustRequest, s grpc.ServerStreamingServer[trustv1.TrustState]) error {
	return f.state.Watch(s.Context(), s.Send)
}

func (f *fakeTrustd) SignCertificate(_ context.Context, r *trustv1.SignCertificateRequest) (*trustv1.SignCertificateResponse, error) {
	if s, _ := f.state.Get(); !s.GetClaimed() {
		return nil, errs.New(errs.Precondition, "not claimed")
	}
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, err
	}
	subject, usage := pkix.Name{CommonName: "apid"}, x509.ExtKeyUsageServerAuth
	s, _ := f.state.Get()
	if r.GetProfile() == "apid-node" {
		if s.GetNodeName() == "" {
			return nil, errs.New(errs.Precondition, "no node of a cluster yet")
		}
		subject, usage = nodeSubject(s.GetNodeName(), s.GetNodeRole()), x509.ExtKeyUsageClientAuth
	}
	names := []string{s.GetNodeName()}
	if s.GetNodeRole() != "worker" {
		names = append(names, join.ServerName)
	}
	cert := f.ca.sign(f.t, csr.PublicKey, subject, usage, time.Now().Add(-time.Minute), time.Now().Add(time.Hour), names...)
	return &trustv1.SignCertificateResponse{Certificate: text(cert), Ca: text(f.ca.cert)}, nil
}

// nodeSubject is that of an apid's client certificate.
func nodeSubject(name, role string) pkix.Name {
	if role != "worker" {
		role = "controlplane"
	}
	return pkix.Name{CommonName: "node:" + name, SerialNumber: name, Organization: []string{"bulkhead:node", "bulkhead:node-" + role}}
}

// mint returns a token.
func (f *fakeTrustd) mint(name string, roles ...string) client.Credentials {
	return f.mintUntil(time.Now().Add(time.Hour), name, roles...)
}

func (f *fakeTrustd) mintUntil(end time.Time, name string, roles ...string) client.Credentials {
	tok := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{"iss": tokenIssuer, "aud": tokenAudience, "sub": name, "roles": roles, "exp": end.Unix(), "jti": "id-of-" + name})
	tok.Header["kid"] = "k"
	s, err := tok.SignedString(f.token)
	if err != nil {
		f.t.Fatal(err)
	}
	return client.Credentials{CA: []byte(text(f.ca.cert)), Token: s}
}

// certificate returns one for a client, signed by an authority of the caller's choice.
func (f *fakeTrustd) certificate(by *authority, name, role string, from, to time.Duration) client.Credentials {
	return f.holder(by, pkix.Name{CommonName: name, Organization: []string{"bulkhead:" + role}}, from, to)
}

// holder returns a client's certificate for a subject.
func (f *fakeTrustd) holder(by *authority, subject pkix.Name, from, to time.Duration) client.Credentials {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	cert := by.sign(f.t, key.Public(), subject, x509.ExtKeyUsageClientAuth, time.Now().Add(from), time.Now().Add(to))
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		f.t.Fatal(err)
	}
	return client.Credentials{CA: []byte(text(f.ca.cert)), Certificate: []byte(text(cert)), Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})}
}

// fakeMachined answers some of machine.v1. Functions that are nil answer at once.
type fakeMachined struct {
	machinev1.UnimplementedMachineServer
	version func(context.Context) (*machinev1.GetVersionResponse, error)
	reboot  func(context.Context) error
	events  func(grpc.ServerStreamingServer[machinev1.Event]) error
}

func (f *fakeMachined) GetVersion(ctx context.Context, _ *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	if f.version != nil {
		return f.version(ctx)
	}
	return &machinev1.GetVersionResponse{Version: "1"}, nil
}

func (f *fakeMachined) Reboot(ctx context.Context, _ *machinev1.RebootRequest) (*machinev1.RebootResponse, error) {
	if f.reboot != nil {
		return nil, f.reboot(ctx)
	}
	return &machinev1.RebootResponse{}, nil
}

func (f *fakeMachined) StreamEvents(_ *machinev1.StreamEventsRequest, s grpc.ServerStreamingServer[machinev1.Event]) error {
	return f.events(s)
}

// lockedBuffer is a log that tests read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// node is apid with fake daemons around it.
type node struct {
	t       testing.TB
	dir     string
	trustd  *fakeTrustd
	daemon  *Daemon
	address string
	log     *lockedBuffer
	tcp     *net.TCPListener
	own     *net.UnixListener // apid's
	grace   time.Duration     // of strangers; 0: as on a node
	dialer  func(context.Context, string, string) (net.Conn, error)
	ahead   atomic.Int64 // of apid's clock, before the real one
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) socket(name string) string { return filepath.Join(n.dir, name) }

// bind makes a daemon's listener, as PID 1 does: it outlives the daemon.
func (n *node) bind(name string) *net.UnixListener {
	n.t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket(name)})
	n.must(err)
	l.SetUnlinkOnClose(false)
	n.t.Cleanup(func() { l.Close() })
	return l
}

// inherit returns what a started daemon gets of a listener.
func (n *node) inherit(l *net.UnixListener) net.Listener {
	n.t.Helper()
	f, err := l.File()
	n.must(err)
	defer f.Close()
	dup, err := net.FileListener(f)
	n.must(err)
	dup.(*net.UnixListener).SetUnlinkOnClose(false)
	return dup
}

// serve starts a fake daemon whose only caller is apid; the returned function kills it.
func (n *node) serve(l *net.UnixListener, register func(*grpc.Server), opts ...grpc.ServerOption) (kill func()) {
	n.t.Helper()
	own := n.inherit(l)
	list := peer.List{trustv1.Signer_ServiceDesc.ServiceName: {uid.Apid}, "test.Echo": {uid.Apid}}
	s := grpc.NewServer(append(peer.ServerOptions(list, func(net.Conn) (uid.ID, error) { return uid.Apid, nil }), opts...)...)
	register(s)
	peer.Public(s, list)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(own) }()
	kill = sync.OnceFunc(func() { s.Stop(); <-done })
	n.t.Cleanup(kill)
	return kill
}

// newNode starts apid and a fake trustd. Further daemons are the test's to start.
func newNode(t testing.TB, owned bool) *node {
	t.Helper()
	f := newFakeTrustd(t)
	if owned {
		f.own()
	}
	n := bareNode(t, f, nil)
	n.serve(n.bind("trustd"), func(s *grpc.Server) {
		trustv1.RegisterClaimServer(s, f)
		trustv1.RegisterSignerServer(s, f)
	})
	n.start()
	return n
}

// bareNode has listeners, as PID 1 makes them, and nobody who serves them.
func bareNode(t testing.TB, f *fakeTrustd, dial func(context.Context, string, string) (net.Conn, error)) *node {
	t.Helper()
	dir, err := os.MkdirTemp("", "apid") // short: a socket's path has at most 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{t: t, dir: dir, trustd: f, log: &lockedBuffer{}, dialer: dial}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	n.must(err)
	t.Cleanup(func() { tcp.Close() })
	n.tcp, n.own, n.address = tcp.(*net.TCPListener), n.bind("apid"), tcp.Addr().String()
	return n
}

// start starts apid; the returned function stops it, and the listeners stay.
func (n *node) start() (stop func()) {
	n.t.Helper()
	f, err := n.tcp.File()
	n.must(err)
	tcp, err := net.FileListener(f)
	n.must(errors.Join(err, f.Close()))
	ready := make(chan struct{})
	routes := madeRoutes()
	echo := &route{service: "test.Echo", method: "Both", daemon: "machined", need: []authv1.Role{authv1.Role_READER}, stream: echoDesc.Streams[0]}
	routes[echo.name()] = echo
	n.daemon, err = New(Config{
		Env: daemon.Env{Name: "apid", Log: slog.New(slog.NewTextHandler(io.MultiWriter(n.log), nil)), Metrics: metrics.New("apid"), TCP: tcp,
			Listen: n.inherit(n.own), Ready: func() { close(ready) }, Who: whoDials},
		Socket: n.socket, Routes: routes, Now: func() time.Time { return time.Now().Add(time.Duration(n.ahead.Load())) }, Dial: n.dialer,
	})
	n.must(err)
	if n.grace > 0 {
		n.daemon.gate.Grace = n.grace
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	d := n.daemon
	go func() { done <- d.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	<-ready
	return stop
}

// echoDesc is a service that streams both ways; none of ours does yet.
var echoDesc = grpc.ServiceDesc{ServiceName: "test.Echo", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
	StreamName: "Both", ServerStreams: true, ClientStreams: true,
	Handler: func(_ any, s grpc.ServerStream) error {
		for {
			var m wrapperspb.StringValue
			if err := s.RecvMsg(&m); errors.Is(err, io.EOF) {
				return s.SendMsg(wrapperspb.String("end"))
			} else if err != nil {
				return err
			}
			if m.Value == "fail" {
				return errs.New(errs.Conflict, "as you wish")
			}
			if err := s.SendMsg(wrapperspb.String("re: " + m.Value)); err != nil {
				return err
			}
		}
	},
}}}

// machined starts a fake machined.
func (n *node) machined(f *fakeMachined) (kill func()) {
	return n.serve(n.bind("machined"), func(s *grpc.Server) { n.register(s, f) })
}

func (n *node) register(s *grpc.Server, f *fakeMachined) {
	machinev1.RegisterMachineServer(s, f)
	controlv1.RegisterControlServer(s, controlv1.UnimplementedControlServer{})
	s.RegisterService(&echoDesc, nil)
}

func (n *node) dial(c client.Credentials, opts ...grpc.DialOption) *grpc.ClientConn {
	n.t.Helper()
	conn, err := client.Dial(n.address, c, opts...)
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

func (n *node) ctx() context.Context {
	ctx, cancel := context.WithTimeout(n.t.Context(), 20*time.Second)
	n.t.Cleanup(cancel)
	return ctx
}

// insecureTLS is for callers who do not know the node's authority.
func insecureTLS() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
}

func clientProof(binding, csr []byte) []byte { return claim.ClientProof(claimCode, binding, csr) }

type alwaysServing struct {
	healthv1.UnimplementedHealthServer
}

func (alwaysServing) Check(context.Context, *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
}

// dials counts the ends of Unix sockets, which have names of their own. One that is refused comes back, perhaps after others have come: the user is in its name.
var dials atomic.Uint64

// whoDials reads it, in the kernel's place.
func whoDials(c net.Conn) (uid.ID, error) {
	name := c.RemoteAddr().String()
	id, err := strconv.ParseUint(name[strings.LastIndexByte(name, '-')+1:], 10, 32)
	return uid.ID(id), err
}

// as connects to apid's Unix socket as a user of the node.
func (n *node) as(id uid.ID, opts ...grpc.DialOption) *grpc.ClientConn {
	n.t.Helper()
	conn, err := peer.Dial(n.socket("apid"), append(opts, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("@apid-test-%d-%d-%d", os.Getpid(), dials.Add(1), id)}}
		return d.DialContext(ctx, "unix", n.socket("apid"))
	}))...)
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	conn.Connect() // the user is read when the connection is made
	for s := conn.GetState(); s != connectivity.Ready && s != connectivity.TransientFailure; s = conn.GetState() {
		if !conn.WaitForStateChange(n.t.Context(), s) {
			n.t.Fatal("no connection")
		}
	}
	return conn
}
