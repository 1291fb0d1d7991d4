package daemon

import (
	"context"
	"errors"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Bounds of every daemon's socket.
const (
	MaxMessage     = 4 << 20 // bytes, received
	maxStreams     = 256     // at once on one connection
	maxConnections = 256     // at once on one socket
	maxOfOne       = 96      // of these, of one user: nobody takes all places. apid needs up to 65
	drain          = 3 * time.Second
)

// Serve serves the daemon's Unix socket until ctx is done: what register adds, the health service, all of it guarded.
//
// Services with a served_by option may be called by apid, control.v1 by machined, others by those whom extra lists.
// It says ready once the socket is served. It returns ctx's error after open calls have had a few seconds to end.
func Serve(ctx context.Context, env Env, extra peer.List, register func(*grpc.Server)) error {
	list := peer.List{
		controlv1.Control_ServiceDesc.ServiceName: {uid.Machined},
		healthv1.Health_ServiceDesc.ServiceName:   {uid.Apid, uid.Machined},
	}
	for k, v := range extra {
		list[k] = append(list[k], v...)
	}
	s := grpc.NewServer(append(peer.ServerOptions(list, env.Who),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.ReadBufferSize(peer.ReadBuffer),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
			defer survive(env, &err)
			resp, err = h(ctx, req)
			return resp, errs.Sent(err)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
			defer survive(env, &err)
			// Streams that only end when the client does must not hold up the end of the daemon.
			sctx, cancel := context.WithCancel(ss.Context())
			defer cancel()
			defer context.AfterFunc(ctx, cancel)()
			if err = h(srv, &stream{ss, sctx}); ctx.Err() != nil && errors.Is(err, context.Canceled) {
				err = errs.New(errs.Unavailable, "%s is stopping; try again", env.Name)
			}
			return errs.Sent(err)
		}),
	)...)
	register(s)
	hs := health.NewServer()
	healthv1.RegisterHealthServer(s, hs)
	peer.Public(s, list) // before Serve: the list is not changed any more

	done := make(chan error, 1)
	go func() { done <- s.Serve(Limit(env.Listen, maxConnections, maxOfOne, env.Who)) }()
	env.Ready()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	hs.Shutdown()
	force := time.AfterFunc(drain, s.Stop)
	s.GracefulStop()
	force.Stop()
	<-done
	return ctx.Err()
}

// stream has another context than grpc gave it.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// survive turns a panic in one call into that call's error; the others go on.
func survive(env Env, err *error) {
	if r := recover(); r != nil {
		env.Log.Error("call panicked", "err", r, "stack", string(debug.Stack()))
		*err = errs.New(errs.Internal, "%s: internal error; its log has the details", env.Name)
	}
}

// Limit returns a listener that has at most n connections open; further ones wait in the socket's backlog. Those of one user beyond each are closed at
// once, or whoever waits behind them would wait for ever. who may be nil: then the kernel is asked (peer.UID).
func Limit(l net.Listener, n, each int, who func(net.Conn) (uid.ID, error)) net.Listener {
	if who == nil {
		who = peer.UID
	}
	return &limited{Listener: l, slots: make(chan struct{}, n), done: make(chan struct{}), each: each, who: who, of: map[uid.ID]int{}}
}

type limited struct {
	net.Listener
	slots  chan struct{}
	done   chan struct{}
	closed atomic.Bool
	each   int
	who    func(net.Conn) (uid.ID, error)

	mu sync.Mutex
	of map[uid.ID]int // guarded by mu; open connections of each user
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			<-l.slots
			return nil, err
		}
		id, err := l.who(c)
		if err != nil || !l.admit(id) { // of whom the kernel knows nothing has gone already
			_ = c.Close()
			continue
		}
		// The concrete type must stay visible: SO_PEERCRED needs the Unix socket.
		if uc, ok := c.(*net.UnixConn); ok {
			return &unixConn{UnixConn: uc, release: l.release(id)}, nil
		}
		return &conn{Conn: c, release: l.release(id)}, nil
	}
}

// admit counts a user's connection, unless it is one too many.
func (l *limited) admit(id uid.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[id] >= l.each {
		return false
	}
	l.of[id]++
	return true
}

func (l *limited) release(id uid.ID) func() {
	var once atomic.Bool
	return func() {
		if !once.CompareAndSwap(false, true) {
			return
		}
		l.mu.Lock()
		if l.of[id]--; l.of[id] == 0 {
			delete(l.of, id)
		}
		l.mu.Unlock()
		<-l.slots
	}
}

func (l *limited) Close() error {
	if l.closed.CompareAndSwap(false, true) {
		close(l.done)
	}
	return l.Listener.Close()
}

type conn struct {
	net.Conn
	release func()
}

func (c *conn) Close() error { defer c.release(); return c.Conn.Close() }

type unixConn struct {
	*net.UnixConn
	release func()
}

func (c *unixConn) Close() error { defer c.release(); return c.UnixConn.Close() }
