package etcdd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/protobuf/proto"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// Each call waits for the end of the restart, or its own; who uses the member already is waited for.
func TestHold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var h hold
		late := 0
		old, fresh := &embed.Etcd{}, &embed.Etcd{}
		enter := func(patience time.Duration) (time.Duration, error) {
			start := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			_, err := h.enter(ctx)
			if err == nil {
				defer h.leave()
			}
			return time.Since(start), err
		}
		if took, err := enter(time.Second); took != 0 || err != nil {
			t.Errorf("nothing is held: %s, %v", took, err)
		}
		if _, err := h.enter(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.begin(old, 10*time.Second, func() { late++ })
		time.AfterFunc(500*time.Millisecond, h.leave)
		start := time.Now()
		h.drained(t.Context(), 2*time.Second)
		if took := time.Since(start); took != 500*time.Millisecond {
			t.Errorf("the call that was under way was waited for for %s, want half a second", took)
		}
		if took, err := enter(time.Second); took != time.Second || !errs.Is(err, errs.Unavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("one with a second left: %s, %v", took, err)
		}
		time.AfterFunc(time.Second, func() { h.ready(old) }) // told of late
		time.AfterFunc(3*time.Second, func() { h.ready(fresh) })
		if took, err := enter(time.Minute); took != 3*time.Second || err != nil {
			t.Errorf("one that can wait: %s, %v, want three seconds", took, err)
		}
		if h.held() {
			t.Error("it is over")
		}
		h.begin(old, 10*time.Second, func() { late++ }) // and nobody ends it
		if took, err := enter(time.Minute); took != 10*time.Second || err != nil {
			t.Errorf("one of a member that does not come back: %s, %v, want ten seconds", took, err)
		}
		if _, err := h.enter(t.Context()); err != nil { // it hangs
			t.Fatal(err)
		}
		h.begin(old, time.Minute, func() { late++ })
		start = time.Now()
		h.drained(t.Context(), 2*time.Second)
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("a call that hangs was waited for for %s", took)
		}
		h.ready(fresh)
		if late != 1 {
			t.Errorf("a member came late %d times, want once", late)
		}
		if n := h.restarts(); n != 3 {
			t.Errorf("%d restarts, want 3", n)
		}
	})
}

// A slot lets one of all proposals of a write count, and says which way it went, whoever lost the answer.
func TestSlot(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	n.volume(t)
	n.start(t)
	n.until(t, converged)
	c := n.as(t, ownClient)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const key, slotKey = own + "k", oncePrefix + "test/0"
	put := []clientv3.Op{clientv3.OpPut(key, "x")}
	at := func(rev int64) []clientv3.Cmp {
		return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", rev)}
	}
	s := &slot{}
	do := func(s *slot, number string, conditions []clientv3.Cmp) (written, bool) {
		t.Helper()
		w, again, err := s.txn(ctx, c, slotKey, number, conditions, put)
		if err != nil {
			t.Fatal(err)
		}
		return w, again
	}
	first, again := do(s, "a", at(0))
	if !first.done || again || len(first.responses) != 2 {
		t.Fatalf("first: %+v, %v", first, again)
	}
	before := *s
	lost, again := do(s, "b", at(first.revision)) // done, but let its answer be lost
	if !lost.done || again {
		t.Fatalf("second: %+v, %v", lost, again)
	}
	*s = before
	if w, again := do(s, "b", at(first.revision)); !w.done || again || w.revision != lost.revision || w.responses != nil {
		t.Errorf("proposed again: %+v, %v, want that it was done at revision %d", w, again, lost.revision)
	}
	before = *s
	if w, again := do(s, "c", at(first.revision)); w.done || again {
		t.Errorf("conditions that do not hold: %+v, %v", w, again)
	}
	*s = before
	if w, again := do(s, "c", at(lost.revision)); w.done || again {
		t.Errorf("refused, the answer was lost, and now they would hold: %+v, %v, want refused", w, again)
	}
	// One that comes late, when its caller has gone and the slot is used by others.
	late := before
	if w, again := do(&late, "z", nil); w.done || !again {
		t.Errorf("a late one: %+v, %v, want that it does nothing", w, again)
	}
	r, err := c.Get(ctx, key)
	if err != nil || len(r.Kvs) != 1 || r.Kvs[0].GetVersion() != 2 {
		t.Errorf("%v, %v: want a key that was written twice", r, err)
	}
}

// A tally is what one client of a node saw.
type tally struct {
	mu      sync.Mutex
	keys    []string // guarded by mu
	longest time.Duration
	failed  []string
}

// write makes a new key, and counts up another one that only it writes, each 20 ms: as long as ctx lasts.
func (w *tally) write(ctx context.Context, n *node, c storev1.StoreClient) {
	var last uint64
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		key := fmt.Sprintf("%sw/%s/%05d", own, n.name, i)
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second) // as trustd does
		start := time.Now()
		r, err := c.Write(call, &storev1.WriteRequest{Conditions: []*storev1.Condition{{Key: own + "count/" + n.name, Revision: last}},
			Changes: []*storev1.Change{{Key: key, Value: []byte("x")}, {Key: own + "count/" + n.name, Value: []byte(key)}}})
		cancel()
		w.mu.Lock()
		w.longest = max(w.longest, time.Since(start))
		if err == nil {
			last, w.keys = r.GetRevision(), append(w.keys, key)
		} else {
			w.failed = append(w.failed, fmt.Sprintf("%s after %s: %v", key, time.Since(start), err))
		}
		w.mu.Unlock()
	}
}

