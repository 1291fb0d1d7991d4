package etcdd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"math/big"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/raft/v3"
)

// While leadership moves, raft drops what is proposed: to the member that leads, or knows no leader, it says so; what a follower passes on is lost without a word, and its call would
// end only with etcd's own time limit, not knowing whether it was done. So calls are made again as soon as there is another leader.
const (
	againPause = 20 * time.Millisecond // between two tries of one call

	oncePrefix = "/bulkhead/etcdd/once/"
	maxSlots   = 16 // writes of one member at a time
)

// repeat calls f until what it did is known, or ctx ends: again if raft dropped what it proposed, if another leader was elected meanwhile, or if the member was restarted on purpose. So f must be such that
// doing it twice does no harm. It gets a client of user bulkhead.
func (m *member) repeat(ctx context.Context, f func(context.Context, lent) error) error {
	for {
		again, err := m.try(ctx, f)
		if err == nil || !again || wait(ctx, againPause) != nil {
			return err
		}
	}
}

// try calls f once, and reports whether it may be called again.
func (m *member) try(ctx context.Context, f func(context.Context, lent) error) (again bool, err error) {
	l, done, err := m.use(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	elected := l.etcd.Server.LeaderChangedNotify()
	call, cancel := context.WithCancel(ctx)
	var g sync.WaitGroup
	var lost atomic.Bool
	g.Go(func() {
		select {
		case <-call.Done():
		case <-elected:
			lost.Store(true)
			cancel()
		}
	})
	err = f(call, l)
	cancel()
	g.Wait()
	return err != nil && (lost.Load() || dropped(err) || m.hold.restarts() != l.restarts), err
}

// dropped reports whether raft says that a proposal was never made.
func dropped(err error) bool {
	return err != nil && strings.Contains(err.Error(), raft.ErrProposalDropped.Error())
}

// A slot is a key that fences the writes of one member, one after the other: each names the revision that the last one left it with, and leaves its own number there. So of all the times that a write is proposed
// at most one counts, however late it comes, and what the slot holds says whether one did.
type slot struct {
	n        int
	known    bool
	revision int64 // of the key, if known; 0: there is none
}

// slots are those that no write uses.
type slots chan *slot

func newSlots() slots {
	s := make(slots, maxSlots)
	for n := range maxSlots {
		s <- &slot{n: n}
	}
	return s
}

// written is what became of a transaction.
type written struct {
	done     bool // its conditions held
	revision int64
	// responses are those of its operations; nil if the answer was lost.
	responses []*etcdserverpb.ResponseOp
}

// txn carries out a transaction once, though it may have to propose it several times. With an error whether it was done is not known.
func (m *member) txn(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (w written, err error) {
	var s *slot
	select {
	case s = <-m.slots:
		defer func() { m.slots <- s }()
	case <-ctx.Done():
		return w, ctx.Err()
	}
	number := rand.Text()
	err = m.repeat(ctx, func(ctx context.Context, l lent) error {
		key := fmt.Sprintf("%s%s/%d", oncePrefix, hexID(uint64(l.etcd.Server.MemberID())), s.n)
		for {
			var again bool
			if w, again, err = s.txn(ctx, l.client, key, number, conditions, ops); err != nil || !again {
				return err
			}
		}
	})
	if err != nil {
		s.known = false
	}
	return w, err
}

// The end of what a slot holds says which way a transaction went.
const (
	accepted = "+"
	denied   = "-"
)

// txn tries once. again means that the slot was not as it was known; nothing was done, nor will be by what was proposed before.
func (s *slot) txn(ctx context.Context, c *clientv3.Client, key, number string, conditions []clientv3.Cmp, ops []clientv3.Op) (w written, again bool, err error) {
	if !s.known {
		r, err := c.Get(ctx, key)
		if err != nil {
			return w, false, err
		}
		s.known, s.revision = true, 0
		for _, kv := range r.Kvs {
			s.revision = kv.GetModRevision()
		}
	}
	then := append(append([]clientv3.Op{}, ops...), clientv3.OpPut(key, number+accepted))
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", s.revision)).
		Then(clientv3.OpTxn(conditions, then, []clientv3.Op{clientv3.OpPut(key, number+denied)})).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return w, false, err
	}
	if r.Succeeded {
		inner := r.Responses[0].GetResponseTxn()
		s.revision = r.Header.GetRevision()
		return written{done: inner.GetSucceeded(), revision: s.revision, responses: inner.GetResponses()}, false, nil
	}
	s.revision = 0
	for _, kv := range r.Responses[0].GetResponseRange().GetKvs() {
		s.revision = kv.GetModRevision()
		switch string(kv.GetValue()) {
		case number + accepted:
			return written{done: true, revision: s.revision}, false, nil
		case number + denied:
			return written{revision: s.revision}, false, nil
		}
	}
	return w, true, nil
}

// grant makes a lease with a number of its own, so that asking twice makes one.
func (m *member) grant(ctx context.Context, seconds int64) (clientv3.LeaseID, error) {
	n, err := rand.Int(rand.Reader, big.NewInt(math.MaxInt64-1))
	if err != nil {
		return 0, err
	}
	id := n.Int64() + 1 // 0 would let etcd choose
	err = m.repeat(ctx, func(ctx context.Context, l lent) error {
		_, err := etcdserverpb.NewLeaseClient(l.client.ActiveConnection()).LeaseGrant(ctx, &etcdserverpb.LeaseGrantRequest{ID: id, TTL: seconds})
		if err = rpctypes.Error(err); errors.Is(err, rpctypes.ErrLeaseExist) {
			return nil
		}
		return err
	})
	return clientv3.LeaseID(id), err
}
