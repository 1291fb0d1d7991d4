package apid

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

const (
	// cutTime is how long calls that were told to end have for it, before their connection is closed: a handler may be in the middle of sending to
	// somebody who does not read.
	cutTime = 2 * time.Second
	// endTime is how long a call with one answer may go on after the authority of its caller was replaced. Opening a volume on a slow machine takes a minute.
	endTime = 3 * time.Minute
)

// live are the calls that are going on. The zero value is empty.
type live struct {
	mu    sync.Mutex
	calls map[*call]struct{} // guarded by mu
}

func (l *live) add(c *call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls == nil {
		l.calls = map[*call]struct{}{}
	}
	l.calls[c] = struct{}{}
}

func (l *live) remove(c *call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.calls, c)
}

func (l *live) all() []*call {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]*call, 0, len(l.calls))
	for c := range l.calls {
		out = append(out, c)
	}
	return out
}

// distrusted ends a call whose caller is not trusted any more.
type distrusted struct{ error }

func (e distrusted) Unwrap() error { return e.error }

// still returns why the caller of a call that was let in is not to be trusted any more; nil if it is.
func (d *Daemon) still(c *call, roots *leaf.Roots, seen map[*tlsConn]error) error {
	switch {
	case c.proved.id == "": // known by the socket, or by a proof in the message
		return nil
	case c.byToken || c.conn == nil:
		return admit(c.proved, roots.State)
	}
	err, ok := seen[c.conn]
	if !ok {
		err = c.conn.still(roots, d.cfg.Now())
		seen[c.conn] = err
	}
	if errors.As(err, new(replaced)) { // and yet there may be a word against the holder
		if e := admit(c.proved, roots.State); e != nil {
			return e
		}
	}
	return err
}

// replaced is why somebody is not trusted whose certificate was good under the authority that there was: nobody has said a word against its holder.
type replaced struct{ error }

// followTrust carries out what changes in what is trusted: it ends calls of those who are revoked, and connections to nodes that were removed.
func (d *Daemon) followTrust(ctx context.Context) error {
	for {
		roots, changed := d.trust.Roots()
		seen := map[*tlsConn]error{}
		for _, c := range d.live.all() {
			d.judge(c, d.still(c, roots, seen))
		}
		d.pool.keep(roots.State.GetNodes())
		d.renewFar(roots)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// judge does with a call what follows from why its caller is not to be trusted any more; nil: nothing. Who is revoked or removed has to go at once. Another
// authority alone ends streams, which are opened again, but a call with one answer may change something, and whoever made it must hear what became of it: it may end
// by itself, for so long. New calls on its connection are refused like anybody's.
func (d *Daemon) judge(c *call, why error) {
	var r replaced
	switch soft := errors.As(why, &r); {
	case why == nil:
	case !soft:
		d.cut(c, why)
	case !c.single():
		d.cut(c, r.error)
	case !c.late.Swap(true):
		time.AfterFunc(d.endTime, func() {
			roots, _ := d.trust.Roots()
			if why := d.still(c, roots, map[*tlsConn]error{}); why != nil {
				errors.As(why, &r)
				d.cut(c, r.error)
			}
		})
	}
}

// single reports whether a call has one request and one answer.
func (c *call) single() bool { return !c.route.stream.ServerStreams && !c.route.stream.ClientStreams }

// cut ends a call, and its connection if whoever it is does not read that.
func (d *Daemon) cut(c *call, why error) {
	if c.told.Swap(true) {
		return
	}
	c.cancel(distrusted{why})
	if c.conn == nil || c.conn.conn == nil {
		return
	}
	limit := time.Now().Add(d.endTime)
	time.AfterFunc(cutTime, func() { d.hangUp(c, limit) })
}

// hangUp closes the connection of a call that was told to end and has not: whoever it is does not read. Until the limit it waits for calls with one answer that
// share the connection and may end by themselves.
func (d *Daemon) hangUp(c *call, limit time.Time) {
	all := d.live.all()
	switch {
	case !slices.Contains(all, c):
	case time.Now().Before(limit) && slices.ContainsFunc(all, func(o *call) bool { return o.conn == c.conn && o.single() && !o.told.Load() }):
		time.AfterFunc(cutTime, func() { d.hangUp(c, limit) })
	default:
		_ = c.conn.conn.Close()
	}
}

// renewFar asks for another certificate for calls to nodes when this node's name or role is not what it says.
func (d *Daemon) renewFar(roots *leaf.Roots) {
	pair, _ := d.far.Pair()
	if pair == nil || roots.State.GetNodeName() == "" {
		return
	}
	name := peer.NodePrefix + roots.State.GetNodeName()
	role := rolePrefix + nodeRoles(roots.State.GetNodeRole())[1]
	has := false
	for _, o := range pair.TLS.Leaf.Subject.Organization {
		has = has || o == role
	}
	if pair.TLS.Leaf.Subject.CommonName != name || !has {
		d.far.Renew()
	}
}

// nodeRoles are the roles of a node.
func nodeRoles(role string) []string {
	if role == controlPlane {
		return []string{peer.RoleNode, peer.RoleControlPlane}
	}
	return []string{peer.RoleNode, peer.RoleWorker}
}

// outcome is what the caller gets: of a call that was ended since nobody trusts the caller any more, that.
func outcome(ctx context.Context, err error) error {
	var d distrusted
	if err != nil && errors.As(context.Cause(ctx), &d) {
		return d.error
	}
	return err
}
