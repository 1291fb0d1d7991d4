package etcdd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

const own = "/bulkhead/trust/"

func put(key, value string, ttl uint64, conditions ...*storev1.Condition) *storev1.WriteRequest {
	return &storev1.WriteRequest{Conditions: conditions, Changes: []*storev1.Change{{Key: own + key, Value: []byte(value), TtlSeconds: ttl}}}
}

func TestStore(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	n.start(t)
	c := n.store(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	if _, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("read without a member: %v, want Unavailable", err)
	}
	n.volume(t)
	n.until(t, converged)
	t.Run("transaction", func(t *testing.T) { transaction(ctx, t, c) })
	t.Run("one of many wins", func(t *testing.T) { oneWins(ctx, t, c) })
	t.Run("refused", func(t *testing.T) { refused(ctx, t, n, c) })
	t.Run("watch and time to live", func(t *testing.T) { watchTTL(ctx, t, n, c) })
	t.Run("virtual addresses", func(t *testing.T) { virtual(ctx, t, n) })
	t.Run("compaction", func(t *testing.T) { lostPlace(ctx, t, n, c) })
	t.Run("too much", func(t *testing.T) {
		for i := range 50 {
			r := &storev1.WriteRequest{Changes: []*storev1.Change{{Key: fmt.Sprintf("%sbig/%d", own, i), Value: make([]byte, maxValue)}}}
			if _, err := c.Write(ctx, r); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own + "big/"}); !errs.Is(err, errs.Exhausted) {
			t.Errorf("read of more than fits: %v, want Exhausted", err)
		}
		if r, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own + "big/1"}); err != nil || len(r.GetEntries()) != 11 {
			t.Errorf("read of a part: %d entries, %v, want 11", len(r.GetEntries()), err)
		}
	})
}

func transaction(ctx context.Context, t *testing.T, c storev1.StoreClient) {
	first, err := c.Write(ctx, put("a", "1", 0, &storev1.Condition{Key: own + "a"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(ctx, put("a", "2", 0, &storev1.Condition{Key: own + "a"})); !errs.Is(err, errs.Conflict) {
		t.Errorf("a key made twice: %v, want Conflict", err)
	}
	// All or none: the second condition is wrong.
	both := put("a", "3", 0, &storev1.Condition{Key: own + "a", Revision: first.GetRevision()}, &storev1.Condition{Key: own + "b", Revision: 1})
	both.Changes = append(both.Changes, &storev1.Change{Key: own + "b", Value: []byte("x")})
	if _, err := c.Write(ctx, both); !errs.Is(err, errs.Conflict) {
		t.Errorf("a wrong condition: %v, want Conflict", err)
	}
	r, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own})
	if err != nil || len(r.GetEntries()) != 1 || string(r.GetEntries()[0].GetValue()) != "1" || r.GetEntries()[0].GetRevision() != first.GetRevision() {
		t.Errorf("read: %v, %v, want a=1 at revision %d", r, err, first.GetRevision())
	}
	del := &storev1.WriteRequest{Conditions: []*storev1.Condition{{Key: own + "a", Revision: first.GetRevision()}}, Changes: []*storev1.Change{{Key: own + "a", Delete: true}}}
	if _, err := c.Write(ctx, del); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own}); err != nil || len(r.GetEntries()) != 0 {
		t.Errorf("read after deleting: %v, %v", r, err)
	}
}

func oneWins(ctx context.Context, t *testing.T, c storev1.StoreClient) {
	var won atomic.Int32
	var g sync.WaitGroup
	for i := range 20 {
		g.Go(func() {
			_, err := c.Write(ctx, put("token", fmt.Sprint(i), 0, &storev1.Condition{Key: own + "token"}))
			switch {
			case err == nil:
				won.Add(1)
			case !errs.Is(err, errs.Conflict):
				t.Errorf("a loser got %v, want Conflict", err)
			}
		})
	}
	g.Wait()
	if won.Load() != 1 {
		t.Errorf("%d writers made the key, want 1", won.Load())
	}
}