// Members restart on purpose, one after the other, while at each somebody writes, reads, reports and asks: nothing fails, nothing is done twice, and who watches sees everything.
func TestRestartsOnPurpose(t *testing.T) {
	t.Parallel()
	nodes := trio(t)
	for _, n := range nodes[1:] {
		n.start(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for _, n := range nodes {
		n.until(t, converged)
		n.knows(ctx, t)
	}
	writing, stop := context.WithCancel(ctx)
	defer stop()
	var g sync.WaitGroup
	writers, seen := make([]tally, len(nodes)), make([]sighting, len(nodes))
	watched := make([]error, len(nodes))
	watching, unwatch := context.WithCancel(ctx)
	defer unwatch()
	var watches sync.WaitGroup
	for i, n := range nodes {
		c := n.store(t)
		g.Go(func() { writers[i].write(writing, n, c) })
		g.Go(func() { asks(writing, t, n) })
		g.Go(func() { n.quiet(writing, t) })
		watches.Go(func() { watched[i] = seen[i].follow(watching, c) })
	}
	other := testca.New(t).State().GetEtcdCa()
	mine := nodes[0].ca.State().GetEtcdCa()
	for i, bundle := range []string{mine + other, mine, mine + other} {
		name := fmt.Sprint("stage ", i)
		for _, n := range nodes {
			state, _ := n.trust.Get()
			state = proto.CloneOf(state)
			state.EtcdCa, state.Authorities = bundle, name
			n.trust.Set(state)
		}
		for _, n := range nodes {
			n.acts(t, name, mine)
			n.until(t, converged)
		}
	}
	_ = wait(ctx, 200*time.Millisecond) // writes after the last one
	stop()
	g.Wait()
	r, err := nodes[0].as(t, "etcd-root").Get(ctx, own+"w/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	versions := map[string]int64{}
	for _, kv := range r.Kvs {
		versions[string(kv.GetKey())] = kv.GetVersion()
	}
	for i, n := range nodes {
		w := &writers[i]
		t.Logf("%s: %d writes, the longest took %s", n.name, len(w.keys), w.longest)
		for _, f := range w.failed {
			t.Errorf("%s: write failed: %s", n.name, f)
		}
		for _, k := range w.keys {
			if versions[k] != 1 {
				t.Errorf("%s was written %d times", k, versions[k])
			}
		}
		if len(w.keys) < 50 {
			t.Errorf("%s: %d writes prove nothing", n.name, len(w.keys))
		}
	}
	for i, n := range nodes {
		for patience := 10 * time.Second; seen[i].count() < len(versions); patience -= 20 * time.Millisecond {
			if wait(ctx, 20*time.Millisecond) != nil || patience <= 0 {
				t.Errorf("%s: the watch saw %d keys of %d", n.name, seen[i].count(), len(versions))
				break
			}
		}
	}
	unwatch()
	watches.Wait()
	for i, n := range nodes {
		if watched[i] != nil {
			t.Errorf("%s: the watch ended: %v", n.name, watched[i])
		}
	}
}

// knows waits until the node tells of nodes.
func (n *node) knows(ctx context.Context, t *testing.T) {
	t.Helper()
	w, err := n.registry(t).WatchNodes(ctx, &clusterv1.WatchNodesRequest{})
	for err == nil {
		if _, err = w.Recv(); err == nil {
			return
		}
		if !errs.Is(err, errs.Unavailable) || wait(ctx, 50*time.Millisecond) != nil {
			break
		}
		w, err = n.registry(t).WatchNodes(ctx, &clusterv1.WatchNodesRequest{})
	}
	t.Fatalf("%s does not tell of nodes: %v", n.name, err)
}

// quiet makes sure that nobody is told of trouble.
func (n *node) quiet(ctx context.Context, t *testing.T) {
	w, err := n.control.WatchState(ctx, &controlv1.WatchStateRequest{})
	for err == nil {
		var s *controlv1.State
		if s, err = w.Recv(); err == nil && s.GetError() != "" {
			t.Errorf("%s says %v", n.name, s)
		}
		for _, c := range s.GetConditions() {
			if c.GetTrouble() != "" {
				t.Errorf("%s says %v", n.name, c)
			}
		}
	}
	if ctx.Err() == nil {
		t.Errorf("%s says nothing any more: %v", n.name, err)
	}
}

// asks reports a node, and asks it for its status and the nodes; each must be answered.
func asks(ctx context.Context, t *testing.T, n *node) {
	registry := n.registry(t)
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		_, err := registry.Report(asNode(call, n.name, peer.RoleControlPlane), &clusterv1.ReportRequest{Node: &clusterv1.Node{Name: n.name, Role: "controlplane", State: "ready", BootId: "b"}})
		if err != nil {
			t.Errorf("%s: report: %v", n.name, err)
		}
		if st, err := n.etcd.GetStatus(call, &etcdv1.GetStatusRequest{}); err != nil || st.GetState() != "running" {
			t.Errorf("%s: status: %v, %v", n.name, st, err)
		}
		if _, err := registry.ListNodes(call, &clusterv1.ListNodesRequest{}); err != nil {
			t.Errorf("%s: nodes: %v", n.name, err)
		}
		cancel()
		_ = wait(ctx, 50*time.Millisecond)
	}
}

// A sighting is the keys that a watch told.
type sighting struct {
	mu   sync.Mutex
	keys map[string]bool // guarded by mu
}

func (s *sighting) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.keys)
}

// follow watches until ctx is done.
func (s *sighting) follow(ctx context.Context, c storev1.StoreClient) error {
	w, err := c.Watch(ctx, &storev1.WatchRequest{Prefix: own + "w/"})
	if err != nil {
		return err
	}
	for {
		m, err := w.Recv()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.keys == nil {
			s.keys = map[string]bool{}
		}
		for _, e := range m.GetEntries() {
			s.keys[e.GetKey()] = true
		}
		s.mu.Unlock()
	}
}
