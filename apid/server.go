package apid

import (
	"cmp"
	"context"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/grpc/status"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	outboundv1 "github.com/bulkhead-os/bulkhead/api/outbound/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Bounds of a connection.
const (
	maxConns         = 256  // of those who showed no identity yet
	maxKnown         = 4096 // of all; a control plane has two of each worker, and some of other control planes
	handshakeTimeout = 10 * time.Second

	maxStreams = 128
	maxHeaders = 16 << 10
	// window is how much a client may send ahead, per call and per connection: with maxConns it bounds memory.
	window      = 64 << 10
	idleTime    = 10 * time.Minute
	readBuffer  = 8 << 10
	writeBuffer = 16 << 10
)

// call is one call that the interceptor looks at.
type call struct {
	route  *route // nil: there is none
	method string // as the client wrote it, shortened
	who    identity
	conn   *tlsConn // nil: over the Unix socket
	peer   string   // address, or "gateway"
	start  time.Time
	bound  bool // the request gets what ties it to its connection

	aim     aim      // which node answers
	via     string   // the control plane that passed the call on; "": none
	local   string   // the daemon of this node that calls; "": none
	proved  identity // who showed credentials: who, or via
	byToken bool
	roots   *leaf.Roots // under which it was let in
	grants  *grants     // what the document said then
	cancel  context.CancelCauseFunc
	strange bool        // refused: credentials were shown, and are not good here
	told    atomic.Bool // it was told to end
	late    atomic.Bool // it goes on, though the authority of its caller is none any more
}

type callKey struct{}

func callFrom(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// publicServer answers on TCP.
func (d *Daemon) publicServer(stop context.Context) *grpc.Server {
	return d.server(stop,
		grpc.Creds(serverCreds{d.tls.config()}), grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second, MaxConnectionIdle: idleTime}),
		grpc.InitialWindowSize(window), grpc.InitialConnWindowSize(window),
		grpc.ReadBufferSize(readBuffer), grpc.WriteBufferSize(writeBuffer),
	)
}

// localServer answers on the Unix socket: gateway, whose callers show tokens; daemons that call control planes; machined and trustd.
func (d *Daemon) localServer(stop context.Context) *grpc.Server {
	s := d.server(stop, append(peer.ServerOptions(callers(d.routes), d.cfg.Env.Who), grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute}))...)
	controlv1.RegisterControlServer(s, controlServer{d: d})
	outboundv1.RegisterOutboundServer(s, &outbound{dial: d.cfg.Dial, slots: make(chan struct{}, maxExchanges), stop: stop, count: d.count})
	return s
}

// Callers is all of who may call what on the Unix socket: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers(madeRoutes()) }

func callers(routes map[string]*route) peer.List {
	list := peer.List{
		controlv1.Control_ServiceDesc.ServiceName:   {uid.Machined},
		healthv1.Health_ServiceDesc.ServiceName:     {uid.Machined},
		outboundv1.Outbound_ServiceDesc.ServiceName: {uid.Trustd},
	}
	for _, r := range routes {
		if !slices.Contains(list[r.service], uid.Gateway) {
			list[r.service] = append(list[r.service], uid.Gateway)
		}
		if slices.Contains(r.need, authv1.Role_NODE) {
			list[r.name()] = []uid.ID{uid.Gateway, uid.Machined, uid.Etcdd, uid.Kubeletd}
		}
	}
	return list
}

