package balance

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// backend is one API server. Its fields are guarded by the Balancer's mu, but for address.
type backend struct {
	address netip.AddrPort
	up      bool
	strikes int       // failed probes in a row
	failed  time.Time // last failed probe or dial; zero: never, or well since
	err     string    // why it is not up; "" if it is, or was not asked yet
	silent  bool      // it does not answer at all: what is open to it is as good as lost
	open    map[*conn]struct{}
	carried uint64
	stop    context.CancelFunc // ends its probes; nil until they run
}

// Backend is what a Balancer knows of one API server, for people.
type Backend struct {
	Address     netip.AddrPort
	Up          bool
	Preferred   bool
	Connections int    // open now
	Error       string // why it is not up; "" if it is, or was not asked yet
}

// State is what a Balancer knows.
type State struct {
	Backends []Backend // sorted by address
	// Error says why clients cannot be carried; "" if they can.
	Error string
}

// State returns what the balancer knows now.
func (b *Balancer) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	var s State
	var down []string
	for _, k := range b.backends {
		s.Backends = append(s.Backends, Backend{k.address, k.up, k.address == b.targets.Preferred, len(k.open), k.err})
	}
	slices.SortFunc(s.Backends, func(x, y Backend) int { return x.Address.Compare(y.Address) })
	for _, k := range s.Backends {
		if k.Error != "" {
			down = append(down, k.Address.String()+": "+k.Error)
		}
	}
	switch {
	case len(s.Backends) == 0:
		s.Error = "no API server is known"
	case len(down) == len(s.Backends):
		s.Error = "no API server answers: " + strings.Join(down, "; ")
	default:
		s.Error = b.trouble
	}
	return s
}

// reconcile makes the backends those of the targets, and returns the connections of those that went. mu is held.
func (b *Balancer) reconcile() []*conn {
	want := b.targets.all()
	var gone []*conn
	for a, k := range b.backends {
		if slices.Contains(want, a) {
			continue
		}
		for c := range k.open {
			gone = append(gone, c)
		}
		if k.stop != nil {
			k.stop()
		}
		delete(b.backends, a)
	}
	for _, a := range want {
		if b.backends[a] == nil {
			b.backends[a] = &backend{address: a, open: map[*conn]struct{}{}}
		}
	}
	return gone
}

// all are the addresses of the targets, each once.
func (t Targets) all() []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range append(slices.Clone(t.Backends), t.Preferred) {
		if a.IsValid() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}

// equal ignores the order of backends.
func (t Targets) equal(o Targets) bool {
	chain := func(c *tls.Certificate) [][]byte {
		if c == nil {
			return nil
		}
		return c.Certificate
	}
	mine, theirs := t.all(), o.all()
	slices.SortFunc(mine, netip.AddrPort.Compare)
	slices.SortFunc(theirs, netip.AddrPort.Compare)
	return slices.Equal(mine, theirs) && t.Preferred == o.Preferred && t.Roots == o.Roots && slices.EqualFunc(chain(t.Client), chain(o.Client), bytes.Equal)
}

