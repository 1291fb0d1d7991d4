package apid

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
)

func getVersion(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
	_, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{}, opts...)
	return err
}

func wantCode(t *testing.T, what string, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: %v, want %v", what, err, code)
	}
}

// strangerConn is a connection to a node whose authority is not known.
func (n *node) strangerConn() *grpc.ClientConn {
	n.t.Helper()
	conn, err := grpc.NewClient(n.address, grpc.WithTransportCredentials(insecureTLS()))
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

func TestFromClaimToAdministrator(t *testing.T) {
	n := newNode(t, false)
	n.machined(&fakeMachined{})
	ctx := n.ctx()

	stranger := n.strangerConn()
	wantStranger := func(what string, err error) {
		t.Helper()
		if status.Code(err) != codes.Unauthenticated || status.Convert(err).Message() != errStranger.Error() {
			t.Errorf("%s by a stranger: %v", what, err)
		}
	}
	for _, owned := range []bool{false, true} {
		if owned {
			_, err := client.Claim(ctx, n.address, "AAAAA-AAAAA-AAAAA-AAAAA", "")
			wantCode(t, "wrong code", err, codes.Unauthenticated)
			creds, err := client.Claim(ctx, n.address, "7f3kq-m2x9t-oablc-defgh", "")
			n.must(err)
			conn := n.dial(creds)
			n.must(getVersion(ctx, conn))
			_, err = client.Claim(ctx, n.address, claimCode, "")
			wantCode(t, "second claim", err, codes.FailedPrecondition)
		}
		wantStranger("GetVersion", getVersion(ctx, stranger))
		_, err := healthv1.NewHealthClient(stranger).Check(ctx, &healthv1.HealthCheckRequest{})
		wantStranger("health", err)
		r, err := reflectionv1.NewServerReflectionClient(stranger).ServerReflectionInfo(ctx)
		n.must(err)
		_, err = r.Recv()
		wantStranger("reflection", err)
		for _, method := range []string{"/control.v1.Control/ReadMetrics", "/trust.v1.Signer/WatchTrust", "/no.such/Method", "/machine.v1.Machine/Nothing"} {
			wantStranger(method, stranger.Invoke(ctx, method, &controlv1.ReadMetricsRequest{}, &controlv1.ReadMetricsResponse{}))
		}
		_, err = trustv1.NewTrustClient(stranger).Bootstrap(ctx, &trustv1.BootstrapRequest{})
		wantStranger("bootstrap", err)
	}
}

// What a client says about the binding of its connection does not count.
func TestClaimBindingIsApids(t *testing.T) {
	n := newNode(t, false)
	_, err := trustv1.NewClaimClient(n.strangerConn()).Claim(n.ctx(), &trustv1.ClaimRequest{ChannelBinding: make([]byte, 32), Csr: []byte("x"), Proof: clientProof(make([]byte, 32), []byte("x"))})
	wantCode(t, "claim with a binding of one's own", err, codes.Unauthenticated)
	_, err = trustv1.NewClaimClient(n.as(uid.Gateway)).Claim(n.ctx(), &trustv1.ClaimRequest{})
	wantCode(t, "claim through gateway", err, codes.Unauthenticated)
}

// fakeStoraged is locked, and knows one recovery key.
type fakeStoraged struct {
	storagev1.UnimplementedUnlockServer
	verifier []byte
	bindings [][]byte
	begun    chan struct{} // gets one when a volume is being opened, which takes until end is closed; nil: no time
	end      chan struct{}
}

func (f *fakeStoraged) Challenge(_ context.Context, r *storagev1.ChallengeRequest) (*storagev1.ChallengeResponse, error) {
	f.bindings = append(f.bindings, r.GetChannelBinding())
	return &storagev1.ChallengeResponse{
		Challenges: []*storagev1.Challenge{{Kind: unlock.Recovery, Proof: unlock.NodeProof(f.verifier, r.GetChannelBinding())}}, Reasons: []string{"STATE: tpm: cleared"},
	}, nil
}

func (f *fakeStoraged) Unlock(_ context.Context, r *storagev1.UnlockRequest) (*storagev1.UnlockResponse, error) {
	if !unlock.Equal(r.GetProof(), unlock.CallerProof(f.verifier, r.GetChannelBinding())) {
		return nil, errs.New(errs.Unauthenticated, "the key is wrong")
	}
	if f.begun != nil {
		f.begun <- struct{}{}
		<-f.end
	}
	return &storagev1.UnlockResponse{Volumes: []string{"STATE", "VAR"}}, nil
}

// waitTrust waits until apid has heard of something from trustd.
func (n *node) waitTrust(is func(*trustv1.TrustState) bool) {
	n.t.Helper()
	for ctx := n.ctx(); ; {
		r, changed := n.daemon.trust.Roots()
		if is(r.State) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			n.t.Fatal("trust does not arrive")
		}
	}
}