func (d *Daemon) server(stop context.Context, opts ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(append(opts,
		grpc.ForceServerCodecV2(newRaw()),
		grpc.UnknownServiceHandler(func(_ any, in grpc.ServerStream) error { return d.forward(stop, in) }),
		grpc.MaxRecvMsgSize(daemon.MaxMessage), grpc.MaxConcurrentStreams(maxStreams), grpc.MaxHeaderListSize(maxHeaders),
		// Half of what our own clients use: on their way signs of life may come closer together.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: farAlive / 2, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, si *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
			err = d.guard(ctx, si.FullMethod, func(ctx context.Context) (err error) {
				if c := callFrom(ctx); c != nil && !c.aim.here() {
					resp, err = d.relay(ctx, c, req)
				} else {
					resp, err = h(ctx, req)
				}
				return err
			})
			return resp, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, si *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			return d.guard(ss.Context(), si.FullMethod, func(ctx context.Context) error {
				if c := callFrom(ctx); c != nil && !c.aim.here() {
					return d.forward(stop, &stream{ss, ctx})
				}
				return h(srv, &stream{ss, ctx})
			})
		}),
	)...)
	healthv1.RegisterHealthServer(s, healthServer{d: d})
	accessv1.RegisterAccessServer(s, accessServer{})
	services := reflection.ServerOptions{Services: listed(d.routes)}
	reflectionv1.RegisterServerReflectionServer(s, reflection.NewServerV1(services))
	reflectionv1alpha.RegisterServerReflectionServer(s, reflection.NewServer(services))
	return s
}

// stream carries the context that guard made.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// guard stands before every call, of whatever kind: who is it, may they, and afterwards what became of it.
func (d *Daemon) guard(ctx context.Context, method string, next func(context.Context) error) (err error) {
	c := &call{route: d.routes[method], method: method, start: d.cfg.Now()}
	if id, ok := peer.From(ctx); ok && id != uid.Gateway {
		if c.route == nil || c.route.daemon == "" { // of apid's own services the socket's list lets daemons call what is theirs
			return next(ctx)
		}
		c.local = id.Name()
	}
	err = d.enter(ctx, c)
	refused := err != nil
	if !refused {
		ctx, c.cancel = context.WithCancelCause(context.WithValue(ctx, callKey{}, c))
		d.live.add(c)
		// What is trusted may have changed since it was asked: who was late for that is not among those whose calls were ended.
		if roots, _ := d.trust.Roots(); roots != c.roots {
			d.judge(c, d.still(c, roots, map[*tlsConn]error{}))
		}
		done := d.endWithCredential(c)
		err = outcome(ctx, d.run(ctx, c, next))
		done()
		d.live.remove(c)
		c.cancel(nil)
	}
	if c.route == nil {
		c.method = "unknown" // a stranger's text belongs in no log
	}
	if c.route == nil || c.strange || c.route.audited() {
		s, _ := d.spec.Get()
		// A proof that was wrong is a stranger's refused attempt too.
		if d.audit.write(c, s.hostname, err, refused || c.bound && err != nil) && c.strange {
			d.tellStrange(c, err)
		}
	}
	d.count.call(c, err)
	return err
}

// enter finds out who calls and decides.
func (d *Daemon) enter(ctx context.Context, c *call) error {
	// Just after a start a call over the Unix socket may come before trustd's first word: it waits and does not fail.
	if err := d.trust.Wait(ctx); err != nil {
		return status.FromContextError(err).Err()
	}
	c.roots, _ = d.trust.Roots()
	trust := c.roots.State
	sp, _ := d.spec.Get()
	c.grants = sp.grants
	md, _ := metadata.FromIncomingContext(ctx)
	authErr := d.recognise(ctx, c, md)
	if err := allow(c.route, c.who, authErr, trust); err != nil {
		c.strange = err == authErr && errs.Is(err, errs.Unauthenticated) && (c.byToken || c.conn.shows())
		return err
	}
	if authErr != nil { // let in without credentials: a name that was revoked, or is none here, stands behind nothing that this node does for the call
		c.who = identity{}
	}
	for _, r := range []authv1.Role{authv1.Role_CLAIM, authv1.Role_UNLOCK, authv1.Role_JOIN} {
		c.bound = c.bound || slices.Contains(c.route.need, r)
	}
	var err error
	if c.aim, err = aimOf(c, md, d.ownName(trust), trust); err != nil {
		return err
	}
	name, role := c.aim.node.GetName(), c.aim.node.GetRole()
	if c.aim.node == nil {
		name, role = d.ownName(trust), cmp.Or(trust.GetNodeRole(), sp.role)
	}
	if err := onNode(c, name, role); err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < leastTime {
		return status.Error(codes.DeadlineExceeded, "less than "+leastTime.String()+" were left when the call arrived")
	}
	return nil
}