func refused(ctx context.Context, t *testing.T, n *node, c storev1.StoreClient) {
	many := &storev1.WriteRequest{}
	for i := range maxChanges + 1 {
		many.Changes = append(many.Changes, &storev1.Change{Key: fmt.Sprint(own, i)})
	}
	twice := put("x", "1", 0)
	twice.Changes = append(twice.Changes, twice.Changes[0])
	for _, w := range []struct {
		name string
		r    *storev1.WriteRequest
		kind errs.Kind
		text string
	}{
		{"another's key", &storev1.WriteRequest{Changes: []*storev1.Change{{Key: "/bulkhead/nodes/n1"}}}, errs.Denied, `begin with "/bulkhead/trust/"`},
		{"another's condition", put("x", "1", 0, &storev1.Condition{Key: "/registry/secrets/x"}), errs.Denied, "/registry"},
		{"no change", &storev1.WriteRequest{}, errs.Invalid, "0 changes"},
		{"many changes", many, errs.Invalid, "65 changes"},
		{"large value", put("x", strings.Repeat("x", maxValue+1), 0), errs.Invalid, "at most 65536"},
		{"long key", put(strings.Repeat("x", maxKey), "", 0), errs.Invalid, "at most 512"},
		{"the prefix itself", put("", "x", 0), errs.Invalid, "no key"},
		{"the same key twice", twice, errs.Invalid, "twice"},
		{"long life", put("x", "1", 1<<40), errs.Invalid, "ttl_seconds"},
		{"deleted with a value", &storev1.WriteRequest{Changes: []*storev1.Change{{Key: own + "x", Value: []byte("x"), Delete: true}}}, errs.Invalid, "deleted"},
	} {
		if _, err := c.Write(ctx, w.r); !errs.Is(err, w.kind) || !strings.Contains(errs.Text(err), w.text) {
			t.Errorf("%s: %v, want %q", w.name, err, w.text)
		}
	}
	if _, err := c.Read(ctx, &storev1.ReadRequest{Prefix: "/bulkhead/"}); !errs.Is(err, errs.Denied) {
		t.Errorf("read of all: %v, want Denied", err)
	}
	for _, id := range []uid.ID{uid.Apid, uid.Networkd, uid.Gateway} {
		s := storev1.NewStoreClient(n.dial(t, id))
		if _, err := s.Read(ctx, &storev1.ReadRequest{Prefix: own}); err == nil {
			t.Errorf("user %s read the store", id.Name())
		}
	}
	machined := storev1.NewStoreClient(n.dial(t, uid.Machined))
	if _, err := machined.Read(ctx, &storev1.ReadRequest{Prefix: own}); !errs.Is(err, errs.Denied) {
		t.Errorf("machined reads trustd's keys: %v, want Denied", err)
	}
	if _, err := machined.Read(ctx, &storev1.ReadRequest{Prefix: "/bulkhead/machine/"}); err != nil {
		t.Errorf("machined reads its own keys: %v", err)
	}
	kubeletd := storev1.NewStoreClient(n.dial(t, uid.Kubeletd))
	if _, err := kubeletd.Read(ctx, &storev1.ReadRequest{Prefix: own}); !errs.Is(err, errs.Denied) {
		t.Errorf("kubeletd reads trustd's keys: %v, want Denied", err)
	}
}

func watchTTL(ctx context.Context, t *testing.T, n *node, c storev1.StoreClient) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, err := c.Write(ctx, put("w/short", "1", 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(ctx, put("w/kept", "1", 3)); err != nil {
		t.Fatal(err)
	}
	w, err := c.Watch(ctx, &storev1.WatchRequest{Prefix: own + "w/"})
	if err != nil {
		t.Fatal(err)
	}
	first, err := w.Recv()
	if err != nil || !first.GetComplete() || len(first.GetEntries()) != 2 {
		t.Fatalf("first: %v, %v, want two entries, complete", first, err)
	}
	// Written again without an end, it stays when its old one comes.
	if _, err := c.Write(ctx, put("w/kept", "2", 0)); err != nil {
		t.Fatal(err)
	}
	if m, err := w.Recv(); err != nil || m.GetComplete() || len(m.GetEntries()) != 1 || string(m.GetEntries()[0].GetValue()) != "2" {
		t.Fatalf("second: %v, %v, want the change", m, err)
	}
	if m, err := w.Recv(); err != nil || len(m.GetDeleted()) != 1 || m.GetDeleted()[0] != own+"w/short" {
		t.Fatalf("third: %v, %v, want the end of %sw/short", m, err, own)
	}
	if r, err := c.Read(ctx, &storev1.ReadRequest{Prefix: own + "w/"}); err != nil || len(r.GetEntries()) != 1 {
		t.Errorf("left: %v, %v, want w/kept", r, err)
	}
	// Whoever writes a key with an end every hour must not leave a lease each time.
	for range 5 {
		if _, err := c.Write(ctx, put("w/again", "1", 3600)); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := n.as(t, "etcd-root").Leases(ctx); err != nil || len(l.Leases) != 1 {
		t.Errorf("leases: %v, %v, want 1", l, err)
	}
}

// lostPlace: who comes back to a history that was compacted meanwhile is told so.
func lostPlace(ctx context.Context, t *testing.T, n *node, c storev1.StoreClient) {
	before, err := c.Write(ctx, put("c", "1", 0))
	if err != nil {
		t.Fatal(err)
	}
	after, err := c.Write(ctx, put("c", "2", 0))
	if err != nil {
		t.Fatal(err)
	}
	root := n.as(t, "etcd-root")
	if _, err := root.Compact(ctx, int64(after.GetRevision())); err != nil {
		t.Fatal(err)
	}
	err = follower(ctx, root, own, int64(before.GetRevision()), func(*storev1.WatchResponse) error { return errors.New("sent") })
	if grpcstatus.Code(err) != codes.OutOfRange {
		t.Errorf("a watch from a compacted revision ended with %v, want OutOfRange", err)
	}
}