// While STATE is locked, whoever has its key opens it, and nobody else can do anything.
func TestUnlock(t *testing.T) {
	n := newNode(t, false)
	n.trustd.state.Set(&trustv1.TrustState{Locked: true})
	key := string(unlock.NewRecoveryKey())
	f := &fakeStoraged{verifier: unlock.Verifier(unlock.Recovery, []byte(key), nil)}
	n.serve(n.bind("storaged"), func(s *grpc.Server) { storagev1.RegisterUnlockServer(s, f) })
	ctx := n.ctx()
	n.waitTrust((*trustv1.TrustState).GetLocked)
	wantCode(t, "anything else", getVersion(ctx, n.strangerConn()), codes.FailedPrecondition)
	_, err := client.Claim(ctx, n.address, claimCode, "")
	wantCode(t, "claim", err, codes.FailedPrecondition)
	_, err = client.Unlock(ctx, n.address, unlock.Recovery, string(unlock.NewRecoveryKey()), client.Credentials{})
	if err == nil || !strings.Contains(err.Error(), "was not sent") || !strings.Contains(err.Error(), "tpm: cleared") {
		t.Errorf("a wrong key: %v", err)
	}
	if got, err := client.Unlock(ctx, n.address, unlock.Recovery, strings.ToLower(key), client.Credentials{}); err != nil || len(got) != 2 {
		t.Errorf("got %v, %v", got, err)
	}
	// What a client says about its binding does not count, and there is no way without one.
	mine := make([]byte, unlock.BindingSize)
	_, err = storagev1.NewUnlockClient(n.strangerConn()).Unlock(ctx, &storagev1.UnlockRequest{ChannelBinding: mine, Kind: unlock.Recovery, Proof: unlock.CallerProof(f.verifier, mine)})
	wantCode(t, "a binding of one's own", err, codes.Unauthenticated)
	_, err = storagev1.NewUnlockClient(n.as(uid.Gateway)).Challenge(ctx, &storagev1.ChallengeRequest{})
	wantCode(t, "through gateway", err, codes.Unauthenticated)
	if bytes.Equal(f.bindings[0], f.bindings[1]) || len(f.bindings[0]) != unlock.BindingSize {
		t.Errorf("bindings %x", f.bindings)
	}

	n.trustd.own()
	n.waitTrust((*trustv1.TrustState).GetClaimed)
	_, err = client.Unlock(ctx, n.address, unlock.Recovery, key, client.Credentials{})
	wantCode(t, "once the owner is known, by a stranger", err, codes.Unauthenticated)
	admin := n.trustd.certificate(n.trustd.ca, "ann", "admin", -time.Minute, time.Hour)
	if got, err := client.Unlock(ctx, n.address, unlock.Recovery, key, admin); err != nil || len(got) != 2 {
		t.Errorf("by an administrator: %v, %v", got, err)
	}
}

