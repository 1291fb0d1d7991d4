package rolling

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// startEtcd runs a real one.
func startEtcd(t *testing.T) *clientv3.Client {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel, cfg.UnsafeNoFsync = t.TempDir(), "fatal", true // no power is cut here
	local := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = local, local
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(30 * time.Second):
		t.Fatal("etcd does not start")
	}
	c := v3client.New(e.Server)
	t.Cleanup(func() { c.Close() })
	return c
}

// world is a cluster of fake nodes around a real store. Time goes on by a second each round.
type world struct {
	t     *testing.T
	store *clientv3.Client
	now   time.Time
	nodes []*machine
	kube  *pods
	most  int // how many nodes were down at the same moment, at worst

	commits int                  // of coordinators, so far
	at      func(n int) accident // what happens to the n-th
}

// accident is what happens to a coordinator at a commit.
type accident int

const (
	none accident = iota
	diesBefore
	diesAfter
	freezes // until others have finished the work
)

// machine is a node.
type machine struct {
	name, role, version, next string
	boot                      int
	witnessed                 int // calls to its API
	away                      int // rounds until it is up again
	sick                      int // rounds until it is ready after that
	broken                    bool
	trial                     bool
	reboots                   int
	coordinator               *Coordinator // nil: its etcdd is gone, or it is a worker
}

func newWorld(t *testing.T, store *clientv3.Client) *world {
	t.Helper()
	if _, err := store.Delete(t.Context(), prefix, clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: store, now: time.Unix(1e9, 0), kube: &pods{cordoned: map[string]string{}}, at: func(int) accident { return none }}
	for _, name := range []string{"n1", "n2", "n3", "w1"} {
		m := &machine{name: name, role: "controlplane", version: "1"}
		if name == "w1" {
			m.role = "worker"
		}
		w.nodes = append(w.nodes, m)
		w.boot(m)
	}
	return w
}

func (w *world) node(name string) *machine {
	return w.nodes[slices.IndexFunc(w.nodes, func(m *machine) bool { return m.name == name })]
}

// boot starts the node's etcdd.
func (w *world) boot(m *machine) {
	if m.role != "controlplane" {
		return
	}
	var c *Coordinator
	client := clientv3.NewCtxClient(context.Background())
	client.KV = fragile{w.store.KV, w, m, func() bool { return m.coordinator == c }}
	c = New(Config{Log: slog.New(slog.DiscardHandler), Name: func() string { return m.name },
		Get: func(ctx context.Context, prefix string) (*clientv3.GetResponse, error) {
			return client.Get(ctx, prefix, clientv3.WithPrefix())
		},
		Txn: func(ctx context.Context, conditions []clientv3.Cmp, ops []clientv3.Op) (bool, error) {
			r, err := client.Txn(ctx).If(conditions...).Then(ops...).Commit()
			return err == nil && r.Succeeded, err
		},
		Nodes: func() ([]*clusterv1.Node, error) { return w.registry(), nil }, Voters: w.voters, Kubernetes: w.kube, Witness: w.witness, Now: func() time.Time { return w.now }})
	m.coordinator = c
}

func (m *machine) id() string { return fmt.Sprintf("%s-boot-%d", m.name, m.boot) }

// registry says of a node that just went down what it last said of itself.
func (w *world) registry() []*clusterv1.Node {
	var out []*clusterv1.Node
	for _, m := range w.nodes {
		n := &clusterv1.Node{Name: m.name, Role: m.role, State: "ready", BootId: m.id(), Version: m.version, NextVersion: m.next, Trial: m.trial}
		switch {
		case m.away > 1:
			n.State, n.Detail = "lost", "no report"
		case m.away == 0 && (m.sick > 0 || m.broken):
			n.State, n.Detail = "not ready", "kubelet.up: waiting"
		}
		if m.away > 0 {
			n.BootId = fmt.Sprintf("%s-boot-%d", m.name, m.boot-1)
		}
		out = append(out, n)
	}
	return out
}

func (w *world) voters(context.Context) (string, error) {
	for _, m := range w.nodes {
		if m.role == "controlplane" && m.away > 0 {
			return "n1", errs.New(errs.Unavailable, "etcd member %s does not answer", m.name)
		}
	}
	return "n1", nil
}

func (w *world) witness(_ context.Context, node string) error {
	w.node(node).witnessed++
	return nil
}

