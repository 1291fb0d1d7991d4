// Package balance lets a node reach the cluster's API servers at one address of its own, whichever of them live.
//
// It carries bytes: TLS ends at the API server, so that it sees the client's certificate and no key is needed here. A backend that
// does not answer is dropped within 3 s, and what was open to it is closed, so that clients come again and land elsewhere. It knows
// nothing of Kubernetes but GET /readyz.
package balance

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// Port is where kubeletd's balancer listens, on loopback only.
const Port = 7445

// DefaultMaxConnections is the bound on open client connections; each takes two descriptors and, while it moves data, two pipes.
const DefaultMaxConnections = 1024

// The times of a probe. A backend that stops answering right after a good probe is dropped after period + 2 × probeTimeout = 2.8 s.
const (
	period       = time.Second            // between two probes of a backend that is well
	probeTimeout = 900 * time.Millisecond // of connect, handshake and answer together
	freshPeriod  = time.Minute            // after which a probe has a new connection
	retryPause   = 200 * time.Millisecond // from the start of a failed probe to the next one, if it failed earlier than that
	dialTimeout  = time.Second            // of one backend, for a client
	strikes      = 2                      // failed probes in a row that drop a backend
)

// Config is fixed for the life of a Balancer.
type Config struct {
	Listeners []net.Listener // required, at least one; Run closes them
	Log       *slog.Logger   // required
	Metrics   *metrics.Set   // required
	// MaxConnections is how many clients may be connected at once; more are closed at once. 0 means DefaultMaxConnections.
	MaxConnections int
	// Changed is called after a backend came, went, was dropped or came back; it must not block. It may be nil.
	Changed func()
	// Random chooses among equals, so that not all nodes of a cluster choose the same; nil means rand.IntN.
	Random func(n int) int
}

// Targets is what a Balancer carries connections to. The zero value is nobody.
type Targets struct {
	Backends []netip.AddrPort // the cluster's API servers; the order does not matter
	// Preferred is used as long as it is well, whether or not it is among Backends: a control plane's own API server. The zero value: none.
	Preferred netip.AddrPort
	// Roots are PEM certificates that may have signed the backends' certificates; the names there must have the backend's address. While
	// it is empty nothing can be probed, and all are taken as they come.
	Roots string
	// Client shows who asks, in probes only. Without it an API server that lets in nobody unknown cannot say whether it is ready: that it
	// answers at all must do. It may be nil.
	Client *tls.Certificate
}

// Balancer carries connections. Make it with New. Its methods are safe for concurrent use.
type Balancer struct {
	cfg    Config
	wake   chan struct{} // capacity 1: the targets changed
	dialer net.Dialer

	mu       sync.Mutex
	targets  Targets                     // guarded by mu
	backends map[netip.AddrPort]*backend // guarded by mu
	clients  int                         // guarded by mu
	refused  uint64                      // guarded by mu; clients that found nobody, or were too many
	trouble  string                      // guarded by mu; why the last client was refused; "" once one was carried

	figures figures
}

type figures struct{ up, open, carried, refused *metrics.Vec }

// New returns a balancer without backends; clients wait in the listeners' queues until Run.
func New(cfg Config) (*Balancer, error) {
	if len(cfg.Listeners) == 0 || cfg.Log == nil || cfg.Metrics == nil {
		return nil, errors.New("balance: Config needs Listeners, Log and Metrics")
	}
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = DefaultMaxConnections
	}
	if cfg.Random == nil {
		cfg.Random = rand.IntN
	}
	if cfg.Changed == nil {
		cfg.Changed = func() {}
	}
	m := cfg.Metrics
	b := &Balancer{
		cfg: cfg, wake: make(chan struct{}, 1), backends: map[netip.AddrPort]*backend{},
		figures: figures{
			up:      m.Gauge("bulkhead_kubeletd_api_backend_up", "1 if the local API balancer sends new connections to this API server.", "backend"),
			open:    m.Gauge("bulkhead_kubeletd_api_backend_connections", "Open connections to this API server through the local API balancer.", "backend"),
			carried: m.Counter("bulkhead_kubeletd_api_connections_total", "Connections that the local API balancer has carried, by API server.", "backend"),
			refused: m.Counter("bulkhead_kubeletd_api_connections_refused_total", "Connections that the local API balancer closed because no API server took them or there were too many."),
		},
	}
	return b, nil
}

// Set replaces the targets; the same again changes nothing. Connections to a backend that is no longer named are closed. Roots that cannot
// be read are an error, and the targets stay as they were.
func (b *Balancer) Set(t Targets) error {
	if _, err := t.config(); err != nil {
		return err
	}
	b.mu.Lock()
	if b.targets.equal(t) {
		b.mu.Unlock()
		return nil
	}
	b.targets = t
	gone := b.reconcile()
	b.publish()
	b.mu.Unlock()
	for _, c := range gone {
		c.close()
	}
	select {
	case b.wake <- struct{}{}:
	default:
	}
	b.cfg.Changed()
	return nil
}

// Run carries connections until ctx is done, then closes all of them, and returns when every goroutine it started has ended.
func (b *Balancer) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, l := range b.cfg.Listeners {
		stop := context.AfterFunc(ctx, func() { l.Close() })
		defer stop()
		g.Go(func() error { return b.accept(ctx, l) })
	}
	g.Go(func() error { return b.probeAll(ctx) })
	return g.Wait()
}

// accept carries what comes in at one listener.
func (b *Balancer) accept(ctx context.Context, l net.Listener) error {
	defer l.Close()
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		client, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				client.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			if !tooMany(err) {
				return fmt.Errorf("accept at %s: %w", l.Addr(), err)
			}
			b.refuse(err.Error())
			if !pause(ctx, retryPause) { // descriptors come back as connections end
				return ctx.Err()
			}
			continue
		}
		if !b.enter() {
			client.Close()
			continue
		}
		conns.Go(func() {
			defer b.leave()
			b.carry(ctx, client)
		})
	}
}

// enter counts a client in, unless there are too many.
func (b *Balancer) enter() bool {
	b.mu.Lock()
	full := b.clients >= b.cfg.MaxConnections
	if !full {
		b.clients++
	}
	b.mu.Unlock()
	if full {
		b.refuse(fmt.Sprintf("%d connections are open; at most %d", b.cfg.MaxConnections, b.cfg.MaxConnections))
	}
	return !full
}

func (b *Balancer) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clients--
}

// refuse notes that a client got nothing; the first one after one that did is told to the log.
func (b *Balancer) refuse(why string) {
	b.mu.Lock()
	first := b.trouble == ""
	b.trouble = why
	b.refused++
	b.figures.refused.Set(float64(b.refused))
	b.mu.Unlock()
	if first {
		b.cfg.Log.Warn("API connection refused", "err", why)
		b.cfg.Changed()
	}
}

// pause waits; it returns false if ctx is done.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
