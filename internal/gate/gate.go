// Package gate is a listener for strangers: it bounds how many connections are open and decides who makes room, so that
// those who say nothing keep nobody out, neither other strangers nor those who are known.
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
	// silence is how long one that has not sent a byte is: a client that means to speak does so with the packet after the one that opened the connection. It bounds how
	// many strangers may come without one being refused: as many as there are places, in each silence.
	silence = 200 * time.Millisecond
	// answerTime is how long a stranger's connection is safe after its call, so that the answer comes out.
	answerTime = 5 * time.Second
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

// Gate is a listener with a bounded number of connections, of strangers and of all. When either is reached, a connection without an identity makes room: one that never
// sent a byte if there is one, of the address that holds most, the oldest; if there is none, the new one is closed. Connections that showed
// an identity are never closed for others.
type Gate struct {
	net.Listener
	// Grace is how long a connection may live before a call shows who it is from, as New sets it. Only tests set another, before the first Accept.
	Grace time.Duration

	most  int // strangers
	all   int
	count Figures
	now   func() time.Time

	mu        sync.Mutex
	conns     map[*Conn]struct{}     // guarded by mu
	strangers int                    // guarded by mu; those of conns that are not known
	sources   map[netip.Addr]*source // guarded by mu; of strangers
}

// source is an address that strangers come from.
type source struct {
	addr      netip.Addr
	strangers int // guarded by gate.mu
}

// Conn is a connection that has a place in a gate.
type Conn struct {
	net.Conn
	gate   *Gate
	from   *source
	since  time.Time
	timer  *time.Timer // guarded by gate.mu
	held   int         // guarded by gate.mu; calls that are being worked at
	until  time.Time   // guarded by gate.mu; until when it is not closed for having no identity
	known  atomic.Bool // a call on it showed an identity; set with gate.mu held
	spoke  atomic.Bool // a byte came from it
	closed atomic.Bool
}

// New returns a gate in front of l, for at most so many connections of strangers, and so many in all. Closing it closes l, and no connection.
func New(l net.Listener, strangers, all int, count Figures) *Gate {
	return &Gate{Listener: l, Grace: graceTime, most: strangers, all: all, count: count, now: time.Now, conns: map[*Conn]struct{}{}, sources: map[netip.Addr]*source{}}
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
		var from netip.AddrPort // the zero value is a source too
		if a, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
			from = a.AddrPort()
		}
		victim, ok := g.admit(c, from.Addr().Unmap())
		if victim != nil {
			g.count.Evicted.Add(1)
			_ = victim.Close() // a stranger's; nobody is told
		}
		if !ok {
			g.count.Refused.Add(1)
			_ = raw.Close()
			continue
		}
		g.mu.Lock()
		c.timer = time.AfterFunc(g.Grace, c.expire)
		g.mu.Unlock()
		return c, nil
	}
}

// expire closes a connection that has been a stranger's for too long, unless a call on it is being worked at.
func (c *Conn) expire() {
	g := c.gate
	g.mu.Lock()
	left := c.until.Sub(g.now())
	if stay := c.known.Load() || c.closed.Load(); stay || left > 0 {
		if !stay {
			c.timer.Reset(left)
		}
		g.mu.Unlock()
		return
	}
	g.mu.Unlock()
	g.count.Evicted.Add(1)
	_ = c.Close()
}

// Hold keeps a stranger's connection while a call on it is being worked at, for at most so long: it neither ends nor makes room for others. Whoever calls it bounds how many
// connections are held at once, far below what the gate lets in, and holds none for the caller's sake: a request must have arrived whole, and be for something that a stranger may
// have done. The caller calls release when the answer is about to be sent; more than one call is one.
func (c *Conn) Hold(most time.Duration) (release func()) {
	g := c.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	c.held++
	if until := g.now().Add(most); until.After(c.until) {
		c.until = until
	}
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.held--; c.held == 0 {
			c.until = g.now().Add(answerTime)
			if c.timer != nil && !c.closed.Load() && c.timer.Stop() { // it may have been put off for as long as the call might have taken
				c.timer.Reset(max(answerTime, c.since.Add(g.Grace).Sub(g.now())))
			}
		}
	})
}

// admit gives c a place if there is one or one can be made; victim is whom to close for it.
func (g *Gate) admit(c *Conn, from netip.Addr) (victim *Conn, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.strangers >= g.most || len(g.conns) >= g.all {
		if victim = g.victim(c.since); victim == nil {
			return nil, false
		}
		g.forget(victim)
	}
	g.place(c, from)
	g.count.Open.Set(float64(len(g.conns)))
	return victim, true
}

// place gives c, a stranger, a place. The caller holds g.mu.
func (g *Gate) place(c *Conn, from netip.Addr) {
	if c.from = g.sources[from]; c.from == nil {
		c.from = &source{addr: from}
		g.sources[from] = c.from
	}
	g.conns[c] = struct{}{}
	g.strangers++
	c.from.strangers++
}

// forget gives a place back. The caller holds g.mu.
func (g *Gate) forget(c *Conn) {
	g.meet(c)
	delete(g.conns, c)
}

// meet counts c among the strangers no more. The caller holds g.mu, and marks c as known or forgets it.
func (g *Gate) meet(c *Conn) {
	if _, ok := g.conns[c]; !ok || c.known.Load() {
		return
	}
	g.strangers--
	if c.from.strangers--; c.from.strangers == 0 {
		delete(g.sources, c.from.addr)
	}
}

// victim returns whom to close at a moment; nil if everybody is known or young. The caller holds g.mu.
func (g *Gate) victim(now time.Time) *Conn {
	var v *Conn
	for c := range g.conns {
		if !c.known.Load() && (c.held == 0 || !now.Before(c.until)) && now.Sub(c.since) >= c.safe() && (v == nil || c.before(v)) {
			v = c
		}
	}
	return v
}

// safe is how long c is not closed to make room, from its beginning.
func (c *Conn) safe() time.Duration {
	if c.spoke.Load() {
		return youth
	}
	return silence
}

// before reports whether c goes before v: who never said a word, then whose address holds more, then who came earlier. A handshake
// takes its time on a busy node, and those in the middle of one should not pay for those who only sit there.
func (c *Conn) before(v *Conn) bool {
	if a, b := c.spoke.Load(), v.spoke.Load(); a != b {
		return !a
	}
	if a, b := c.from.strangers, v.from.strangers; a != b {
		return a > b
	}
	return c.since.Before(v.since)
}

// Read notes that something came.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && !c.spoke.Load() {
		c.spoke.Store(true)
	}
	return n, err
}

// Know marks a connection whose caller showed an identity: it keeps its place.
func (c *Conn) Know() {
	if c.known.Load() {
		return
	}
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	c.gate.meet(c)
	c.known.Store(true)
}

// Known reports whether Know was called.
func (c *Conn) Known() bool { return c.known.Load() }

// Close gives the place back. More than one call is one.
func (c *Conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	c.gate.mu.Lock()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.gate.forget(c)
	c.gate.count.Open.Set(float64(len(c.gate.conns)))
	c.gate.mu.Unlock()
	return c.Conn.Close()
}
