package etcdd

import (
	"context"
	"errors"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// etcd reads certificates anew at each handshake, but its authorities only when it starts. So a member that is to believe others is stopped and started again in this process, and of all members one
// at a time: who holds the key may.
const (
	reloadKey = "/bulkhead/etcdd/reload"
	reloadTTL = 60 // seconds after which the next one may, if this one never comes back

	turnTime  = 15 * time.Second       // for which a member waits for its turn before it says so
	turnPause = 250 * time.Millisecond // between two looks at whether it has come
)

// acts reports whether the member believes the authorities in roots, and no others, and answers.
func (m *member) acts(roots *leaf.Roots) bool {
	m.mu.Lock()
	e, loaded := m.etcd, m.loaded
	m.mu.Unlock()
	if e != nil {
		select {
		case <-e.Server.ReadyNotify():
		default:
			return false
		}
		return loaded == digest([]byte(leaf.Bundle(roots.State.GetEtcdCa())))
	}
	data, err := hasData(m.cfg.DataDir)
	return err == nil && !data // there is no member here
}

// reload stops the member when it is its turn, and starts it with the authorities of now.
func (m *member) reload(ctx context.Context, name string) error {
	select {
	case m.changes <- struct{}{}: // who changes the members has a client of the one that is to stop
		defer func() { <-m.changes }()
	default:
		return errs.New(errs.Unavailable, "the members are just being changed through this one; it starts anew after that")
	}
	m.mu.Lock()
	client := m.own
	m.mu.Unlock()
	if client == nil {
		return errs.New(errs.Unavailable, "the member does not run")
	}
	if err := m.awaitTurn(ctx, name); err != nil {
		return err
	}
	over, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	m.handOver(over)
	e, _ := m.running()
	m.hold.begin(e, holdTime, m.move)
	m.hold.drained(over, finishTime)
	if err := m.halt(); err != nil {
		return err
	}
	return m.start(m.asItIs(name))
}

// awaitTurn returns when no other member starts anew, and keeps them from it.
func (m *member) awaitTurn(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, turnTime+m.wait)
	defer cancel()
	lease, err := m.grant(ctx, reloadTTL)
	if err != nil {
		return storeError("lease for a turn", err)
	}
	for patience := turnTime; ; patience -= turnPause {
		w, err := m.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(reloadKey), "=", 0)}, clientv3.OpPut(reloadKey, name, clientv3.WithLease(lease)))
		if err == nil && w.done {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.turn = lease
			return nil
		}
		switch {
		case err != nil:
			err = storeError("turn", err)
		case patience <= 0:
			err = errs.New(errs.Unavailable, "another member starts anew with the authorities of now; this one is next")
		default:
			err = wait(ctx, turnPause)
		}
		if err != nil {
			m.revoke(ctx, []clientv3.LeaseID{lease})
			return err
		}
	}
}

// handOver has another member lead while this one can still answer for what it has taken. It need not succeed: one that stops while it leads tries once more.
func (m *member) handOver(ctx context.Context) {
	e, client := m.running()
	if e == nil || e.Server.Leader() != e.Server.MemberID() {
		return
	}
	all, err := m.voices(ctx)
	if err == nil {
		_, err = m.forfeit(ctx, client, all)
	}
	if err != nil {
		m.cfg.Env.Log.Warn("leadership not handed over before the member starts anew", "err", errs.Text(err))
	}
}

// reloaded lets the next one.
func (m *member) reloaded(ctx context.Context) error {
	m.mu.Lock()
	turn := m.turn
	m.mu.Unlock()
	err := m.repeat(ctx, func(ctx context.Context, l lent) error { _, err := l.client.Revoke(ctx, turn); return err })
	if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return err
	}
	m.mu.Lock()
	m.turn = 0
	m.mu.Unlock()
	return nil
}