// recognise finds out who calls.
func (d *Daemon) recognise(ctx context.Context, c *call, md metadata.MD) (err error) {
	if p, ok := grpcpeer.FromContext(ctx); ok {
		c.conn, _ = p.AuthInfo.(*tlsConn)
		c.peer = p.Addr.String()
	}
	trust := c.roots.State
	if c.local != "" { // the kernel says so, and the socket's list lets it call; for others it is this node
		c.peer = c.local
		c.who = identity{name: peer.NodePrefix + trust.GetNodeName(), roles: nodeRoles(trust.GetNodeRole())}
		return nil
	}
	if c.conn == nil {
		c.peer = "gateway " + forwardedFor(md)
	}
	text, has := bearer(md)
	switch {
	case has: // who shows a token means it: a wrong one is not made good by a certificate
		c.byToken = true
		if c.grants.takes(text) {
			c.who, err = c.grants.issuer.who(ctx, text, c.roots.State, d.cfg.Now)
		} else {
			c.who, err = d.tokens.who(text, c.roots, c.start)
		}
	case c.conn != nil:
		c.who, err = c.conn.who(c.roots, c.start)
	default:
		err = errStranger
	}
	if err != nil {
		return err
	}
	c.proved = c.who
	if c.conn != nil && c.conn.conn != nil {
		c.conn.conn.Know()
	}
	err = c.behind(md)
	c.grants.resolve(&c.who)
	return err
}

// behind finds out for whom a control plane passed the call on. From all others such words count for nothing.
func (c *call) behind(md metadata.MD) error {
	names := md.Get(peer.CallerKey)
	if !c.who.control || len(md.Get(peer.HopKey)) == 0 || len(names) == 0 {
		return nil
	}
	if len(names) > 1 || names[0] == "" || strings.HasPrefix(names[0], peer.NodePrefix) {
		return errs.New(errs.Denied, "node %q passed a call on for nobody: %s is %.100q", c.who.node, peer.CallerKey, names)
	}
	c.via = c.who.node
	roles := md.Get(peer.RolesKey)
	c.who = identity{how: howForwarded, name: names[0], roles: known(roles), custom: unknown(roles), expires: c.who.expires}
	return nil
}

// ownName is what this node is called; "" before it has a name.
func (d *Daemon) ownName(trust *trustv1.TrustState) string {
	if trust.GetNodeName() != "" {
		return trust.GetNodeName()
	}
	s, _ := d.spec.Get()
	return s.hostname
}

// run turns a panic in one call into that call's error; the others go on.
func (d *Daemon) run(ctx context.Context, c *call, next func(context.Context) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			d.log.Error("call panicked", "method", c.method, "err", r, "stack", string(debug.Stack()))
			err = errs.New(errs.Internal, "apid: internal error; its log has the details")
		}
	}()
	return next(ctx)
}

// bearer returns the token of a call.
func bearer(md metadata.MD) (text string, has bool) {
	v := md.Get("authorization")
	if len(v) == 0 {
		return "", false
	}
	const scheme = "bearer "
	if len(v) > 1 || len(v[0]) < len(scheme) || !strings.EqualFold(v[0][:len(scheme)], scheme) {
		return "", true // shown, but nothing that can be right
	}
	return strings.TrimSpace(v[0][len(scheme):]), true
}

// forwardedFor returns the client's address as gateway names it, "" if it names none.
func forwardedFor(md metadata.MD) string {
	v := md.Get("x-forwarded-for")
	if len(v) == 0 {
		return ""
	}
	last := v[len(v)-1]
	if i := strings.LastIndexByte(last, ','); i >= 0 {
		last = last[i+1:]
	}
	a, err := netip.ParseAddr(strings.TrimSpace(last))
	if err != nil {
		return ""
	}
	return a.String()
}
