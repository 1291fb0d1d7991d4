package gate

import (
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

const (
	maxConns = 256
	maxAll   = 400
)

// crowd fills a gate that nobody listens on.
func crowd(g *Gate, n int, from string, since time.Time, known bool) []*Conn {
	var out []*Conn
	for range n {
		c := &Conn{gate: g, since: since}
		g.place(c, netip.MustParseAddr(from))
		if known {
			c.Know()
		}
		out = append(out, c)
	}
	return out
}

func TestGateMakesRoom(t *testing.T) {
	now := time.Now()
	old := now.Add(-10 * time.Second)
	for _, c := range []struct {
		name   string
		fill   func(*Gate)
		ok     bool
		victim string // its address; "": nobody
	}{
		{"room", func(g *Gate) { crowd(g, maxConns-1, "192.0.2.1", old, false) }, true, ""},
		{"the address with most strangers pays", func(g *Gate) {
			crowd(g, 200, "192.0.2.1", old, false)
			crowd(g, 56, "192.0.2.2", old.Add(-time.Second), false)
		}, true, "192.0.2.1"},
		{"the address with most strangers pays, known ones are not counted", func(g *Gate) {
			crowd(g, 200, "192.0.2.1", old, true)
			crowd(g, 99, "192.0.2.1", old.Add(-time.Second), false)
			crowd(g, maxAll-299, "192.0.2.2", old, false)
		}, true, "192.0.2.2"},
		{"room besides those who are known", func(g *Gate) {
			crowd(g, maxAll-maxConns, "192.0.2.1", old, true)
			crowd(g, maxConns-1, "192.0.2.2", old, false)
		}, true, ""},
		{"the silent go first", func(g *Gate) {
			for _, c := range crowd(g, 200, "192.0.2.1", old.Add(-time.Minute), false) {
				c.spoke.Store(true)
			}
			crowd(g, 56, "192.0.2.2", old, false)
		}, true, "192.0.2.2"},
		{"everybody is known", func(g *Gate) { crowd(g, maxAll, "192.0.2.1", old, true) }, false, ""},
		{"everybody has just come", func(g *Gate) { crowd(g, maxConns, "192.0.2.1", now.Add(-silence/2), false) }, false, ""},
		{"everybody is young and speaks", func(g *Gate) {
			for _, c := range crowd(g, maxConns, "192.0.2.1", now.Add(-youth/2), false) {
				c.spoke.Store(true)
			}
		}, false, ""},
		{"among the young that speak, one is silent", func(g *Gate) {
			for _, c := range crowd(g, maxConns-1, "192.0.2.1", now.Add(-youth/2), false) {
				c.spoke.Store(true)
			}
			crowd(g, 1, "192.0.2.2", now.Add(-silence), false)
		}, true, "192.0.2.2"},
	} {
		g := New(nil, maxConns, maxAll, NewFigures(metrics.New("x"), "bulkhead_x"))
		c.fill(g)
		before := len(g.conns)
		victim, ok := g.admit(&Conn{gate: g, since: now}, netip.MustParseAddr("192.0.2.3"))
		if ok != c.ok || (victim != nil) != (c.victim != "") || victim != nil && victim.from.addr.String() != c.victim {
			t.Errorf("%s: admitted %v, victim %+v", c.name, ok, victim)
		}
		counted := 0
		for _, from := range g.sources {
			counted += from.strangers
		}
		if counted != g.strangers || g.strangers > maxConns || len(g.conns) > maxAll || !ok && len(g.conns) != before {
			t.Errorf("%s: %d connections, %d strangers, by their addresses %d", c.name, len(g.conns), g.strangers, counted)
		}
	}
	g := New(nil, maxConns, maxAll, NewFigures(metrics.New("x"), "bulkhead_x"))
	oldest := crowd(g, 1, "192.0.2.1", old.Add(-time.Hour), false)[0]
	crowd(g, maxConns-1, "192.0.2.1", old, false)
	if v, _ := g.admit(&Conn{gate: g, since: now}, netip.Addr{}); v != oldest {
		t.Error("of one address, the oldest does not go first")
	}
}

// pipes is a listener of connections in memory, for tests with a clock of their own.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (pipes) Close() error   { return nil }
func (pipes) Addr() net.Addr { return &net.TCPAddr{} }

func TestStrangersHaveHalfAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := make(pipes, 2)
		g := New(p, maxConns, maxAll, NewFigures(metrics.New("x"), "bulkhead_x"))
		var theirs, ours []net.Conn
		for range 2 {
			a, b := net.Pipe()
			p <- b
			c, err := g.Accept()
			if err != nil {
				t.Fatal(err)
			}
			theirs, ours = append(theirs, a), append(ours, c)
		}
		ours[1].(*Conn).Know()
		time.Sleep(graceTime + time.Second)
		synctest.Wait()
		if !ours[0].(*Conn).closed.Load() {
			t.Error("a stranger may stay for ever")
		}
		if ours[1].(*Conn).closed.Load() || len(g.conns) != 1 {
			t.Errorf("a known one was closed; %d left", len(g.conns))
		}
		if err := ours[1].Close(); err != nil || len(g.conns) != 0 {
			t.Errorf("after closing: %v, %d left", err, len(g.conns))
		}
		for _, c := range theirs {
			c.Close()
		}
	})
}

// A call that is being worked at gets its answer, though it takes longer than strangers have; but not for ever, and the connection goes soon after.
func TestHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := make(pipes, 2)
		g := New(p, maxConns, maxAll, NewFigures(metrics.New("x"), "bulkhead_x"))
		open := func() *Conn {
			a, b := net.Pipe()
			t.Cleanup(func() { a.Close() })
			p <- b
			c, err := g.Accept()
			if err != nil {
				t.Fatal(err)
			}
			return c.(*Conn)
		}
		for _, c := range []struct {
			name        string
			work        time.Duration
			lives, dies time.Duration // since it came
		}{
			{"a short call changes nothing", time.Second, graceTime - time.Second, graceTime + time.Second},
			{"a long one", 2 * graceTime, 2*graceTime + answerTime - time.Second, 2*graceTime + answerTime + time.Second},
			{"one that ends when the time does", graceTime - time.Second, graceTime + answerTime - 2*time.Second, graceTime + answerTime},
			{"one that does not end", time.Hour, 3*graceTime - time.Second, 3*graceTime + time.Second},
		} {
			conn := open()
			release := conn.Hold(3 * graceTime)
			time.AfterFunc(c.work, release)
			time.Sleep(c.lives)
			synctest.Wait()
			if conn.closed.Load() {
				t.Errorf("%s: closed before %s", c.name, c.lives)
			}
			time.Sleep(c.dies - c.lives)
			synctest.Wait()
			if !conn.closed.Load() {
				t.Errorf("%s: open after %s", c.name, c.dies)
			}
		}
		conn := open()
		release := conn.Hold(time.Hour)
		time.Sleep(time.Minute)
		crowd(g, maxAll-1, "192.0.2.1", time.Now().Add(-youth), true)
		if v, ok := g.admit(&Conn{gate: g, since: time.Now()}, netip.Addr{}); v != nil || ok {
			t.Error("one whose call is being worked at makes room for others")
		}
		release()
		if v, _ := g.admit(&Conn{gate: g, since: time.Now()}, netip.Addr{}); v != conn {
			t.Error("after its call it is the only stranger, and does not make room")
		}
		conn.Close()
	})
}
