package apid

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
)

const (
	maxClaims  = 64   // calls that need no identity, at once, until somebody has believed their proof
	maxWatches = 1024 // nodes that follow the cluster, at once
	// workTime is how long a daemon may work at one of them before the connection of a caller without an identity ends; bhctl unlock waits as long.
	workTime = 3 * time.Minute
)

// labels are those of the TLS exporter (RFC 8446 section 7.5) for the methods that nodes call at others before they have a certificate.
var labels = map[string]string{
	trustv1.Join_Join_FullMethodName:             join.Label,
	trustv1.Nodes_SignForNode_FullMethodName:     join.NodeLabel,
	trustv1.Nodes_WatchCluster_FullMethodName:    join.NodeLabel,
	trustv1.Nodes_ConfirmRotation_FullMethodName: join.NodeLabel,
	trustv1.Join_Challenge_FullMethodName:        attest.Label,
	trustv1.Join_JoinAttested_FullMethodName:     attest.Label,
}

// bindingOf returns what ties a method's proof to the connection of its caller.
func bindingOf(r *route, s tls.ConnectionState) ([]byte, error) {
	switch {
	case labels[r.name()] != "":
		return join.Binding(s, labels[r.name()])
	case r.service == trustv1.Claim_ServiceDesc.ServiceName:
		return claim.Binding(s)
	}
	return unlock.Binding(s)
}

// forwardBound puts the binding of the caller's TLS connection into a claim, an unlocking or a join, and the caller's address where it is wanted:
// that, and not what a caller sends, counts.
func (d *Daemon) forwardBound(ctx context.Context, in grpc.ServerStream, c *call) error {
	if c.conn == nil {
		return errStranger
	}
	select {
	case d.claims <- struct{}{}:
	default:
		return errs.New(errs.Exhausted, "too many calls without an identity at once; try again")
	}
	done := func() { <-d.claims }
	defer func() { done() }()
	binding, err := bindingOf(c.route, c.conn.state)
	if err != nil {
		return fmt.Errorf("%s: %w", c.route.name(), err)
	}
	slot, err := d.conns[c.route.daemon].take()
	if err != nil {
		return err
	}
	defer d.conns[c.route.daemon].give(slot)
	b := bound{ctx: ctx, in: in, conn: slot.conn, gate: c.conn.conn, binding: binding, remote: addressOf(c.peer)}
	if c.route.name() == trustv1.Nodes_WatchCluster_FullMethodName {
		err = b.watch(func() error { // it lasts, and must not keep those out who only join
			select {
			case d.watch <- struct{}{}:
			default:
				return errs.New(errs.Exhausted, "%d nodes follow the cluster through this one already, which is the limit; ask another control plane", maxWatches)
			}
			done()
			done = func() { <-d.watch }
			c.know()
			return nil
		})
		return err
	}
	if err = b.unary(c.route.name()); err == nil {
		c.know()
	}
	return err
}

// know lets the connection of a call whose proof was believed keep its place.
func (c *call) know() {
	if c.conn.conn != nil && labels[c.route.name()] != "" {
		c.conn.conn.Know()
	}
}

// addressOf returns the IP address in "address:port"; "" if there is none.
func addressOf(hostPort string) string {
	a, err := netip.ParseAddrPort(hostPort)
	if err != nil {
		return ""
	}
	return a.Addr().Unmap().WithZone("").String()
}

// bound is one call whose request gets what ties it to its connection.
type bound struct {
	ctx     context.Context // of the call
	in      grpc.ServerStream
	conn    *grpc.ClientConn // to the daemon
	gate    *gate.Conn       // from the caller; nil: it came through no gate
	binding []byte
	remote  string
}

