// Package gateway gives the node's API to those who speak HTTP: REST, OpenAPI and Prometheus, on TCP 50001.
//
// It holds no authority: it passes the caller's bearer token to apid over apid's Unix socket and adds nothing to it. It has
// no network but its inherited listener. It must not know any daemon but apid and trustd (for its own certificate).
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Bounds of what comes from outside.
const (
	maxConnections = 128
	maxHeader      = 16 << 10 // bytes
	maxBody        = daemon.MaxMessage
	headerTimeout  = 10 * time.Second
	idleTimeout    = time.Minute
	maxStreams     = 64       // requests at once on one connection
	window         = 64 << 10 // bytes
	drain          = 3 * time.Second
)

// Config is fixed for the life of the process.
type Config struct {
	Env  daemon.Env
	Apid *grpc.ClientConn // required; the callers' tokens travel in metadata
	Leaf *leaf.Leaf       // required; the server's certificate
}

// Gateway serves HTTP. Make it with New.
type Gateway struct {
	cfg     Config
	log     *slog.Logger
	server  *http.Server
	control *control
}

// Run wires the daemon to its neighbours and serves until ctx is done.
func Run(ctx context.Context, env daemon.Env) error {
	apid, err := peer.Dial(peer.Socket("apid"))
	if err != nil {
		return err
	}
	defer apid.Close()
	trustd, err := peer.Dial(peer.Socket("trustd"))
	if err != nil {
		return err
	}
	defer trustd.Close()
	signer := trustv1.NewSignerClient(trustd)
	trust := leaf.NewTrust(signer, env.Log)
	l := leaf.New(leaf.Config{Signer: signer, Profile: "gateway-server", Trust: trust, Log: env.Log, Expiry: leaf.NewExpiry(env.Metrics, "gateway")})
	g, err := New(Config{Env: env, Apid: apid, Leaf: l})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return trust.Run(ctx) })
	group.Go(func() error { return l.Run(ctx) })
	group.Go(func() error { return g.Run(ctx) })
	return group.Wait()
}

// New returns a gateway that does not serve yet.
func New(cfg Config) (*Gateway, error) {
	if cfg.Env.TCP == nil {
		return nil, fmt.Errorf("gateway: no TCP listener: the unit must have \"tcp:50001\" in listen")
	}
	g := &Gateway{cfg: cfg, log: cfg.Env.Log}
	g.control = newControl(cfg.Env.Metrics, g.renew)
	handler, err := g.routes()
	if err != nil {
		return nil, err
	}
	g.server = &http.Server{
		Handler:           g.counted(secured(readable(g.guarded(handler)))),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.NewTextHandler(nowhere{}, nil), slog.LevelDebug), // strangers must not fill the log
		TLSConfig:         &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: g.certificate, NextProtos: []string{"h2", "http/1.1"}},
		// What a client may send ahead, whom nobody knows yet: with maxConnections it bounds memory.
		HTTP2:       &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReceiveBufferPerConnection: 2 * window, MaxReceiveBufferPerStream: window},
		ConnContext: withPlace,
	}
	return g, nil
}

// nowhere swallows what net/http says about broken clients.
type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }

// renew asks for a certificate with the names of a new document.
func (g *Gateway) renew() { g.cfg.Leaf.Renew() }

// Run serves until ctx is done and every goroutine it started has returned.
func (g *Gateway) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return daemon.Serve(ctx, g.cfg.Env, nil, func(s *grpc.Server) { controlv1.RegisterControlServer(s, g.control) })
	})
	group.Go(func() error { return g.serveHTTP(ctx) })
	return group.Wait()
}

func (g *Gateway) serveHTTP(ctx context.Context) error {
	g.server.BaseContext = func(net.Listener) context.Context { return ctx } // streams end when the daemon stops
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		if g.server.Shutdown(end) != nil {
			g.server.Close()
		}
	}()
	err := g.server.ServeTLS(gate.New(g.cfg.Env.TCP, maxConnections, maxConnections, g.control.gate), "", "")
	if !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return ctx.Err()
}
