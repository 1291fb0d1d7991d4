package apid

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/clock"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	release "github.com/bulkhead-os/bulkhead/internal/version"
)

const (
	// dialTime bounds how long a call waits for a connection to a node, over all of its addresses; each gets at least leastDial.
	dialTime  = 6 * time.Second
	leastDial = time.Second
	// farIdle is after how long without a call a connection to a node is closed.
	farIdle = 10 * time.Minute
	// A node takes maxStreams calls at once on one connection; the rest goes on further ones.
	perConn   = maxStreams - 8
	farConns  = 8
	farAlive  = 10 * time.Second // between two signs of life, while there are calls
	farSilent = 5 * time.Second  // for an answer to one
)

// pool has the connections to other nodes' apid. They are opened when first needed. A connection stands for the certificates and addresses
// with which it was opened: when these change, new calls get a new one, and the old one is closed when its last call has ended.
type pool struct {
	leaf  *leaf.Leaf // this node's, for calls to others
	trust *leaf.Trust
	dial  func(ctx context.Context, network, address string) (net.Conn, error)
	log   *slog.Logger
	brisk peer.Brisk

	mu    sync.Mutex
	nodes map[string][]*remote // guarded by mu
}

// remote is one connection to a node.
type remote struct {
	node *trustv1.ClusterNode
	pem  string // the authority with which it was opened
	pair *leaf.Pair
	conn *grpc.ClientConn
	told atomic.Bool // that it does not answer

	why   latest.Cell[string] // of the last try to connect that failed
	first atomic.Uint32       // index of the address that worked last
	gone  atomic.Bool         // the node was removed from the cluster

	busy int  // calls; guarded by pool.mu
	old  bool // no new calls; guarded by pool.mu
}

// take returns a connection for one call to a node; give ends it.
func (p *pool) take(node *trustv1.ClusterNode) (*remote, error) {
	roots, _ := p.trust.Roots()
	pair, _ := p.leaf.Pair()
	if pair == nil || roots.OS == nil {
		return nil, errs.New(errs.Unavailable, "this node has no certificate for calls to other nodes yet; try again")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var free *remote
	p.nodes[node.GetName()] = slices.DeleteFunc(p.nodes[node.GetName()], func(r *remote) bool {
		if !r.like(node, roots.State.GetOsCa(), pair) {
			p.retire(r)
			return true
		}
		if free == nil && r.busy < perConn {
			free = r
		}
		return false
	})
	if free == nil {
		if len(p.nodes[node.GetName()]) >= farConns {
			return nil, errs.New(errs.Exhausted, "node %q has %d calls from here at once already, which is the limit", node.GetName(), farConns*perConn)
		}
		var err error
		if free, err = p.open(node, roots, pair); err != nil {
			return nil, err
		}
		p.nodes[node.GetName()] = append(p.nodes[node.GetName()], free)
	}
	free.busy++
	return free, nil
}

func (r *remote) like(node *trustv1.ClusterNode, pem string, pair *leaf.Pair) bool {
	return r.pem == pem && r.pair == pair && r.node.GetKey() == node.GetKey() && slices.Equal(r.node.GetAddresses(), node.GetAddresses())
}

// give ends the call for which take returned r.
func (p *pool) give(r *remote) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.busy--
	if r.old {
		p.retire(r)
	}
}

// retire lets r go: at once, or with its last call. The caller holds p.mu.
func (p *pool) retire(r *remote) {
	r.old = true
	if r.busy == 0 || r.gone.Load() {
		if err := r.conn.Close(); err != nil && status.Code(err) != codes.Canceled { // that: it was closed before
			p.log.Debug("connection not closed", "err", err.Error())
		}
	}
}

// keep ends the connections to all nodes but these, and calls on them.
func (p *pool) keep(nodes []*trustv1.ClusterNode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, remotes := range p.nodes {
		if slices.ContainsFunc(nodes, func(n *trustv1.ClusterNode) bool {
			return n.GetName() == name && n.GetKey() == remotes[0].node.GetKey()
		}) {
			continue
		}
		for _, r := range remotes {
			r.gone.Store(true)
			p.retire(r)
		}
		delete(p.nodes, name)
	}
}