// unary makes one of the calls with one answer.
func (b bound) unary(method string) error {
	switch method {
	case trustv1.Claim_Claim_FullMethodName:
		return answer(b, trustv1.NewClaimClient(b.conn).Claim, func(r *trustv1.ClaimRequest) { r.ChannelBinding = b.binding })
	case trustv1.Claim_JoinCluster_FullMethodName:
		return answer(b, trustv1.NewClaimClient(b.conn).JoinCluster, func(r *trustv1.JoinClusterRequest) { r.ChannelBinding = b.binding })
	case storagev1.Unlock_Challenge_FullMethodName:
		return answer(b, storagev1.NewUnlockClient(b.conn).Challenge, func(r *storagev1.ChallengeRequest) { r.ChannelBinding = b.binding })
	case storagev1.Unlock_Unlock_FullMethodName:
		return answer(b, storagev1.NewUnlockClient(b.conn).Unlock, func(r *storagev1.UnlockRequest) { r.ChannelBinding = b.binding })
	case trustv1.Join_Join_FullMethodName:
		return answer(b, trustv1.NewJoinClient(b.conn).Join, func(r *trustv1.JoinRequest) { r.ChannelBinding, r.RemoteAddress = b.binding, b.remote })
	case trustv1.Join_Challenge_FullMethodName:
		return answer(b, trustv1.NewJoinClient(b.conn).Challenge, func(r *trustv1.AttestChallengeRequest) { r.RemoteAddress = b.remote })
	case trustv1.Join_JoinAttested_FullMethodName:
		return answer(b, trustv1.NewJoinClient(b.conn).JoinAttested, func(r *trustv1.JoinAttestedRequest) {
			if r.Join == nil {
				r.Join = &trustv1.JoinRequest{}
			}
			r.Join.ChannelBinding, r.Join.RemoteAddress = b.binding, b.remote
		})
	case trustv1.Nodes_SignForNode_FullMethodName:
		return answer(b, trustv1.NewNodesClient(b.conn).SignForNode, func(r *trustv1.SignForNodeRequest) { r.Proof = b.proof(r.GetProof()) })
	case trustv1.Nodes_ConfirmRotation_FullMethodName:
		return answer(b, trustv1.NewNodesClient(b.conn).ConfirmRotation, func(r *trustv1.ConfirmRotationRequest) { r.Proof = b.proof(r.GetProof()) })
	}
	return errNoMethod
}

// proof is a node's, with what apid knows.
func (b bound) proof(sent *trustv1.NodeProof) *trustv1.NodeProof {
	if sent == nil {
		sent = &trustv1.NodeProof{}
	}
	sent.ChannelBinding, sent.RemoteAddress = b.binding, b.remote
	return sent
}

// message is a pointer to a message of protobuf.
type message[T any] interface {
	*T
	proto.Message
}

// answer receives the request, completes it, makes the call, and sends the answer.
func answer[T any, R message[T], A proto.Message](b bound, do func(context.Context, R, ...grpc.CallOption) (A, error), complete func(R)) error {
	r := R(new(T))
	if err := b.in.RecvMsg(r); err != nil {
		return err
	}
	complete(r)
	release := func() {}
	if b.gate != nil { // opening volumes takes a slow machine longer than strangers have
		release = b.gate.Hold(workTime) // around this only: how long all else takes is up to the caller
	}
	a, err := do(b.ctx, r)
	release()
	if err != nil {
		return err
	}
	return b.in.SendMsg(a)
}

// watch passes on what trustd says about the cluster; believed is called before the first answer, which shows that the proof was good.
func (b bound) watch(believed func() error) error {
	r := &trustv1.WatchClusterRequest{}
	if err := b.in.RecvMsg(r); err != nil {
		return err
	}
	r.Proof = b.proof(r.GetProof())
	out, err := trustv1.NewNodesClient(b.conn).WatchCluster(b.ctx, r)
	for first := true; err == nil; first = false {
		var s *trustv1.TrustState
		if s, err = out.Recv(); err != nil {
			break
		}
		if first {
			if err := believed(); err != nil {
				return err
			}
		}
		err = b.in.SendMsg(s)
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
