package trustd

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// lab is a few machines that can call each other, and the etcd of their cluster.
type lab struct {
	t     *testing.T
	mu    sync.Mutex
	boxes map[string]*box // guarded by mu; by name

	data     map[string]*storev1.Entry // guarded by mu
	revision uint64                    // guarded by mu
	changed  latest.Cell[uint64]
	members  latest.Cell[[]string] // of etcd
}

// box is one machine: a real trustd on its socket, and of etcdd and apid what trustd sees of them.
type box struct {
	*machine
	lab  *lab
	name string
	ip   latest.Cell[string] // 127.0.0.N on the wire; others are told 10.5.0.N
	dir  string
	said *lockedBuffer
	door net.Listener // of its apid, when others can call it

	d    *Daemon
	conn map[uid.ID]*grpc.ClientConn
	stop func()
	apid latest.Cell[*grpc.ClientConn] // as who others' calls are passed on; nil while trustd does not run

	etcdAway, netAway latest.Cell[bool]
	// lost, if set, is called instead of bringing an answer from another node.
	lost func()
}

func newLab(t *testing.T) *lab {
	return &lab{t: t, boxes: map[string]*box{}, data: map[string]*storev1.Entry{}}
}

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

// box makes a machine and starts it. n is the last part of its address.
// tells fails unless trustd has told events with these texts.
func (b *box) tells(texts ...string) {
	b.t.Helper()
	all := ""
	for l := range strings.SplitSeq(b.said.String(), "\n") {
		if strings.Contains(l, "msg=event type=") {
			all += l + "\n"
		}
	}
	for _, text := range texts {
		if !strings.Contains(all, text) {
			b.t.Errorf("no event of %s with %q, but\n%s", b.name, text, all)
		}
	}
}

func (l *lab) box(name, n string) *box {
	l.t.Helper()
	b := &box{machine: newMachine(l.t), lab: l, name: name, dir: l.t.TempDir()}
	b.ip.Set("127.0.0." + n)
	b.cfg.Socket = func(daemon string) string { return filepath.Join(b.dir, daemon) }
	log := &lockedBuffer{}
	b.said = log
	b.cfg.Env.Log = slog.New(slog.NewTextHandler(log, nil))
	l.t.Cleanup(func() {
		if l.t.Failed() {
			l.t.Logf("log of %s:\n%s", name, log)
		}
	})
	b.mountState()
	b.serveUnix("etcdd", func(s *grpc.Server) {
		storev1.RegisterStoreServer(s, fakeStore{b: b})
		etcdv1.RegisterEtcdServer(s, fakeEtcd{b: b})
	})
	b.serveUnix("apid", func(s *grpc.Server) { outboundv1.RegisterOutboundServer(s, fakeOutbound{b: b}) })
	l.mu.Lock()
	l.boxes[name] = b
	l.mu.Unlock()
	b.boot()
	return b
}

func (b *box) serveUnix(daemon string, register func(*grpc.Server)) {
	l, err := net.Listen("unix", b.cfg.Socket(daemon))
	b.must(err)
	s := grpc.NewServer()
	register(s)
	go func() { _ = s.Serve(l) }()
	b.t.Cleanup(s.Stop)
}

// boot starts trustd; what it knows is what is on its disk.
func (b *box) boot() {
	b.t.Helper()
	if b.stop != nil {
		b.stop()
	}
	path := b.cfg.Socket("trustd")
	b.must(ignoreMissing(os.Remove(path)))
	l, err := net.Listen("unix", path)
	b.must(err)
	var as atomic.Uint32
	cfg := b.cfg
	cfg.Env.Listen, cfg.Env.Metrics = l, metrics.New("trustd")
	cfg.Env.Who = func(net.Conn) (uid.ID, error) { return uid.ID(as.Load()), nil }
	b.d, err = New(cfg)
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func(d *Daemon) { done <- d.Run(ctx) }(b.d)
	b.conn = map[uid.ID]*grpc.ClientConn{}
	for _, id := range []uid.ID{uid.Apid, uid.Etcdd, uid.Kubeletd, uid.KubeAPIServer} {
		as.Store(uint32(id))
		c, err := peer.Dial(path, grpc.WithStatsHandler(b.answers))
		b.must(err)
		_, err = trustv1.NewJoinClient(c).Join(b.t.Context(), &trustv1.JoinRequest{}, grpc.WaitForReady(true)) // the user is read when the connection is made
		if err == nil {
			b.t.Fatal("an empty request joined")
		}
		b.conn[id] = c
	}
	b.apid.Set(b.conn[uid.Apid])
	b.stop = sync.OnceFunc(func() {
		b.apid.Set(nil)
		for _, c := range b.conn {
			c.Close()
		}
		cancel()
		<-done
	})
	b.t.Cleanup(b.stop)
}

// admin is an administrator's call.
func (b *box) admin() context.Context {
	return metadata.AppendToOutgoingContext(b.t.Context(), peer.CallerKey, "ann", peer.RolesKey, "admin")
}