func TestCredentials(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	ctx := n.ctx()
	ca := []byte(text(n.trustd.ca.cert))
	both := n.trustd.certificate(n.trustd.ca, "ann", "admin", -time.Minute, time.Hour)
	both.Token = "x.y.z"
	for _, c := range []struct {
		name       string
		creds      client.Credentials
		get, reset codes.Code
		text       string // in the answer to Reboot
	}{
		{"admin's certificate", n.trustd.certificate(n.trustd.ca, "ann", "admin", -time.Minute, time.Hour), codes.OK, codes.OK, ""},
		{"reader's certificate", n.trustd.certificate(n.trustd.ca, "ann", "reader", -time.Minute, time.Hour), codes.OK, codes.PermissionDenied, "needs role operator or admin"},
		{"operator's token", n.trustd.mint("op", "operator"), codes.OK, codes.OK, ""},
		{"reader's token", n.trustd.mint("prometheus", "reader"), codes.OK, codes.PermissionDenied, `"prometheus" has reader`},
		{"backup's token", n.trustd.mint("cron", "etcd-backup"), codes.PermissionDenied, codes.PermissionDenied, "needs role"},
		{"nothing", client.Credentials{CA: ca}, codes.Unauthenticated, codes.Unauthenticated, "no valid credentials"},
		{"garbage for a token", client.Credentials{CA: ca, Token: "x.y.z"}, codes.Unauthenticated, codes.Unauthenticated, "no valid credentials"},
		{"good certificate, bad token", both, codes.Unauthenticated, codes.Unauthenticated, "no valid credentials"},
		{"foreign certificate", n.trustd.certificate(newAuthority(t), "ann", "admin", -time.Minute, time.Hour), codes.Unauthenticated, codes.Unauthenticated, "no valid credentials"},
		{"expired certificate", n.trustd.certificate(n.trustd.ca, "ann", "admin", -2*time.Minute, -time.Minute), codes.Unauthenticated, codes.Unauthenticated, "your certificate expired at"},
	} {
		conn := n.dial(c.creds)
		wantCode(t, c.name+", GetVersion", getVersion(ctx, conn), c.get)
		_, err := machinev1.NewMachineClient(conn).Reboot(ctx, &machinev1.RebootRequest{})
		wantCode(t, c.name+", Reboot", err, c.reset)
		if !strings.Contains(status.Convert(err).Message(), c.text) {
			t.Errorf("%s: %v, want %q in it", c.name, err, c.text)
		}
	}
	// Internal methods are not there, even for the administrator.
	admin := n.dial(n.trustd.mint("ann", "admin"))
	_, err := controlv1.NewControlClient(admin).ReadMetrics(ctx, &controlv1.ReadMetricsRequest{})
	wantCode(t, "control", err, codes.Unimplemented)
	_, err = trustv1.NewSignerClient(admin).SignCertificate(ctx, &trustv1.SignCertificateRequest{})
	wantCode(t, "signer", err, codes.Unimplemented)
}

func TestCredentialsExpireOnOpenConnections(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	conn := n.dial(n.trustd.certificate(n.trustd.ca, "ann", "admin", -time.Minute, time.Hour))
	n.must(getVersion(n.ctx(), conn))
	token := n.dial(n.trustd.mint("ann", "admin"))
	n.must(getVersion(n.ctx(), token))
	n.must(getVersion(n.ctx(), token))
	n.ahead.Store(int64(2 * time.Hour))
	wantCode(t, "two hours later", getVersion(n.ctx(), conn), codes.Unauthenticated)
	wantCode(t, "two hours later, by token", getVersion(n.ctx(), token), codes.Unauthenticated)
	n.ahead.Store(0)
	n.must(getVersion(n.ctx(), token))
	_, n.trustd.token, _ = ed25519.GenerateKey(nil) // another authority took over
	n.trustd.own()
	for getVersion(n.ctx(), token) == nil { // until apid has heard of it
		runtime.Gosched()
	}
	wantCode(t, "with a key that is not trusted any more", getVersion(n.ctx(), token), codes.Unauthenticated)
}

// Only apid's word about the caller reaches a daemon, and no credential does.
func TestMetadata(t *testing.T) {
	n := newNode(t, true)
	got := make(chan metadata.MD, 1)
	n.machined(&fakeMachined{version: func(ctx context.Context) (*machinev1.GetVersionResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		got <- md
		return &machinev1.GetVersionResponse{}, nil
	}})
	ctx := metadata.AppendToOutgoingContext(n.ctx(), peer.CallerKey, "root", peer.RolesKey, "admin", "x-anything", "1", "cookie", "secret")
	n.must(getVersion(ctx, n.dial(n.trustd.mint("prometheus", "reader", "etcd-backup"))))
	md := <-got
	if fmt.Sprint(md.Get(peer.CallerKey), md.Get(peer.RolesKey)) != "[prometheus] [reader etcd-backup]" {
		t.Errorf("caller %v, roles %v", md.Get(peer.CallerKey), md.Get(peer.RolesKey))
	}
	for _, k := range []string{"authorization", "x-anything", "cookie"} {
		if len(md.Get(k)) > 0 {
			t.Errorf("%s reached the daemon", k)
		}
	}
}