func (p *pool) open(node *trustv1.ClusterNode, roots *leaf.Roots, pair *leaf.Pair) (*remote, error) {
	r := &remote{node: node, pem: roots.State.GetOsCa(), pair: pair}
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, RootCAs: roots.OS, ServerName: client.ServerName, Certificates: []tls.Certificate{*pair.TLS},
		// Every node's apid is called "bulkhead": the node's own name must be there too, or one node could pass for another.
		VerifyConnection: func(s tls.ConnectionState) error { return p.verify(s.PeerCertificates[0], node.GetName()) },
	}
	var err error
	r.conn, err = p.brisk.Dial(node.GetName(), append(backendOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is below, in what connect returns
		grpc.WithAuthority(client.ServerName), grpc.WithIdleTimeout(farIdle),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return r.connect(ctx, p.dial, cfg) }),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: farAlive, Timeout: farSilent}))...)
	return r, err
}

func (p *pool) verify(c *x509.Certificate, name string) error {
	if err := c.VerifyHostname(name); err != nil {
		return fmt.Errorf("another node answers there: its certificate is for %s", strings.Join(c.DNSNames, ", "))
	}
	if roots, _ := p.trust.Roots(); slices.Contains(roots.State.GetRevoked(), c.SerialNumber.Text(16)) {
		return errors.New("its certificate was revoked")
	}
	return nil
}

// connect tries the node's addresses in turn, the one that worked last first.
func (r *remote) connect(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), cfg *tls.Config) (net.Conn, error) {
	addresses := r.node.GetAddresses()
	share := max(dialTime*9/10/time.Duration(len(addresses)), leastDial)
	first := int(r.first.Load())
	var all []string
	for i := range addresses {
		at := (first + i) % len(addresses)
		address := net.JoinHostPort(addresses[at], client.Port)
		conn, err := dialTLS(ctx, dial, address, cfg, share)
		if err == nil {
			r.first.Store(uint32(at))
			return conn, nil
		}
		all = append(all, address+": "+reason(err, share))
	}
	text := strings.Join(all, "; ")
	r.why.Set(text)
	return nil, errors.New(text)
}

// reason says it in the words of people.
func reason(err error, limit time.Duration) string {
	if text := clock.Handshake(err, time.Now(), release.BuildTime()); text != "" {
		return text
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() || errors.Is(err, context.DeadlineExceeded) {
		return "no answer within " + limit.Round(100*time.Millisecond).String()
	}
	return err.Error()
}

// dialTLS opens one TLS connection within a time.
func dialTLS(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), address string, cfg *tls.Config, limit time.Duration) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	raw, err := dial(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // why the handshake failed is the news
		return nil, err
	}
	return conn, nil
}

// ready returns when the connection is open. A failure before the call came does not count: the node may be back.
func (r *remote) ready(ctx context.Context) error {
	if r.conn.GetState() == connectivity.Ready {
		return nil
	}
	_, failed := r.why.Get()
	r.conn.ResetConnectBackoff() // after a failure grpc waits before it tries again
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	changes := make(chan struct{})
	go func() { // grpc has no channel for this
		defer close(changes)
		for state := r.conn.GetState(); r.advance(state) && r.conn.WaitForStateChange(ctx, state); {
			state = r.conn.GetState()
		}
	}()
	defer func() { cancel(); <-changes }()
	select {
	case <-failed:
		why, _ := r.why.Get()
		return r.unavailable(why)
	case <-changes:
	}
	switch r.conn.GetState() {
	case connectivity.Ready:
		return nil
	case connectivity.Shutdown:
		return r.unavailable("the connection was closed, since the node's entry in the cluster changed; try again")
	}
	return r.unavailable(fmt.Sprintf("no connection within %s to %s, port %s", dialTime, strings.Join(r.node.GetAddresses(), ", "), client.Port))
}

// advance reports whether a connection in a state is on its way, and sees that it is. After a failure grpc stays in that state until there is a connection.
func (r *remote) advance(state connectivity.State) bool {
	if state == connectivity.Idle {
		r.conn.Connect()
	}
	return state != connectivity.Ready && state != connectivity.Shutdown
}

func (r *remote) unavailable(why string) error {
	return errs.New(errs.Unavailable, "node %q does not answer: %s", r.node.GetName(), why)
}

// close ends all connections.
func (p *pool) close() { p.keep(nil) }
