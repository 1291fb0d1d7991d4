package vip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// late is how much later than asked the kernel takes an address away at worst.
const late = 1250 * time.Millisecond

// etcd is the cluster's store, as far as one key goes.
type etcd struct {
	mu       sync.Mutex
	revision uint64           // guarded by mu
	key      *storev1.Entry   // guarded by mu; nil: there is none
	has      map[string]*node // all nodes
}

// node is one control plane: what its keeper calls, and how that can break.
type node struct {
	storev1.StoreClient
	t    *testing.T
	name string
	etcd *etcd

	mu        sync.Mutex
	cut       bool      // guarded by mu; etcd does not answer
	dead      bool      // guarded by mu; nothing is done any more, and nobody is told
	lost      bool      // guarded by mu; etcd does what is written, and its answer is lost
	unhealthy bool      // guarded by mu
	broken    bool      // guarded by mu; networkd cannot hold
	until     time.Time // guarded by mu; the addresses are here as long

	cancel context.CancelFunc
	done   chan error
}

func (n *node) Read(ctx context.Context, _ *storev1.ReadRequest, _ ...grpc.CallOption) (*storev1.ReadResponse, error) {
	if err := n.reach(ctx); err != nil {
		return nil, err
	}
	e := n.etcd
	e.mu.Lock()
	defer e.mu.Unlock()
	r := &storev1.ReadResponse{Revision: e.revision}
	if e.key != nil {
		r.Entries = append(r.Entries, e.key)
	}
	return r, nil
}

