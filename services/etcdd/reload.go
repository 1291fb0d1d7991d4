package etcdd

import (
	"context"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// etcd reads certificates anew at each handshake, but its authorities only when it starts. So a member that is to believe others is stopped and started again in this process, and of all members one
// at a time: who holds the key may.
const (
	reloadKey = "/bulkhead/etcdd/reload"
	reloadTTL = 60 // seconds after which the next one may, if this one never comes back
)

// acts reports whether the member believes the authorities in roots, and no others.
func (m *member) acts(roots *leaf.Roots) bool {
	m.mu.Lock()
	running, loaded := m.etcd != nil, m.loaded
	m.mu.Unlock()
	if running {
		return loaded == digest([]byte(leaf.Bundle(roots.State.GetEtcdCa())))
	}
	data, err := hasData(m.cfg.DataDir)
	return err == nil && !data // there is no member here
}

// reload stops the member if it is its turn; then it is started again with the authorities of now.
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
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	lease, err := m.grant(ctx, reloadTTL)
	if err != nil {
		return err
	}
	resp, err := m.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(reloadKey), "=", 0)}, clientv3.OpPut(reloadKey, name, clientv3.WithLease(lease)))
	if err == nil && !resp.done {
		err = errs.New(errs.Unavailable, "another member starts anew with the authorities of now; this one is next")
	}
	if err != nil {
		m.revoke(ctx, []clientv3.LeaseID{lease})
		return err
	}
	m.mu.Lock()
	m.turn = lease
	m.mu.Unlock()
	m.handOver(ctx)
	e, _ := m.running()
	m.hold.begin(e, holdTime)
	m.hold.drained(ctx, finishTime)
	return m.halt()
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
func (m *member) reloaded(ctx context.Context, client *clientv3.Client) error {
	m.mu.Lock()
	turn := m.turn
	m.mu.Unlock()
	if _, err := client.Revoke(ctx, turn); err != nil && !strings.Contains(err.Error(), "lease not found") {
		return err
	}
	m.mu.Lock()
	m.turn = 0
	m.mu.Unlock()
	return nil
}