// round is a second. Nodes go on, coordinators take their turns, and who is up reports and hears its orders.
func (w *world) round(except *machine) {
	w.t.Helper()
	w.now = w.now.Add(time.Second)
	for _, m := range w.nodes {
		switch {
		case m.away > 1:
			m.away--
		case m.away == 1:
			m.away, m.sick = 0, 2
			w.boot(m)
		case m.sick > 0:
			m.sick--
		}
	}
	for _, m := range w.nodes {
		idle := m.coordinator != nil && m.coordinator.renewed.IsZero() && w.now.Unix()%2 == 0 // one that waits for the lease looks seldom: it saves time
		if m.coordinator != nil && m.away == 0 && m != except && !idle {
			if err := m.coordinator.turn(w.t.Context()); err != nil && !errs.Is(err, errs.Conflict) && !errors.Is(err, errKilled) {
				w.t.Errorf("%s: %v", m.name, err)
			}
		}
	}
	resp, err := w.store.Get(w.t.Context(), Current)
	if err != nil {
		w.t.Fatal(err)
	}
	down := 0
	for _, m := range w.nodes {
		if m.away == 0 && len(resp.Kvs) > 0 {
			if order, _ := OrderFor(resp.Kvs[0].Value, &clusterv1.Node{Name: m.name, BootId: m.id()}); order != nil {
				w.restart(m)
			}
		}
		if m.away > 0 {
			down++
		}
	}
	if w.most = max(w.most, down); down > 1 {
		w.t.Errorf("%d nodes are down at once", down)
	}
}

func (w *world) restart(m *machine) {
	m.reboots, m.boot, m.away, m.coordinator = m.reboots+1, m.boot+1, 4, nil
	if m.next != "" {
		m.version, m.next = m.next, ""
	}
}

// until takes rounds until the change is in a phase.
func (w *world) until(want phase, except *machine) record {
	w.t.Helper()
	for range 600 {
		if r := w.record(); r.Phase == want {
			return r
		} else if !r.active() && r.ID != "" {
			w.t.Fatalf("it is %s (%s), want %s", r.Phase, r.Why, want)
		}
		w.round(except)
	}
	w.t.Fatalf("it is not %s in time: %+v", want, w.record())
	return record{}
}

func (w *world) record() record {
	w.t.Helper()
	resp, err := w.store.Get(w.t.Context(), Current)
	if err != nil || len(resp.Kvs) == 0 {
		w.t.Fatal("no record:", err)
	}
	r, err := decode(resp.Kvs[0].Value)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *world) server() *Server {
	for _, m := range w.nodes {
		if m.coordinator != nil && m.away == 0 {
			return &Server{C: m.coordinator}
		}
	}
	w.t.Fatal("no control plane is up")
	return nil
}

func (w *world) order(r *clusterv1.StartRequest) {
	w.t.Helper()
	if _, err := w.server().Start(w.t.Context(), r); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) reboots() string {
	var out []string
	for _, m := range w.nodes {
		out = append(out, fmt.Sprintf("%s:%d", m.name, m.reboots))
	}
	return strings.Join(out, " ")
}

var errKilled = errors.New("killed")

// fragile is etcd as a coordinator sees it, which may die or freeze when it writes.
type fragile struct {
	clientv3.KV
	w     *world
	m     *machine
	alive func() bool
}

func (f fragile) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if !f.alive() {
		return nil, errKilled
	}
	return f.KV.Get(ctx, key, opts...)
}

func (f fragile) Txn(ctx context.Context) clientv3.Txn { return &fragileTxn{f.KV.Txn(ctx), f} }

type fragileTxn struct {
	clientv3.Txn
	f fragile
}

func (x *fragileTxn) If(c ...clientv3.Cmp) clientv3.Txn  { x.Txn = x.Txn.If(c...); return x }
func (x *fragileTxn) Then(o ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Then(o...); return x }

func (x *fragileTxn) Commit() (*clientv3.TxnResponse, error) {
	w, m := x.f.w, x.f.m
	if !x.f.alive() {
		return nil, errKilled
	}
	w.commits++
	switch w.at(w.commits) {
	case diesBefore:
		m.coordinator = nil
		return nil, errKilled
	case diesAfter:
		_, err := x.Txn.Commit()
		m.coordinator = nil
		return nil, errors.Join(err, errKilled)
	case freezes:
		w.until(done, m)
		before := fmt.Sprint(w.record())
		resp, err := x.Txn.Commit()
		if after := fmt.Sprint(w.record()); after != before {
			w.t.Errorf("a frozen coordinator's write was taken: %s became %s", before, after)
		}
		return resp, err
	}
	return x.Txn.Commit()
}

// pods is Kubernetes.
type pods struct {
	cordoned map[string]string   // by node: for which change
	left     map[string][]string // that do not go
	err      error
	drains   int
}

func (p *pods) Drain(_ context.Context, node, id string) ([]string, error) {
	p.drains++
	if p.err != nil {
		return nil, p.err
	}
	p.cordoned[node] = id
	return p.left[node], nil
}

func (p *pods) Release(_ context.Context, node, id string) error {
	if p.err != nil {
		return p.err
	}
	if p.cordoned[node] == id {
		delete(p.cordoned, node)
	}
	return nil
}
