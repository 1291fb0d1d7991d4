package apid

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// cutTime is how long calls of somebody who is trusted no more have to end by themselves, before their connection is closed: a handler may
// be in the middle of sending to somebody who does not read.
const cutTime = 2 * time.Second

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

func (l *live) has(c *call) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.calls[c]
	return ok
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
	return err
}

// followTrust carries out what changes in what is trusted: it ends calls of those who are revoked, and connections to nodes that were removed.
func (d *Daemon) followTrust(ctx context.Context) error {
	var cut []*call
	var timer <-chan time.Time
	for {
		roots, changed := d.trust.Roots()
		seen := map[*tlsConn]error{}
		for _, c := range d.live.all() {
			if err := d.still(c, roots, seen); err != nil {
				c.cancel(distrusted{err})
				cut, timer = append(cut, c), time.After(cutTime)
			}
		}
		d.pool.keep(roots.State.GetNodes())
		d.renewFar(roots)
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
				waiting = false
			case <-timer:
				for _, c := range cut {
					if c.conn != nil && c.conn.conn != nil && d.live.has(c) {
						_ = c.conn.conn.Close() // whoever it is has been told
					}
				}
				cut, timer = nil, nil
			}
		}
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
