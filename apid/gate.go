package apid

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of the TCP listener.
const (
	maxConns = 256
	// graceTime is how long a connection may live before a call shows who it is from.
	graceTime = 30 * time.Second
	// youth is how long a stranger's connection is safe from being closed to make room: time for a handshake and one call.
	youth            = time.Second
	handshakeTimeout = 10 * time.Second
)

// gate is the TCP listener with a bounded number of connections. When it is full, the oldest connection without an identity makes
// room, of the address that holds most of them; if there is none, the new one is closed. Connections that showed
// an identity are never closed for others.
type gate struct {
	net.Listener
	count figures
	now   func() time.Time

	mu    sync.Mutex
	conns map[*conn]struct{} // guarded by mu
}

type conn struct {
	net.Conn
	gate   *gate
	from   netip.Addr
	since  time.Time
	timer  *time.Timer
	known  atomic.Bool // a call on it showed an identity
	closed atomic.Bool
}

func newGate(l net.Listener, count figures) *gate {
	return &gate{Listener: l, count: count, now: time.Now, conns: map[*conn]struct{}{}}
}

// Accept returns the next connection that has a place.
func (g *gate) Accept() (net.Conn, error) {
	for {
		raw, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, gate: g, since: g.now()}
		if a, err := netip.ParseAddrPort(raw.RemoteAddr().String()); err == nil {
			c.from = a.Addr()
		}
		victim, ok := g.admit(c)
		if victim != nil {
			g.count.evicted.Add(1)
			_ = victim.Close() // a stranger's; nobody is told
		}
		if !ok {
			g.count.refusedConns.Add(1)
			_ = raw.Close()
			continue
		}
		c.timer = time.AfterFunc(graceTime, func() {
			if !c.known.Load() {
				g.count.evicted.Add(1)
				_ = c.Close()
			}
		})
		return c, nil
	}
}

// admit gives c a place if there is one or one can be made; victim is whom to close for it.
func (g *gate) admit(c *conn) (victim *conn, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) >= maxConns {
		if victim = g.victim(c.since); victim == nil {
			return nil, false
		}
		delete(g.conns, victim)
	}
	g.conns[c] = struct{}{}
	g.count.conns.Set(float64(len(g.conns)))
	return victim, true
}

// victim returns whom to close at a moment; nil if everybody is known or young. The caller holds g.mu.
func (g *gate) victim(now time.Time) *conn {
	strangers := map[netip.Addr]int{}
	for c := range g.conns {
		if !c.known.Load() {
			strangers[c.from]++
		}
	}
	var v *conn
	for c := range g.conns {
		if c.known.Load() || now.Sub(c.since) < youth {
			continue
		}
		if v == nil || strangers[c.from] > strangers[v.from] || strangers[c.from] == strangers[v.from] && c.since.Before(v.since) {
			v = c
		}
	}
	return v
}

// Close gives the place back. More than one call is one.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.count.conns.Set(float64(len(c.gate.conns)))
	c.gate.mu.Unlock()
	return c.Conn.Close()
}
