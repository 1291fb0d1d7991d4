// Package apid is the gRPC door of the node: it ends TLS, finds out who calls, checks the role that the method's proto asks for,
// writes the audit log and passes the call on, byte by byte, to the daemon that serves it.
//
// A call for another node it passes on to that node's apid, and it carries the few calls that trustd, which has no network, makes to other nodes.
//
// It has no capability, no file and no state but what trustd tells it. It must not know what is in a message, but for those that are
// proved by something in them (claim, unlock, join), into which it puts what ties them to their connection.
package apid

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Config is fixed for the life of the process.
type Config struct {
	Env daemon.Env
	// Socket returns the path of a daemon's socket; nil: peer.Socket.
	Socket func(daemon string) string
	// Now is the clock; nil: the real one.
	Now func() time.Time
	// Dial opens TCP connections to other nodes; nil: a net.Dialer's DialContext. Only tests set it.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Routes replaces what the linked protos say; nil: those. Only tests set it.
	Routes map[string]*route
}

// Daemon is apid. Make it with New; Run must be called once.
type Daemon struct {
	cfg    Config
	log    *slog.Logger
	routes map[string]*route   // by full method, "/service/Method"
	conns  map[string]*backend // by daemon
	trust  *leaf.Trust
	leaf   *leaf.Leaf
	tls    *identityCard
	gate   *gate.Gate
	audit  *auditor
	tokens tokens
	far    *leaf.Leaf // for calls to other nodes
	pool   *pool
	live   live
	// endTime is endTime; tests have less patience.
	endTime time.Duration
	claims  chan struct{}       // slots for calls without an identity
	watch   chan struct{}       // slots for nodes that follow the cluster
	prefer  latest.Cell[string] // the control plane that answered this node's daemons last
	count   figures
	spec    latest.Cell[spec]
	state   latest.Cell[*controlv1.State]
}

// Run is apid as PID 1 starts it.
func Run(ctx context.Context, env daemon.Env) error {
	d, err := New(Config{Env: env})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New makes the routes; it opens no connection yet.
func New(cfg Config) (*Daemon, error) {
	if cfg.Env.Log == nil || cfg.Env.Listen == nil || cfg.Env.TCP == nil || cfg.Env.Metrics == nil {
		return nil, errors.New("apid: log, metrics and both listeners are required")
	}
	if cfg.Socket == nil {
		cfg.Socket = peer.Socket
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Dial == nil {
		cfg.Dial = (&net.Dialer{}).DialContext
	}
	if cfg.Routes == nil {
		cfg.Routes = madeRoutes()
	}
	d := &Daemon{cfg: cfg, log: cfg.Env.Log, routes: cfg.Routes, conns: map[string]*backend{}, claims: make(chan struct{}, maxClaims), watch: make(chan struct{}, maxWatches), endTime: endTime}
	d.count = newFigures(cfg.Env.Metrics)
	daemons := []string{trustd}
	for _, r := range d.routes {
		if r.daemon != "" {
			daemons = append(daemons, r.daemon)
		}
	}
	for _, name := range daemons {
		if d.conns[name] != nil {
			continue
		}
		b, err := newBackend(cfg.Socket(name))
		if err != nil {
			return nil, err
		}
		d.conns[name] = b
	}
	signer := trustv1.NewSignerClient(d.conns[trustd].first())
	d.trust = leaf.NewTrust(signer, d.log)
	expiry := leaf.NewExpiry(cfg.Env.Metrics, "apid")
	d.leaf = leaf.New(leaf.Config{Signer: signer, Profile: "apid-server", Trust: d.trust, Log: d.log, Expiry: expiry})
	d.far = leaf.New(leaf.Config{Signer: signer, Profile: "apid-node", Trust: d.trust, Log: d.log, Expiry: expiry})
	d.pool = &pool{leaf: d.far, trust: d.trust, dial: cfg.Dial, log: d.log, nodes: map[string][]*remote{}}
	d.tls = &identityCard{trust: d.trust, leaf: d.leaf, now: cfg.Now}
	d.gate = gate.New(cfg.Env.TCP, maxConns, maxKnown, d.count.gate)
	d.audit = newAuditor(d.log, cfg.Now, d.count)
	d.state.Set(&controlv1.State{})
	return d, nil
}

const trustd = "trustd"

// Run serves until ctx is done; it returns ctx's error after open calls have had a few seconds to end.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.pool.close()
	defer func() {
		for _, b := range d.conns {
			b.close()
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.trust.Run(ctx) })
	g.Go(func() error { return d.leaf.Run(ctx) })
	g.Go(func() error { return d.far.Run(ctx) })
	g.Go(func() error { return d.followTrust(ctx) })
	g.Go(func() error { return d.followClock(ctx) })
	g.Go(func() error { return d.followIssuer(ctx) })
	g.Go(func() error { return serve(ctx, d.localServer(ctx), daemon.Limit(d.cfg.Env.Listen, maxLocal, maxOfOne, d.cfg.Env.Who)) })
	g.Go(func() error {
		// Until it is known whose certificate to show, callers wait in the listener's backlog.
		if err := d.tls.wait(ctx); err != nil {
			return err
		}
		return serve(ctx, d.publicServer(ctx), d.gate)
	})
	d.cfg.Env.Ready()
	return g.Wait()
}

const (
	drain    = 3 * time.Second
	maxLocal = 64 // connections to the Unix socket; gateway needs one, machined too
	maxOfOne = 24 // of these, of one user: nobody takes all places
)

func serve(ctx context.Context, s *grpc.Server, l net.Listener) error {
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	force := time.AfterFunc(drain, s.Stop)
	s.GracefulStop()
	force.Stop()
	<-done
	return ctx.Err()
}
