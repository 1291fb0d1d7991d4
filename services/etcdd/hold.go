package etcdd

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Bounds of a restart on purpose.
const (
	holdTime   = 10 * time.Second // for which calls wait at most
	finishTime = 2 * time.Second  // that calls get which are under way when it begins
)

// A hold keeps calls back while the member restarts on purpose: they wait instead of failing, as long as their deadline allows it. The zero value holds nothing.
type hold struct {
	mu    sync.Mutex
	calls int           // guarded by mu; that use the member now
	idle  chan struct{} // guarded by mu; closed when the last of them ends; nil: nobody waits for that
	over  chan struct{} // guarded by mu; closed when the restart is over; nil: there is none
	limit *time.Timer   // guarded by mu; ends the hold if the member does not come back
	gone  *embed.Etcd   // guarded by mu; the one that is stopped
	count uint64        // guarded by mu; of restarts on purpose
}

// begin lets no more calls in until another one is there than e, for a while at most: then it calls late.
func (h *hold) begin(e *embed.Etcd, most time.Duration, late func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over != nil {
		return
	}
	h.over = make(chan struct{})
	h.count++
	h.gone = e
	n := h.count
	h.limit = time.AfterFunc(most, func() {
		h.end(func() bool { return h.count == n })
		late()
	})
}

// ready is the end: a member answers. One that is told of late is no news.
func (h *hold) ready(e *embed.Etcd) {
	h.end(func() bool { return h.gone != e })
}

// end lets those in that wait, if this restart is meant. What they find is what there is.
func (h *hold) end(meant func() bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over == nil || !meant() {
		return
	}
	close(h.over)
	h.over = nil
	h.limit.Stop()
}

// held reports whether a restart on purpose is under way.
func (h *hold) held() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.over != nil
}

// restarts is how many restarts on purpose there were.
func (h *hold) restarts() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.count
}

// pass waits until no restart is under way. It returns an error if ctx ends before.
func (h *hold) pass(ctx context.Context) error {
	_, err := h.await(ctx, func() {})
	return err
}

// enter is pass for a call that uses the member, and counts it; the caller calls leave when it has ended. It returns how many restarts there were until then.
func (h *hold) enter(ctx context.Context) (count uint64, err error) {
	return h.await(ctx, func() { h.calls++ })
}

// await calls in, with mu held, as soon as there is no restart.
func (h *hold) await(ctx context.Context, in func()) (uint64, error) {
	for {
		h.mu.Lock()
		over := h.over
		if over == nil {
			in()
			count := h.count
			h.mu.Unlock()
			return count, nil
		}
		h.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return 0, errs.New(errs.Unavailable, "this node's etcd member starts anew, as other authorities count, and has not come back yet: %w", ctx.Err())
		}
	}
}

func (h *hold) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.calls--; h.calls == 0 && h.idle != nil {
		close(h.idle)
		h.idle = nil
	}
}

// drained waits until no call uses the member any more, for a while at most. It is for after begin.
func (h *hold) drained(ctx context.Context, most time.Duration) {
	h.mu.Lock()
	if h.calls == 0 {
		h.mu.Unlock()
		return
	}
	if h.idle == nil {
		h.idle = make(chan struct{})
	}
	idle := h.idle
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	select {
	case <-idle:
	case <-ctx.Done(): // those that hang anyway are cut off
	}
}

// A lent member is one that a call uses.
type lent struct {
	etcd   *embed.Etcd
	client *clientv3.Client // user bulkhead
	// restarts is what hold.restarts said when it was lent.
	restarts uint64
}

// pass waits while the member restarts on purpose, for a call that needs it otherwise than use lends it.
func (m *member) pass(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, holdTime)
	defer cancel()
	return m.hold.pass(ctx)
}

// awaitLeader returns the leader. It waits a little for one, as when the last one restarts: to elect another one takes a moment, and is nothing to tell.
func awaitLeader(ctx context.Context, e *embed.Etcd) types.ID {
	elected := e.Server.LeaderChangedNotify()
	if e.Server.Leader() != 0 {
		return e.Server.Leader()
	}
	ctx, cancel := context.WithTimeout(ctx, leaderLook)
	defer cancel()
	select {
	case <-elected:
	case <-ctx.Done():
	}
	return e.Server.Leader()
}

// use lends the member to a call, which waits for it while it restarts on purpose. The caller calls done.
func (m *member) use(ctx context.Context) (l lent, done func(), err error) {
	if l.restarts, err = m.hold.enter(ctx); err != nil {
		return l, nil, err
	}
	if l.etcd, l.client, err = m.store(); err != nil {
		m.hold.leave()
		return l, nil, err
	}
	return l, m.hold.leave, nil
}