// order returns the backends in the order in which a client's connection tries them: the preferred one if it is well, then those that are
// well with the fewest connections first, then the others, those that failed longest ago first.
func (b *Balancer) order() []*backend {
	b.mu.Lock()
	defer b.mu.Unlock()
	type candidate struct {
		*backend
		rank, open, lot int
		failed          time.Time
	}
	var list []candidate
	for _, k := range b.backends {
		c := candidate{backend: k, rank: 1, open: len(k.open), lot: b.cfg.Random(1 << 30)}
		switch {
		case !k.up:
			c.rank, c.open, c.failed = 2, 0, k.failed
		case k.address == b.targets.Preferred:
			c.rank = 0
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(x, y candidate) int {
		if x.rank != y.rank {
			return x.rank - y.rank
		}
		if x.open != y.open {
			return x.open - y.open
		}
		if c := x.failed.Compare(y.failed); c != 0 {
			return c
		}
		return x.lot - y.lot
	})
	var out []*backend
	for _, c := range list {
		out = append(out, c.backend)
	}
	return out
}

// good notes that a backend is well.
func (b *Balancer) good(k *backend) {
	b.mu.Lock()
	was := k.up
	k.up, k.strikes, k.failed, k.err, k.silent = true, 0, time.Time{}, "", false
	lost := b.lost()
	b.publish()
	b.mu.Unlock()
	if !was {
		b.cfg.Log.Info("API server is up", "backend", k.address.String())
		b.cfg.Changed()
	}
	for _, c := range lost {
		c.close()
	}
}

// bad notes that a backend failed a probe, or a client's dial (which counts as all strikes). silent: it did not answer at all.
func (b *Balancer) bad(k *backend, err error, silent bool, weight int) {
	b.mu.Lock()
	was, known := k.up, k.err != ""
	k.strikes += weight
	k.failed = time.Now()
	if k.strikes >= strikes || !k.up {
		k.up, k.err, k.silent = false, err.Error(), silent
	}
	lost := b.lost()
	b.publish()
	news := !k.up && (was || !known) // it was never up, and now it is known why
	b.mu.Unlock()
	if news {
		b.cfg.Log.Warn("API server dropped", "backend", k.address.String(), "err", err.Error())
		b.cfg.Changed()
	}
	for _, c := range lost {
		c.close()
	}
}

// lost returns the connections to backends that do not answer, if there is one that does: their clients will come again and find it.
// While there is none they stay, for a server that was only slow. One that says it is not ready ends its connections itself. mu is held.
func (b *Balancer) lost() []*conn {
	well := false
	var out []*conn
	for _, k := range b.backends {
		well = well || k.up
		if !k.up && k.silent {
			for c := range k.open {
				out = append(out, c)
			}
		}
	}
	if !well {
		return nil
	}
	return out
}

// publish writes the figures. mu is held.
func (b *Balancer) publish() {
	b.figures.up.Reset()
	b.figures.open.Reset()
	b.figures.carried.Reset()
	for _, k := range b.backends {
		up := 0.0
		if k.up {
			up = 1
		}
		b.figures.up.Set(up, k.address.String())
		b.figures.open.Set(float64(len(k.open)), k.address.String())
		b.figures.carried.Set(float64(k.carried), k.address.String())
	}
}

// carry connects a client to the first backend that takes it, and moves bytes until both sides have ended.
func (b *Balancer) carry(ctx context.Context, client net.Conn) {
	defer client.Close()
	var failed []string
	for _, k := range b.order() {
		dctx, cancel := context.WithTimeout(ctx, dialTimeout)
		server, err := b.dialer.DialContext(dctx, "tcp", k.address.String())
		cancel()
		if ctx.Err() != nil {
			if err == nil {
				server.Close()
			}
			return
		}
		if err != nil {
			failed = append(failed, err.Error())
			b.bad(k, err, true, strikes)
			continue
		}
		c := &conn{client: client, server: server}
		if !b.begin(k, c) { // it was removed meanwhile
			server.Close()
			continue
		}
		stop := context.AfterFunc(ctx, c.close)
		c.pipe()
		stop()
		b.end(k, c)
		return
	}
	if len(failed) == 0 {
		failed = []string{"no API server is known"}
	}
	b.refuse(strings.Join(failed, "; "))
}

// begin enters a connection; it returns false if the backend is no longer one.
func (b *Balancer) begin(k *backend, c *conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.backends[k.address] != k {
		return false
	}
	k.open[c] = struct{}{}
	k.carried++
	b.trouble = ""
	b.publish()
	return true
}

func (b *Balancer) end(k *backend, c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(k.open, c)
	b.publish()
}

// config is how probes speak TLS to these targets; nil without roots.
func (t Targets) config() (*tls.Config, error) {
	if t.Roots == "" {
		return nil, nil
	}
	roots, err := pool(t.Roots)
	if err != nil {
		return nil, fmt.Errorf("balance: roots: %w", err)
	}
	c := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, ClientSessionCache: tls.NewLRUClientSessionCache(0)}
	if t.Client != nil {
		c.Certificates = []tls.Certificate{*t.Client}
	}
	return c, nil
}