// A daemon that dies during a call that may be repeated: the caller does not notice.
func TestDaemonDiesDuringCall(t *testing.T) {
	n := newNode(t, true)
	l := n.bind("machined")
	reached := make(chan struct{})
	kill := n.serve(l, func(s *grpc.Server) {
		n.register(s, &fakeMachined{version: func(ctx context.Context) (*machinev1.GetVersionResponse, error) {
			close(reached)
			<-ctx.Done()
			return nil, ctx.Err()
		}})
	})
	conn := n.dial(n.trustd.mint("ann", "admin"), grpc.WithDisableRetry()) // apid repeats, not the client
	answer := make(chan error, 1)
	go func() { answer <- getVersion(n.ctx(), conn) }()
	<-reached
	kill()
	n.serve(l, func(s *grpc.Server) { n.register(s, &fakeMachined{}) })
	if err := <-answer; err != nil {
		t.Errorf("the call failed: %v", err)
	}
}

// A call that must not be repeated is not, but it waits for a daemon that is not there yet.
func TestChangesAreMadeOnce(t *testing.T) {
	n := newNode(t, true)
	l := n.bind("machined")
	conn := n.dial(n.trustd.mint("ann", "admin"), grpc.WithDisableRetry())
	reboot := func() chan error {
		answer := make(chan error, 1)
		go func() {
			_, err := machinev1.NewMachineClient(conn).Reboot(n.ctx(), &machinev1.RebootRequest{})
			answer <- err
		}()
		return answer
	}
	early := reboot() // nobody listens yet
	var times atomic.Int32
	reached := make(chan struct{}, 1)
	block := make(chan struct{})
	kill := n.serve(l, func(s *grpc.Server) {
		n.register(s, &fakeMachined{reboot: func(ctx context.Context) error {
			if times.Add(1) == 1 {
				return status.Error(codes.FailedPrecondition, "first")
			}
			reached <- struct{}{}
			select {
			case <-block:
			case <-ctx.Done():
			}
			return status.Error(codes.Unavailable, "gone")
		}})
	})
	wantCode(t, "a call before the daemon ran", <-early, codes.FailedPrecondition)
	answer := reboot()
	<-reached
	kill()
	n.serve(l, func(s *grpc.Server) {
		n.register(s, &fakeMachined{reboot: func(context.Context) error { times.Add(1); return status.Error(codes.Aborted, "again") }})
	})
	wantCode(t, "killed during a change", <-answer, codes.Unavailable)
	if times.Load() != 2 {
		t.Errorf("the daemon was asked %d times, want 2", times.Load())
	}
}

func TestStreams(t *testing.T) {
	n := newNode(t, true)
	gone := make(chan struct{})
	n.machined(&fakeMachined{events: func(s grpc.ServerStreamingServer[machinev1.Event]) error {
		for i := range 1000 {
			if err := s.Send(&machinev1.Event{Text: fmt.Sprint(i)}); err != nil {
				return err
			}
		}
		<-s.Context().Done()
		close(gone)
		return s.Context().Err()
	}})
	conn := n.dial(n.trustd.mint("ann", "reader"))
	ctx, cancel := context.WithCancel(n.ctx())
	defer cancel()
	s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{})
	n.must(err)
	for i := range 1000 {
		e, err := s.Recv()
		n.must(err)
		if e.GetText() != fmt.Sprint(i) {
			t.Fatalf("event %d is %q", i, e.GetText())
		}
	}
	cancel()
	<-gone // the daemon learns that the client has left

	bidi := func() grpc.ClientStream {
		s, err := conn.NewStream(n.ctx(), &echoDesc.Streams[0], "/test.Echo/Both")
		n.must(err)
		return s
	}
	b := bidi()
	var m wrapperspb.StringValue
	for _, w := range []string{"one", "two"} {
		n.must(b.SendMsg(wrapperspb.String(w)))
		n.must(b.RecvMsg(&m))
		if m.Value != "re: "+w {
			t.Errorf("got %q", m.Value)
		}
	}
	n.must(b.CloseSend())
	n.must(b.RecvMsg(&m))
	if err := b.RecvMsg(&m); m.Value != "end" || !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %q, %v", m.Value, err)
	}
	b = bidi()
	n.must(b.SendMsg(wrapperspb.String("fail")))
	wantCode(t, "a stream that the daemon ends", b.RecvMsg(&m), codes.Aborted)
}

