package etcdd

import (
	"context"
	"errors"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// prefixes is the whole table of who may use the store, and below which prefix.
var prefixes = map[uid.ID]string{
	uid.Trustd:   "/bulkhead/trust/",
	uid.Machined: "/bulkhead/machine/",
	uid.Kubeletd: "/bulkhead/kubernetes/",
}

// Bounds of the store. All that one caller reads at once must fit into a message (daemon.MaxMessage).
const (
	maxKey     = 512      // bytes
	maxValue   = 64 << 10 // bytes
	maxChanges = 64       // and as many conditions, in one Write
	maxWrite   = 1 << 20  // bytes of keys and values in one Write; etcd takes 1.5 MiB
	maxRead    = 3 << 20  // bytes of an answer
	maxTTL     = 366 * 24 * time.Hour
)

type storeServer struct {
	storev1.UnimplementedStoreServer
	d *Daemon
}

// prefixOf returns the caller's prefix.
func prefixOf(ctx context.Context) (string, error) {
	id, ok := peer.From(ctx)
	p := prefixes[id]
	if !ok || p == "" {
		return "", errs.New(errs.Denied, "store: user %q has no keys there", id.Name())
	}
	return p, nil
}

// checkKey makes sure that a key, or the prefix of some, is the caller's own.
func checkKey(own, key string) error {
	switch {
	case !strings.HasPrefix(key, own):
		return errs.New(errs.Denied, "store: key %.64q: this caller's keys begin with %q", key, own)
	case len(key) > maxKey:
		return errs.New(errs.Invalid, "store: key of %d bytes; at most %d are allowed", len(key), maxKey)
	}
	return nil
}

// Read is linearizable: it asks the leader whether this member is up to date.
func (s *storeServer) Read(ctx context.Context, r *storev1.ReadRequest) (*storev1.ReadResponse, error) {
	own, err := prefixOf(ctx)
	if err == nil {
		err = checkKey(own, r.GetPrefix())
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	entries, revision, err := s.d.kernel.readAll(ctx, r.GetPrefix())
	return &storev1.ReadResponse{Entries: entries, Revision: uint64(revision)}, err
}

// get reads what begins with a prefix, however often that takes.
func (m *member) get(ctx context.Context, prefix string) (resp *clientv3.GetResponse, err error) {
	err = m.repeat(ctx, func(ctx context.Context, l lent) (err error) {
		resp, err = l.client.Get(ctx, prefix, clientv3.WithPrefix())
		return err
	})
	return resp, err
}

// readAll is get for answers that go into a message.
func (m *member) readAll(ctx context.Context, prefix string) ([]*storev1.Entry, int64, error) {
	resp, err := m.get(ctx, prefix)
	if err != nil {
		return nil, 0, storeError("read "+prefix, err)
	}
	var out []*storev1.Entry
	size := 0
	for _, kv := range resp.Kvs {
		out = append(out, entry(kv))
		if size += len(kv.GetKey()) + len(kv.GetValue()); size > maxRead {
			return nil, 0, errs.New(errs.Exhausted, "store: more than %d bytes begin with %q; read a longer prefix", maxRead, prefix)
		}
	}
	return out, resp.Header.GetRevision(), nil
}

func entry(kv *mvccpb.KeyValue) *storev1.Entry {
	return &storev1.Entry{Key: string(kv.GetKey()), Value: kv.GetValue(), Revision: uint64(kv.GetModRevision())}
}

// Write is one transaction. Each change with a time to live has a lease of its own, which goes when the key is written again.
func (s *storeServer) Write(ctx context.Context, r *storev1.WriteRequest) (*storev1.WriteResponse, error) {
	own, err := prefixOf(ctx)
	if err == nil {
		err = checkWrite(own, r)
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return s.d.kernel.write(ctx, r)
}

func checkWrite(own string, r *storev1.WriteRequest) error {
	if len(r.GetChanges()) == 0 || len(r.GetChanges()) > maxChanges || len(r.GetConditions()) > maxChanges {
		return errs.New(errs.Invalid, "store: %d changes under %d conditions; allowed are 1 to %d changes and at most as many conditions", len(r.GetChanges()), len(r.GetConditions()), maxChanges)
	}
	for _, c := range r.GetConditions() {
		if err := checkKey(own, c.GetKey()); err != nil {
			return err
		}
	}
	size, seen := 0, map[string]bool{}
	for _, c := range r.GetChanges() {
		if err := checkKey(own, c.GetKey()); err != nil {
			return err
		}
		size += len(c.GetKey()) + len(c.GetValue())
		switch {
		case c.GetKey() == own:
			return errs.New(errs.Invalid, "store: %q is a prefix and no key", own)
		case seen[c.GetKey()]:
			return errs.New(errs.Invalid, "store: key %q is changed twice in one write", c.GetKey())
		case len(c.GetValue()) > maxValue:
			return errs.New(errs.Invalid, "store: key %q: value of %d bytes; at most %d are allowed", c.GetKey(), len(c.GetValue()), maxValue)
		case c.GetDelete() && (len(c.GetValue()) > 0 || c.GetTtlSeconds() > 0):
			return errs.New(errs.Invalid, "store: key %q: to be deleted, and with a value or a time to live", c.GetKey())
		case c.GetTtlSeconds() > uint64(maxTTL/time.Second):
			return errs.New(errs.Invalid, "store: key %q: ttl_seconds is %d; at most %d are allowed", c.GetKey(), c.GetTtlSeconds(), maxTTL/time.Second)
		}
		seen[c.GetKey()] = true
	}
	if size > maxWrite {
		return errs.New(errs.Invalid, "store: a write of %d bytes; at most %d are allowed", size, maxWrite)
	}
	return nil
}

func (m *member) write(ctx context.Context, r *storev1.WriteRequest) (*storev1.WriteResponse, error) {
	var conditions []clientv3.Cmp
	for _, k := range r.GetConditions() {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(k.GetKey()), "=", int64(k.GetRevision())))
	}
	var changes []clientv3.Op
	var leases []clientv3.LeaseID
	for _, k := range r.GetChanges() {
		if k.GetDelete() {
			changes = append(changes, clientv3.OpDelete(k.GetKey(), clientv3.WithPrevKV()))
			continue
		}
		opts := []clientv3.OpOption{clientv3.WithPrevKV()}
		if ttl := k.GetTtlSeconds(); ttl > 0 {
			id, err := m.grant(ctx, int64(ttl))
			if err != nil {
				m.revoke(ctx, leases)
				return nil, storeError("write: lease", err)
			}
			leases = append(leases, id)
			opts = append(opts, clientv3.WithLease(id))
		}
		changes = append(changes, clientv3.OpPut(k.GetKey(), string(k.GetValue()), opts...))
	}
	resp, err := m.txn(ctx, conditions, changes...)
	if err != nil {
		// Whether it was done is not known; so its leases must stay.
		return nil, storeError("write", err)
	}
	if !resp.done {
		m.revoke(ctx, leases)
		return nil, errs.New(errs.Conflict, "store: a condition does not hold: somebody else was first; read again")
	}
	var old []clientv3.LeaseID // no key has them any more
	for _, op := range resp.responses {
		prev := op.GetResponsePut().GetPrevKv()
		for _, kv := range append(op.GetResponseDeleteRange().GetPrevKvs(), prev) {
			if l := clientv3.LeaseID(kv.GetLease()); l != 0 {
				old = append(old, l)
			}
		}
	}
	m.revoke(ctx, old)
	return &storev1.WriteResponse{Revision: uint64(resp.revision)}, nil
}

// revoke drops leases that no key has. One that stays ends by itself.
func (m *member) revoke(ctx context.Context, leases []clientv3.LeaseID) {
	for _, id := range leases {
		if err := m.repeat(ctx, func(ctx context.Context, l lent) error { _, err := l.client.Revoke(ctx, id); return err }); err != nil {
			return
		}
	}
}

// Watch reads, and then follows from the revision after that. It ends when there is no leader: a member that others do not hear would
// be silent, which looks like quiet. While this node's member restarts on purpose it waits, and then sends everything once more.
func (s *storeServer) Watch(r *storev1.WatchRequest, out grpc.ServerStreamingServer[storev1.WatchResponse]) error {
	own, err := prefixOf(out.Context())
	if err == nil {
		err = checkKey(own, r.GetPrefix())
	}
	if err != nil {
		return err
	}
	return s.d.kernel.watch(out.Context(), r.GetPrefix(), out.Send)
}

func (m *member) watch(ctx context.Context, prefix string, send func(*storev1.WatchResponse) error) error {
	for {
		restarts, err := m.watchOnce(ctx, prefix, send)
		if ctx.Err() != nil || m.hold.restarts() == restarts {
			return err
		}
	}
}

// watchOnce ends when the member does. It returns how many restarts on purpose there had been when it began.
func (m *member) watchOnce(ctx context.Context, prefix string, send func(*storev1.WatchResponse) error) (restarts uint64, err error) {
	first, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	l, done, err := m.use(first)
	if err != nil {
		return m.hold.restarts(), err
	}
	done() // a restart does not wait for those who watch
	entries, revision, err := m.readAll(first, prefix)
	if err != nil {
		return l.restarts, err
	}
	if err := send(&storev1.WatchResponse{Entries: entries, Complete: true, Revision: uint64(revision)}); err != nil {
		return m.hold.restarts(), err // it is the listener's end
	}
	return l.restarts, follower(ctx, l.client, prefix, revision+1, send)
}

// follower sends what happens from a revision on.
func follower(ctx context.Context, c *clientv3.Client, prefix string, from int64, send func(*storev1.WatchResponse) error) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for resp := range c.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if err := resp.Err(); err != nil {
			return storeError("watch "+prefix, err)
		}
		m := &storev1.WatchResponse{Revision: uint64(resp.Header.GetRevision())}
		// A key that changed twice is told once, as it is now.
		last := map[string]*clientv3.Event{}
		for _, e := range resp.Events {
			last[string(e.Kv.GetKey())] = e
		}
		for _, e := range resp.Events {
			switch key := string(e.Kv.GetKey()); {
			case last[key] != e:
			case e.Type == clientv3.EventTypeDelete:
				m.Deleted = append(m.Deleted, key)
			default:
				m.Entries = append(m.Entries, entry(e.Kv))
			}
		}
		if len(m.GetEntries())+len(m.GetDeleted()) == 0 {
			continue
		}
		if err := send(m); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errs.New(errs.Unavailable, "store: watch of %s: the member stopped; begin anew", prefix)
}

// storeError gives etcd's errors the kinds that callers know.
func storeError(what string, err error) error {
	if errors.Is(err, rpctypes.ErrCompacted) {
		return grpcstatus.Error(codes.OutOfRange, "store: "+what+": the place in the history is lost; begin anew")
	}
	kind := errs.Internal
	var far rpctypes.EtcdError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, rpctypes.ErrAuthOldRevision), dropped(err):
		kind = errs.Unavailable
	case errors.As(err, &far):
		if far.Code() == codes.Unavailable || far.Code() == codes.DeadlineExceeded {
			kind = errs.Unavailable
		} else if far.Code() == codes.ResourceExhausted {
			kind = errs.Exhausted
		}
	default:
		if kind = errs.Of(err); kind != errs.Exhausted && kind != errs.Unavailable {
			kind = errs.Internal
		}
	}
	return errs.New(kind, "store: %s: %w", what, err)
}
