package etcdd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// A node is an etcdd in this process, with what is around it: its disk, its trustd, and its place in a cluster.
type node struct {
	t          *testing.T // what it started ends with this test, whichever one started it
	ca         *testca.CA
	name, addr string
	client     string // etcd's address
	port       string // for members
	cfg        Config
	dir        string
	trust      latest.Cell[*trustv1.TrustState]
	others     *relay
	clock      func() time.Time
	turn       *turn
	generation uint64
	every      int         // hours between two snapshots by the schedule; 0: none
	full       atomic.Bool // the volume has no room for snapshots

	said    said // its log
	sock    string
	control controlv1.ControlClient
	etcd    etcdv1.EtcdClient
	halt    func() error // nil while it does not run
}

// said is a log that is read while it is written.
type said struct {
	mu   sync.Mutex
	text strings.Builder // guarded by mu
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// tells fails unless the daemon has told an event with all these texts.
func (n *node) tells(t *testing.T, texts ...string) {
	t.Helper()
	n.said.mu.Lock()
	all := n.said.text.String()
	n.said.mu.Unlock()
	for l := range strings.SplitSeq(all, "\n") {
		if strings.Contains(l, "msg=event type=cluster") && !slices.ContainsFunc(texts, func(text string) bool { return !strings.Contains(l, text) }) {
			return
		}
	}
	t.Errorf("%s tells no event with %q", n.name, texts)
}

func free(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// newNode returns a node that is off, and has no volume yet.
func newNode(t *testing.T, ca *testca.CA, name, addr string) *node {
	_, port, err := net.SplitHostPort(free(t))
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, ca: ca, name: name, addr: addr, dir: t.TempDir(), client: free(t), port: port}
	n.trust.Set(ca.State())
	return n
}

func (n *node) document() string {
	return fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: %s\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\netcd: {snapshots: {every: %d, keep: 2}}\n", n.name, n.every)
}

func (n *node) volume(t *testing.T) {
	t.Helper()
	if err := os.Mkdir(filepath.Join(n.dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// start runs etcdd, as PID 1 and machined do.
func (n *node) start(t *testing.T) {
	t.Helper()
	n.sock = filepath.Join(n.t.TempDir(), "s")
	l, err := net.Listen("unix", n.sock)
	if err != nil {
		t.Fatal(err)
	}
	n.cfg = Config{Signer: signer{n.ca, &n.trust, n.turn}, DataDir: filepath.Join(n.dir, "data"), RunDir: filepath.Join(n.dir, "run"),
		Client: n.client, Peer: net.JoinHostPort(n.addr, n.port), HTTP: free(t), Now: n.clock,
		Addresses: func() ([]netip.Prefix, error) { return []netip.Prefix{netip.MustParsePrefix(n.addr + "/8")}, nil },
		Env: daemon.Env{Name: "etcdd", Log: slog.New(slog.NewTextHandler(&n.said, nil)), Listen: l, Ready: func() {}, Metrics: metrics.New("etcdd"),
			Who: func(c net.Conn) (uid.ID, error) { // the user is in the name of the other end
				name, _, _ := strings.Cut(filepath.Base(c.RemoteAddr().String()), "-")
				id, ok := uid.Lookup(name)
				if !ok {
					return 0, fmt.Errorf("no user %q", name)
				}
				return id, nil
			}}}
	if n.others != nil {
		n.cfg.Peers = relayed{n}
	}
	if err := os.MkdirAll(n.cfg.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	d, err := New(n.cfg)
	if err != nil {
		t.Fatal(err)
	}
	d.kernel.wait, d.kernel.tick = 2*time.Second, 50
	d.keeper.look, d.keeper.pause = 20*time.Millisecond, 20*time.Millisecond
	d.keeper.free = func(dir string) (uint64, error) {
		if n.full.Load() {
			return 7 << 20, nil
		}
		return freeBytes(dir)
	}
	d.kernel.level.SetLevel(zapcore.FatalLevel)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	n.halt = func() error { cancel(); return <-done }
	n.t.Cleanup(func() {
		if n.halt != nil {
			n.stop(n.t)
		}
	})
	n.control = controlv1.NewControlClient(n.dial(t, uid.Machined))
	n.generation++
	if _, err := n.control.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: n.generation, Documents: []byte(n.document())}}); err != nil {
		t.Fatal(err)
	}
	n.etcd = etcdv1.NewEtcdClient(n.dial(t, uid.Apid))
}

func (n *node) stop(t *testing.T) {
	t.Helper()
	if err := n.halt(); !errors.Is(err, context.Canceled) {
		t.Errorf("%s: stop: %v", n.name, err)
	}
	n.halt = nil
}

var ends atomic.Int64

// dial connects to the daemon's socket for a user.
func (n *node) dial(t *testing.T, id uid.ID) *grpc.ClientConn {
	t.Helper()
	dir, sock := n.t.TempDir(), n.sock
	c, err := grpc.NewClient("passthrough:///etcdd", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(
		func(ctx context.Context, _ string) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("%s/%s-%d", dir, id.Name(), ends.Add(1))}}
			return d.DialContext(ctx, "unix", sock)
		}))
	if err != nil {
		t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

func (n *node) store(t *testing.T) storev1.StoreClient {
	return storev1.NewStoreClient(n.dial(t, uid.Trustd))
}

func (n *node) registry(t *testing.T) clusterv1.RegistryClient {
	return clusterv1.NewRegistryClient(n.dial(t, uid.Apid))
}

// until waits for a state of the loop.
func (n *node) until(t *testing.T, ok func(*controlv1.State) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	w, err := n.control.WatchState(ctx, &controlv1.WatchStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		s, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if ok(s) {
			return
		}
		t.Log(n.name, s)
	}
}

func converged(s *controlv1.State) bool { return s.GetConverged() }

func (n *node) status(t *testing.T) *etcdv1.Status {
	t.Helper()
	st, err := n.etcd.GetStatus(t.Context(), &etcdv1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// asNode is the metadata that apid adds to a call of another node.
func asNode(ctx context.Context, name string, role string) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs(peer.CallerKey, peer.NodePrefix+name, peer.RolesKey, peer.RoleNode, peer.RolesKey, role))
}

// signer is a trustd that knows a cluster.
type signer struct {
	*testca.CA
	trust *latest.Cell[*trustv1.TrustState]
	turn  *turn // nil: its authority stays
}

func (s signer) WatchTrust(ctx context.Context, _ *trustv1.WatchTrustRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[trustv1.TrustState], error) {
	return &trustStream{ctx: ctx, cell: s.trust}, nil
}

type trustStream struct {
	grpc.ClientStream
	ctx  context.Context
	cell *latest.Cell[*trustv1.TrustState]
	next <-chan struct{}
}

func (s *trustStream) Recv() (*trustv1.TrustState, error) {
	if s.next != nil {
		select {
		case <-s.ctx.Done():
			return nil, s.ctx.Err()
		case <-s.next:
		}
	}
	var v *trustv1.TrustState
	v, s.next = s.cell.Get()
	return v, nil
}

// A relay is the apids of a cluster: a call with "@controlplane" goes to the caller's own etcdd first, and to any other one that is available.
type relay struct {
	noVotes atomic.Bool // no learner is promoted

	mu    sync.Mutex
	nodes []*node // guarded by mu
}

type relayed struct {
	from *node
}

func (r relayed) each(ctx context.Context, f func(context.Context, etcdv1.PeersClient) error) error {
	md, _ := metadata.FromOutgoingContext(ctx)
	if !slices.Equal(md.Get(peer.NodeKey), []string{peer.ControlPlanes}) {
		return errs.New(errs.Invalid, "a daemon calls through apid with %s only", peer.ControlPlanes)
	}
	r.from.others.mu.Lock()
	nodes := append([]*node{r.from}, r.from.others.nodes...)
	r.from.others.mu.Unlock()
	err := errs.New(errs.Unavailable, "no control plane answers")
	for _, n := range nodes {
		if err = f(asNode(ctx, r.from.name, peer.RoleControlPlane), etcdv1.NewPeersClient(n.dial(n.t, uid.Apid))); !errs.Is(err, errs.Unavailable) {
			return err
		}
	}
	return err
}

func (r relayed) AddMember(ctx context.Context, in *etcdv1.AddMemberRequest, _ ...grpc.CallOption) (out *etcdv1.AddMemberResponse, err error) {
	err = r.each(ctx, func(ctx context.Context, c etcdv1.PeersClient) error { out, err = c.AddMember(ctx, in); return err })
	return out, err
}

func (r relayed) Promote(ctx context.Context, in *etcdv1.PromoteRequest, _ ...grpc.CallOption) (out *etcdv1.PromoteResponse, err error) {
	if r.from.others.noVotes.Load() {
		return nil, errs.New(errs.Unavailable, "no votes today")
	}
	err = r.each(ctx, func(ctx context.Context, c etcdv1.PeersClient) error { out, err = c.Promote(ctx, in); return err })
	return out, err
}