func TestBounds(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	ctx := n.ctx()
	admin := n.dial(n.trustd.mint("ann", "admin"))
	_, err := configv1.NewConfigClient(admin).Apply(ctx, &configv1.ApplyRequest{Documents: strings.Repeat("#", 5<<20)})
	wantCode(t, "5 MiB", err, codes.ResourceExhausted)
	n.must(getVersion(ctx, admin))

	short, cancel := context.WithTimeout(ctx, time.Nanosecond)
	defer cancel()
	wantCode(t, "no time left", getVersion(short, admin), codes.DeadlineExceeded)

	// Idle connections, each one more than there are places, and garbage.
	var idle []net.Conn
	for range 2 * maxConns {
		c, err := net.Dial("tcp", n.address)
		n.must(err)
		idle = append(idle, c)
		if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil && len(idle) <= maxConns/2 {
			n.must(err)
		}
	}
	n.must(getVersion(ctx, admin))                                   // who was inside stays inside
	n.must(getVersion(ctx, n.dial(n.trustd.mint("late", "reader")))) // who comes later gets in
	for _, c := range idle {
		c.Close()
	}
	old, err := tls.Dial("tcp", n.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err == nil {
		old.Close()
		t.Error("TLS 1.2 is served")
	}
}

func TestAudit(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	ctx := n.ctx()
	n.must(getVersion(ctx, n.dial(n.trustd.mint("looks", "admin"))))
	if strings.Contains(n.log.String(), "audit") {
		t.Errorf("reading is audited:\n%s", n.log)
	}
	_, err := machinev1.NewMachineClient(n.dial(n.trustd.mint("boss", "operator"))).Reboot(ctx, &machinev1.RebootRequest{})
	n.must(err)
	line := ""
	for l := range strings.SplitSeq(n.log.String(), "\n") {
		if strings.Contains(l, "msg=audit") {
			line += l
		}
	}
	for _, want := range []string{"who=boss", "roles=operator", "method=/machine.v1.Machine/Reboot", "peer=127.0.0.1:", "code=OK", "dur=", "change=true"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	stranger := n.strangerConn()
	for range 3 * refusedBurst {
		err := stranger.Invoke(ctx, "/machine.v1.Machine/Reboot", &machinev1.RebootRequest{}, &machinev1.RebootResponse{})
		wantCode(t, "stranger", err, codes.Unauthenticated)
	}
	if n := strings.Count(n.log.String(), "code=Unauthenticated"); n < refusedBurst || n > 2*refusedBurst {
		t.Errorf("%d lines about a stranger, want about %d", n, refusedBurst)
	}
	for i := range 5 {
		if err := stranger.Invoke(ctx, fmt.Sprintf("/evil\x1b[2J%d/Method", i), &machinev1.RebootRequest{}, &machinev1.RebootResponse{}); err == nil {
			t.Error("no error")
		}
	}
	if strings.Contains(n.log.String(), "evil") {
		t.Error("a stranger's text is in the log")
	}
}

func TestUnixSocket(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	ctx := n.ctx()
	gateway := n.as(uid.Gateway)
	wantCode(t, "gateway by itself", getVersion(ctx, gateway), codes.Unauthenticated)
	token := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+n.trustd.mint("ann", "operator").Token, "x-forwarded-for", "203.0.113.9, 192.0.2.1")
	n.must(getVersion(token, gateway))
	_, err := machinev1.NewMachineClient(gateway).Reboot(token, &machinev1.RebootRequest{})
	n.must(err)
	if !strings.Contains(n.log.String(), `peer="gateway 192.0.2.1"`) {
		t.Errorf("log:\n%s", n.log)
	}
	_, err = controlv1.NewControlClient(gateway).ReadMetrics(token, &controlv1.ReadMetricsRequest{})
	wantCode(t, "control by gateway", err, codes.PermissionDenied)

	machined := n.as(uid.Machined)
	set := func(generation uint64, host string) error {
		_, err := controlv1.NewControlClient(machined).SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: generation,
			Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: " + host + "\n")}})
		return err
	}
	n.must(set(2, "n1"))
	wantCode(t, "older generation", set(1, "n0"), codes.Aborted)
	wantCode(t, "machined reads through apid", getVersion(token, machined), codes.PermissionDenied)
	_, err = machinev1.NewMachineClient(gateway).Reboot(token, &machinev1.RebootRequest{})
	n.must(err)
	if !strings.Contains(n.log.String(), "node=n1") {
		t.Errorf("the audit log does not name the node:\n%s", n.log)
	}
	short, cancel := context.WithTimeout(token, 200*time.Millisecond)
	defer cancel()
	if err := getVersion(short, n.as(uid.Networkd)); err == nil {
		t.Error("networkd may call through apid")
	}
}

func TestHealthAndReflection(t *testing.T) {
	n := newNode(t, true)
	n.serve(n.bind("machined"), func(s *grpc.Server) {
		n.register(s, &fakeMachined{})
		healthv1.RegisterHealthServer(s, alwaysServing{})
	})
	ctx := n.ctx()
	conn := n.dial(n.trustd.mint("r", "reader"))
	h := healthv1.NewHealthClient(conn)
	for service, want := range map[string]string{"": "SERVING", "grpc.health.v1.Health": "SERVING", "network.v1.Network": "NOT_SERVING"} {
		resp, err := h.Check(ctx, &healthv1.HealthCheckRequest{Service: service})
		if err != nil || resp.GetStatus().String() != want {
			t.Errorf("%q: %v, %v; want %s", service, resp, err, want)
		}
	}
	_, err := h.Check(ctx, &healthv1.HealthCheckRequest{Service: "trust.v1.Signer"})
	wantCode(t, "health of an internal service", err, codes.NotFound)

	s, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	n.must(err)
	n.must(s.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}))
	resp, err := s.Recv()
	n.must(err)
	var names []string
	for _, v := range resp.GetListServicesResponse().GetService() {
		names = append(names, v.GetName())
	}
	got := strings.Join(names, " ")
	for _, want := range []string{"machine.v1.Machine", "trust.v1.Trust", "trust.v1.Claim", "etcd.v1.Etcd", "kubernetes.v1.Kubernetes", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} {
		if !strings.Contains(got, want) {
			t.Errorf("reflection does not list %s", want)
		}
	}
	if strings.Contains(got, "control.v1") || strings.Contains(got, "Signer") {
		t.Errorf("reflection lists what has no route: %s", got)
	}
	n.must(s.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "machine.v1.Machine"}}))
	resp, err = s.Recv()
	n.must(err)
	if len(resp.GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
		t.Errorf("no descriptor: %v", resp)
	}
}

// The same certificate is shown until trustd signs another; connections that are open stay.
func TestCertificateIsSwapped(t *testing.T) {
	n := newNode(t, true)
	n.machined(&fakeMachined{})
	open := n.dial(n.trustd.mint("ann", "reader"))
	n.must(getVersion(n.ctx(), open))
	before, changed := n.daemon.leaf.Pair()
	n.daemon.leaf.Renew()
	<-changed
	after, _ := n.daemon.leaf.Pair()
	if before.TLS.Leaf.Equal(after.TLS.Leaf) {
		t.Fatal("not renewed")
	}
	n.must(getVersion(n.ctx(), open))
	c, err := tls.Dial("tcp", n.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	n.must(err)
	defer c.Close()
	if !c.ConnectionState().PeerCertificates[0].Equal(after.TLS.Leaf) {
		t.Error("a new connection is shown the old certificate")
	}
}
