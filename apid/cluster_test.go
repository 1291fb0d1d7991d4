package apid

import (
	"context"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// cluster is several nodes in one process, with one authority. Their addresses exist in it only.
type cluster struct {
	t     testing.TB
	f     *fakeTrustd // whose keys all have
	nodes map[string]*node

	mu    sync.Mutex
	state *trustv1.TrustState                                // guarded by mu; what all nodes know
	at    map[string]func(context.Context) (net.Conn, error) // guarded by mu; by "address:port"
	dials map[string]int                                     // guarded by mu
}

// newCluster starts nodes: a name that begins with "w" is a worker. Every node's machined answers GetVersion with the node's name and who called.
func newCluster(t testing.TB, names ...string) *cluster {
	t.Helper()
	f := newFakeTrustd(t)
	f.own()
	c := &cluster{t: t, f: f, nodes: map[string]*node{}, at: map[string]func(context.Context) (net.Conn, error){}, dials: map[string]int{}}
	c.state, _ = f.state.Get()
	for i, name := range names {
		c.state.Nodes = append(c.state.Nodes, &trustv1.ClusterNode{Name: name, Role: roleOf(name), Addresses: []string{fmt.Sprintf("10.5.0.%d", 11+i)}, Key: name})
	}
	for i, name := range names {
		own := &fakeTrustd{t: t, ca: f.ca, token: f.token}
		own.state.Set(c.known(name))
		n := bareNode(t, own, c.dial)
		n.serve(n.bind("trustd"), func(s *grpc.Server) { trustv1.RegisterSignerServer(s, own) })
		c.nodes[name] = n
		c.place(fmt.Sprintf("10.5.0.%d", 11+i), n.address)
		n.start()
		_, err := n.daemon.far.Wait(n.ctx())
		n.must(err)
	}
	return c
}

func roleOf(name string) string {
	if strings.HasPrefix(name, "w") {
		return "worker"
	}
	return controlPlane
}

// known is what one node is told.
func (c *cluster) known(name string) *trustv1.TrustState {
	s := proto.Clone(c.state).(*trustv1.TrustState)
	s.NodeName, s.NodeRole = name, roleOf(name)
	return s
}

// tell changes what all nodes know.
func (c *cluster) tell(change func(*trustv1.TrustState)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c.state)
	for name, n := range c.nodes {
		n.trustd.state.Set(c.known(name))
	}
}

// place makes a node's address lead to another one.
func (c *cluster) place(ip, address string) {
	c.answer(ip, func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "tcp", address) })
}

func (c *cluster) answer(ip string, dial func(context.Context) (net.Conn, error)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at[net.JoinHostPort(ip, client.Port)] = dial
}

func (c *cluster) dial(ctx context.Context, _, address string) (net.Conn, error) {
	c.mu.Lock()
	dial := c.at[address]
	c.dials[address]++
	c.mu.Unlock()
	if dial == nil {
		return (&net.Dialer{}).DialContext(ctx, "tcp", address)
	}
	return dial(ctx)
}

func (c *cluster) dialled(ip string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dials[net.JoinHostPort(ip, client.Port)]
}

// machines starts every node's machined.
func (c *cluster) machines() {
	for name, n := range c.nodes {
		n.machined(&fakeMachined{version: func(ctx context.Context) (*machinev1.GetVersionResponse, error) {
			who := peer.CallerFrom(ctx)
			return &machinev1.GetVersionResponse{Version: name, Platform: who.Name + " " + strings.Join(who.Roles, ",")}, nil
		}})
	}
}

// admin is an administrator's connection to a node.
func (c *cluster) admin(name string, opts ...grpc.DialOption) *grpc.ClientConn {
	return c.nodes[name].dial(c.f.certificate(c.f.ca, "ann", "admin", -time.Minute, time.Hour), opts...)
}

// asNode is a connection with the certificate of a node's apid.
func (c *cluster) asNode(to, name, role string) *grpc.ClientConn {
	return c.nodes[to].dial(c.f.holder(c.f.ca, nodeSubject(name, role), -time.Minute, time.Hour))
}

// holding is a connection with any certificate of the cluster's authority.
func (c *cluster) holding(to string, subject pkix.Name) *grpc.ClientConn {
	return c.nodes[to].dial(c.f.holder(c.f.ca, subject, -time.Minute, time.Hour))
}

// on names the node that is to answer.
func on(ctx context.Context, name string) context.Context { return client.OnNode(ctx, name) }

func version(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	r, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
	return r.GetVersion() + ": " + r.GetPlatform(), err
}

func with(ctx context.Context, kv ...string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, kv...)
}

// audits are the lines of a node's audit log.
func (n *node) audits() []string {
	var out []string
	for l := range strings.SplitSeq(n.log.String(), "\n") {
		if strings.Contains(l, "msg=audit") {
			out = append(out, l)
		}
	}
	return out
}