func (b *box) membership() trustv1.MembershipClient {
	return trustv1.NewMembershipClient(b.conn[uid.Apid])
}

// until waits until what the node trusts is as f wants it.
func (b *box) until(what string, f func(*trustv1.TrustState) bool) *trustv1.TrustState {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	for {
		s, changed := b.d.trust.Get()
		if s != nil && f(s) {
			return s
		}
		select {
		case <-ctx.Done():
			b.t.Fatalf("%s: never %s; at last %v", b.name, what, s)
		case <-changed:
		}
	}
}

// knows waits until the node knows these nodes.
func (b *box) knows(names ...string) *trustv1.TrustState {
	b.t.Helper()
	return b.until("knew "+strings.Join(names, ","), func(s *trustv1.TrustState) bool { return slices.Equal(nodeNamesOf(s), names) })
}

func nodeNamesOf(s *trustv1.TrustState) []string {
	var out []string
	for _, n := range s.GetNodes() {
		out = append(out, n.GetName())
	}
	return out
}

// untilState waits until what trustd reports has a text in its error.
func (b *box) untilState(text string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	for {
		s, changed := b.d.state.Get()
		if strings.Contains(s.GetError(), text) && (text != "" || s.GetError() == "") {
			return
		}
		select {
		case <-ctx.Done():
			b.t.Fatalf("%s: never reported %q; at last %q", b.name, text, s.GetError())
		case <-changed:
		}
	}
}

func (b *box) configure(generation uint64, role config.Role) {
	b.t.Helper()
	configureAs(b.t, b.d, b.name, generation, role)
}

// found makes the box the first node of a cluster.
func (b *box) found() *box {
	b.t.Helper()
	waitSettled(b.t, b.d)
	b.claim(b.d)
	b.configure(1, config.ControlPlane)
	_, err := b.d.bootstrap()
	b.must(err)
	b.open()
	b.knows(b.name)
	return b
}

// token makes a join token at a control plane.
func (b *box) token(role, name string) string {
	b.t.Helper()
	resp, err := b.membership().MakeJoinToken(b.admin(), &trustv1.MakeJoinTokenRequest{Role: role, Name: name})
	b.must(err)
	return resp.GetToken()
}

// aToken is a join token that etcd does not know of.
func (b *box) aToken() string {
	k, _ := b.d.keys.Get()
	return join.Token("0123456789", join.Secret(k.cluster.joinKey, "0123456789"))
}

// quoted is a node's key, as JSON.
func quoted(t testing.TB) string {
	t.Helper()
	key, _, err := newNodeKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text, err := pemKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Quote(text)
}

// joinRequest is what the operator's program sends.
func (b *box) joinRequest(name, token string, at ...*box) *trustv1.JoinClusterRequest {
	b.t.Helper()
	var endpoints []string
	for _, a := range at {
		endpoints = append(endpoints, a.endpoint())
	}
	code := b.code()
	sealed, err := claim.SealToken(code, binding, name, endpoints, token, rand.Reader)
	b.must(err)
	return &trustv1.JoinClusterRequest{SealedToken: sealed, Endpoints: endpoints, Name: name, ChannelBinding: binding, Proof: claim.JoinProof(code, binding, name, sealed, endpoints)}
}

func (b *box) tryJoin(r *trustv1.JoinClusterRequest) (*trustv1.JoinClusterResponse, error) {
	return trustv1.NewClaimClient(b.conn[uid.Apid]).JoinCluster(b.t.Context(), r)
}

// join makes the box a node of the cluster.
func (b *box) join(token string, at ...*box) *box {
	b.t.Helper()
	waitSettled(b.t, b.d)
	code := b.code()
	resp, err := b.tryJoin(b.joinRequest(b.name, token, at...))
	b.must(err)
	if !claim.Equal(resp.GetProof(), claim.JoinedProof(code, binding, resp.GetCa(), resp.GetRole())) {
		b.t.Error("the node's proof that it joined is wrong")
	}
	role := config.Role(resp.GetRole())
	b.configure(1, role)
	if role == config.ControlPlane {
		b.open()
	}
	return b
}

// sign has a daemon of the box get a certificate.
func (b *box) sign(who uid.ID, profile string, tmpl x509.CertificateRequest) (*x509.Certificate, error) {
	b.t.Helper()
	_, csr := request(b.t, tmpl)
	resp, err := trustv1.NewSignerClient(b.conn[who]).SignCertificate(b.t.Context(), &trustv1.SignCertificateRequest{Profile: profile, Csr: csr})
	if err != nil {
		return nil, err
	}
	return parsePEM(b.t, resp.GetCertificate()), nil
}

func parsePEM(t testing.TB, text string) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		t.Fatalf("no PEM: %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func parse509(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pkixName(cn string, org ...string) pkix.Name {
	return pkix.Name{CommonName: cn, Organization: org}
}