func (n *node) Write(ctx context.Context, w *storev1.WriteRequest, _ ...grpc.CallOption) (*storev1.WriteResponse, error) {
	if err := n.reach(ctx); err != nil {
		return nil, err
	}
	e := n.etcd
	e.mu.Lock()
	have := uint64(0)
	if e.key != nil {
		have = e.key.GetRevision()
	}
	if w.GetConditions()[0].GetRevision() != have {
		e.mu.Unlock()
		return nil, errs.New(errs.Conflict, "somebody else was first")
	}
	e.revision++
	revision := e.revision
	e.key = &storev1.Entry{Key: Key, Value: w.GetChanges()[0].GetValue(), Revision: revision}
	if w.GetChanges()[0].GetDelete() {
		e.key = nil
	}
	e.mu.Unlock()
	n.mu.Lock()
	lost := n.lost
	n.mu.Unlock()
	if lost {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &storev1.WriteResponse{Revision: revision}, nil
}

func (n *node) reach(ctx context.Context) error {
	n.mu.Lock()
	away := n.cut || n.dead
	n.mu.Unlock()
	if away {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// hold is networkd and the kernel. began is when the test's time did.
func (n *node) hold(began time.Time, r *networkv1.HoldRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dead {
		return errors.New("dead")
	}
	if len(r.GetAddresses()) == 0 {
		n.until = time.Time{}
		return nil
	}
	if n.broken {
		return errs.New(errs.Precondition, "on no link")
	}
	left := (time.Duration(r.GetUntilMilliseconds())*time.Millisecond - time.Since(began)).Truncate(time.Second)
	if left < time.Second {
		return errs.New(errs.Precondition, "no time left")
	}
	n.until = time.Now().Add(left + late)
	return nil
}

// network is a node's networkd, which a test gives the time that it began.
type network struct {
	networkv1.VirtualClient
	n     *node
	began time.Time
}

func (w network) Hold(_ context.Context, r *networkv1.HoldRequest, _ ...grpc.CallOption) (*networkv1.HoldResponse, error) {
	if err := w.n.hold(w.began, r); err != nil {
		return nil, err
	}
	if who := w.n.etcd.holders(); len(who) > 1 {
		w.n.t.Errorf("at %s the addresses are on %q", time.Since(w.began), who)
	}
	return &networkv1.HoldResponse{}, nil
}

// holders are the nodes that have the addresses now.
func (e *etcd) holders() (out []string) {
	for name, n := range e.has {
		n.mu.Lock()
		if time.Now().Before(n.until) {
			out = append(out, name)
		}
		n.mu.Unlock()
	}
	return out
}

// change sets what is wrong with a node.
func (n *node) change(f func(*node)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f(n)
}

// cluster runs a test with three control planes, in a time of its own.
func cluster(t *testing.T, test func(t *testing.T, e *etcd)) {
	synctest.Test(t, func(t *testing.T) {
		e := &etcd{has: map[string]*node{}}
		began := time.Now()
		for i := range 3 {
			n := &node{t: t, name: fmt.Sprintf("cp%d", i), etcd: e, done: make(chan error, 1)}
			e.has[n.name] = n
		}
		for _, n := range e.has {
			k, err := New(Config{
				Store: n, Network: network{n: n, began: began}, Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("kubeletd"), Boottime: func() time.Duration { return time.Since(began) },
				Healthy: func(context.Context) error {
					n.mu.Lock()
					defer n.mu.Unlock()
					if n.unhealthy {
						return errors.New("503")
					}
					return nil
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			n.cancel = cancel
			want := Want{Node: n.name, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.100"), netip.MustParseAddr("fd00::100")}}
			go func() { n.done <- k.Run(ctx, func() Want { return want }) }()
		}
		test(t, e)
		for _, n := range e.has {
			n.cancel()
			<-n.done
		}
	})
}

// holder waits until exactly one node, and not the one named, has the addresses, and returns it.
func (e *etcd) holder(t *testing.T, within time.Duration, not string) *node {
	t.Helper()
	for start := time.Now(); ; {
		who := e.holders()
		if len(who) == 1 && who[0] != not {
			return e.has[who[0]]
		}
		if time.Since(start) > within {
			t.Fatalf("after %s the addresses are on %q, want another one than %q", within, who, not)
		}
		time.Sleep(10 * time.Millisecond) // of the test's own time
	}
}

// steady wants the addresses to stay where they are.
func (e *etcd) steady(t *testing.T, n *node) {
	t.Helper()
	for range 600 {
		time.Sleep(100 * time.Millisecond)
		if who := e.holders(); len(who) != 1 || who[0] != n.name {
			t.Fatalf("the addresses are on %q, want %s all the time", who, n.name)
		}
	}
}

func TestMoves(t *testing.T) {
	for _, c := range []struct {
		name   string
		breaks func(*node)
		mends  func(*node)
		within time.Duration
	}{
		{"crash", func(n *node) { n.dead = true }, nil, 10 * time.Second},
		{"cut off from etcd", func(n *node) { n.cut = true }, func(n *node) { n.cut = false }, 10 * time.Second},
		{"its API server is not ready", func(n *node) { n.unhealthy = true }, func(n *node) { n.unhealthy = false }, 4 * time.Second},
		{"its networkd cannot", func(n *node) { n.broken = true }, func(n *node) { n.broken = false }, 4 * time.Second},
		{"etcd's answers are lost", func(n *node) { n.lost = true }, func(n *node) { n.lost = false }, 15 * time.Second},
		{"the process ends", func(n *node) { n.cancel() }, nil, 4 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			cluster(t, func(t *testing.T, e *etcd) {
				first := e.holder(t, 2*time.Second, "")
				e.steady(t, first)
				first.change(c.breaks)
				second := e.holder(t, c.within, first.name)
				e.steady(t, second)
				if c.mends != nil {
					first.change(c.mends)
					e.steady(t, second) // who is well again does not take them back
				}
			})
		})
	}
}

// A process that is told to end while it writes does not know which revision the key has then. It gives the key up all the same.
func TestEndsWhileItWrites(t *testing.T) {
	cluster(t, func(t *testing.T, e *etcd) {
		first := e.holder(t, 2*time.Second, "")
		seen := func() uint64 { e.mu.Lock(); defer e.mu.Unlock(); return e.revision }
		before := seen()
		first.change(func(n *node) { n.lost = true })
		for seen() == before {
			time.Sleep(10 * time.Millisecond) // of the test's own time
		}
		first.change(func(n *node) { n.lost = false })
		first.cancel()
		e.holder(t, 4*time.Second, first.name)
	})
}

// Whenever the holder's machine dies, another has the addresses within 8 s, as the page says.
func TestCrashIsQuick(t *testing.T) {
	var worst time.Duration
	for i := range 40 {
		cluster(t, func(t *testing.T, e *etcd) {
			first := e.holder(t, 2*time.Second, "")
			time.Sleep(3*time.Second + time.Duration(i)*25*time.Millisecond)
			died := time.Now()
			first.change(func(n *node) { n.dead = true })
			e.holder(t, 8*time.Second, first.name)
			worst = max(worst, time.Since(died))
		})
	}
	t.Logf("at worst after %s", worst)
}

// Nobody takes them while nobody can: etcd away, then all API servers down.
func TestNobody(t *testing.T) {
	cluster(t, func(t *testing.T, e *etcd) {
		e.holder(t, 2*time.Second, "")
		for _, breaks := range []func(*node, bool){
			func(n *node, yes bool) { n.cut = yes }, func(n *node, yes bool) { n.unhealthy = yes },
		} {
			for _, n := range e.has {
				n.change(func(n *node) { breaks(n, true) })
			}
			time.Sleep(10 * time.Second)
			if who := e.holders(); len(who) != 0 {
				t.Errorf("the addresses are on %q, want nobody", who)
			}
			for _, n := range e.has {
				n.change(func(n *node) { breaks(n, false) })
			}
			e.holder(t, 10*time.Second, "")
		}
	})
}
