// Package gate is a listener for strangers: it bounds how many connections are open and decides who makes room, so that
// those who say nothing keep nobody out.
package gate

import (
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

const (
	// graceTime is how long a connection may live before a call shows who it is from.
	graceTime = 30 * time.Second
	// youth is how long a stranger's connection is safe from being closed to make room: time for a handshake and one call.
	youth = time.Second
)

// Figures are what a gate counts. All are required.
type Figures struct {
	Open                       *metrics.Vec // gauge
	Accepted, Evicted, Refused *metrics.Vec // counters
}

// NewFigures returns figures "<prefix>_connections…" in a set.
func NewFigures(s *metrics.Set, prefix string) Figures {
	f := Figures{
		Open:     s.Gauge(prefix+"_connections", "Open TCP connections."),
		Accepted: s.Counter(prefix+"_connections_accepted_total", "Connections that came in since the start, whatever became of them."),
		Evicted:  s.Counter(prefix+"_connections_evicted_total", "Connections without an identity that were closed since the start."),
		Refused:  s.Counter(prefix+"_connections_refused_total", "Connections that found no place since the start."),
	}
	for _, v := range []*metrics.Vec{f.Open, f.Accepted, f.Evicted, f.Refused} {
		v.Add(0)
	}
	return f
}

// Gate is a listener with a bounded number of connections. When it is full, the oldest connection without an identity makes
// room, of the address that holds most of them; if there is none, the new one is closed. Connections that showed
// an identity are never closed for others.
type Gate struct {
	net.Listener
	most  int
	count Figures
	now   func() time.Time

	mu    sync.Mutex
	conns map[*Conn]struct{} // guarded by mu
}

// Conn is a connection that has a place in a gate.
type Conn struct {
	net.Conn
	gate   *Gate
	from   netip.Addr
	since  time.Time
	timer  *time.Timer
	known  atomic.Bool // a call on it showed an identity
	closed atomic.Bool
}

// New returns a gate in front of l, for at most so many connections. Closing it closes l, and no connection.
func New(l net.Listener, most int, count Figures) *Gate {
	return &Gate{Listener: l, most: most, count: count, now: time.Now, conns: map[*Conn]struct{}{}}
}

// Accept returns the next connection that has a place.
func (g *Gate) Accept() (net.Conn, error) {
	for {
		raw, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		g.count.Accepted.Add(1)
		c := &Conn{Conn: raw, gate: g, since: g.now()}
		if a, err := netip.ParseAddrPort(raw.RemoteAddr().String()); err == nil {
			c.from = a.Addr()
		}
		victim, ok := g.admit(c)
		if victim != nil {
			g.count.Evicted.Add(1)
			_ = victim.Close() // a stranger's; nobody is told
		}
		if !ok {
			g.count.Refused.Add(1)
			_ = raw.Close()
			continue
		}
		c.timer = time.AfterFunc(graceTime, func() {
			if !c.known.Load() {
				g.count.Evicted.Add(1)
				_ = c.Close()
			}
		})
		return c, nil
	}
}

// admit gives c a place if there is one or one can be made; victim is whom to close for it.
func (g *Gate) admit(c *Conn) (victim *Conn, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.conns) >= g.most {
		if victim = g.victim(c.since); victim == nil {
			return nil, false
		}
		delete(g.conns, victim)
	}
	g.conns[c] = struct{}{}
	g.count.Open.Set(float64(len(g.conns)))
	return victim, true
}

// victim returns whom to close at a moment; nil if everybody is known or young. The caller holds g.mu.
func (g *Gate) victim(now time.Time) *Conn {
	strangers := map[netip.Addr]int{}
	for c := range g.conns {
		if !c.known.Load() {
			strangers[c.from]++
		}
	}
	var v *Conn
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

// Know marks a connection whose caller showed an identity: it keeps its place.
func (c *Conn) Know() { c.known.Store(true) }

// Known reports whether Know was called.
func (c *Conn) Known() bool { return c.known.Load() }

// Close gives the place back. More than one call is one.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.count.Open.Set(float64(len(c.gate.conns)))
	c.gate.mu.Unlock()
	return c.Conn.Close()
}
