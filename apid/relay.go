package apid

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// anyTime bounds how long one control plane may take to answer a daemon's call while there are others to ask.
const anyTime = 5 * time.Second

// reach returns an open connection to a node. The caller gives it back to the pool.
func (d *Daemon) reach(ctx context.Context, node *trustv1.ClusterNode) (*remote, error) {
	r, err := d.pool.take(node)
	if err != nil {
		return nil, err
	}
	if err := r.ready(ctx); err != nil {
		d.pool.give(r)
		if errs.Is(err, errs.Unavailable) && ctx.Err() == nil && r.told.CompareAndSwap(false, true) { // once, however often it is called
			daemon.Tell(d.log, daemon.EventCluster, "no answer of "+node.GetName(), errs.Text(err))
		}
		return nil, err
	}
	r.told.Store(false)
	return r, nil
}

// tried tells the client's grpc not to repeat a call for a node that does not answer: that has been waited for here. A client may of course call again.
func tried(ctx context.Context, err error) error {
	if status.Code(err) == codes.Unavailable {
		_ = grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", "-1")) // it fails if the client is gone
	}
	return err
}

// openAt starts the call at another node's apid: with this node's certificate, in the name of the caller, and never to be passed on again.
func (d *Daemon) openAt(ctx context.Context, c *call, r *remote) (grpc.ClientStream, error) {
	return r.conn.NewStream(outgoing(ctx, c, r), &c.route.stream, c.route.name(), grpc.ForceCodecV2(newRaw()))
}

// outgoing is the metadata of a call to another node. A call of this node's own daemons needs no caller: the certificate says it.
func outgoing(ctx context.Context, c *call, r *remote) context.Context {
	md := metadata.MD{peer.NodeKey: {r.node.GetName()}, peer.HopKey: {"1"}}
	if c.local == "" {
		md.Set(peer.CallerKey, c.who.name)
		md.Append(peer.RolesKey, c.who.roles...)
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// blame names the node in errors that may come from the way to it.
func (r *remote) blame(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	s := status.Convert(err)
	where := fmt.Sprintf("node %q (%s)", r.node.GetName(), strings.Join(r.node.GetAddresses(), ", "))
	switch {
	case r.gone.Load():
		return errs.New(errs.Unavailable, "%s is not in the cluster any more", where)
	case s.Code() == codes.Unavailable:
		return errs.New(errs.Unavailable, "%s: %s", where, s.Message())
	case s.Code() == codes.Unauthenticated: // the caller's credentials are good: this is about ours
		return errs.New(errs.Unavailable, "%s does not accept this node's certificate: its clock may be wrong, or it does not know this node yet; it says: %s", where, s.Message())
	case s.Code() == codes.DeadlineExceeded:
		return status.Error(codes.DeadlineExceeded, where+": "+s.Message())
	}
	return err
}

// relay makes at another node a call that has been decoded, since apid serves its method itself (health).
func (d *Daemon) relay(ctx context.Context, c *call, req any) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, unaryTime)
	defer cancel()
	r, err := d.reach(ctx, c.aim.node)
	if err != nil {
		return nil, tried(ctx, err)
	}
	defer d.pool.give(r)
	m, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(c.route.service + "." + c.route.method))
	if err != nil {
		return nil, err
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(m.(protoreflect.MethodDescriptor).Output().FullName())
	if err != nil {
		return nil, err
	}
	answer := kind.New().Interface()
	return answer, r.blame(r.conn.Invoke(outgoing(ctx, c, r), c.route.name(), req.(proto.Message), answer))
}

// forwardAny is for calls of this node's daemons to whichever control plane answers: this node first if it is one, then the one that answered last.
// The next is asked if one cannot answer, and if doing the call twice is as good as once or it was not begun.
func (d *Daemon) forwardAny(ctx context.Context, in grpc.ServerStream, c *call) error {
	if c.route.stream.ClientStreams {
		return errs.New(errs.Invalid, "%s: streams from the caller go to one node only; name it", c.route.name())
	}
	var f frame
	if err := in.RecvMsg(&f); err != nil {
		return err
	}
	request := f.data.Materialize()
	f.data.Free()
	last, _ := d.prefer.Get()
	nodes := candidates(c.roots.State, last)
	var all []string
	for i, n := range nodes {
		begun, err := d.attempt(ctx, in, c, n, request, i == len(nodes)-1)
		if err == nil {
			d.prefer.Set(n.GetName())
			return nil
		}
		all = append(all, n.GetName()+": "+status.Convert(err).Message())
		// A caller that has less time than one attempt takes would never get to the next; that one's apid says so a little before this node's.
		if cannot(err) || status.Code(err) == codes.DeadlineExceeded || ctx.Err() != nil {
			d.prefer.Set(nodes[(i+1)%len(nodes)].GetName())
		}
		if begun || !cannot(err) || ctx.Err() != nil {
			return err
		}
	}
	if len(nodes) == 0 {
		all = []string{"none is known yet"}
	}
	return tried(ctx, errs.New(errs.Unavailable, "no control plane can answer: %s", strings.Join(all, "; ")))
}

// cannot reports whether another control plane may be able to do what one refused: that one is away, or has not heard of this node.
func cannot(err error) bool {
	c := status.Code(err)
	return c == codes.Unavailable || c == codes.Unauthenticated
}

// candidates are the control planes in the order in which a daemon's call tries them. Each node begins elsewhere, so that they do not all ask the first. It is pure.
func candidates(trust *trustv1.TrustState, last string) []*trustv1.ClusterNode {
	var others, out []*trustv1.ClusterNode
	own := &trustv1.ClusterNode{Name: trust.GetNodeName()}
	for _, n := range trust.GetNodes() {
		switch {
		case n.GetRole() != controlPlane || n.GetName() == own.GetName():
		case n.GetName() == last:
			out = append(out, n)
		default:
			others = append(others, n)
		}
	}
	if trust.GetNodeRole() == controlPlane {
		out = append([]*trustv1.ClusterNode{own}, out...)
	}
	if len(others) > 0 {
		h := fnv.New32a()
		_, _ = h.Write([]byte(own.GetName())) // a hash takes everything
		k := int(h.Sum32() % uint32(len(others)))
		out = append(append(out, others[k:]...), others[:k]...)
	}
	return out
}

// attempt makes the call at one control plane, which is this node if its name is. begun says that it must not be made elsewhere.
func (d *Daemon) attempt(ctx context.Context, in grpc.ServerStream, c *call, n *trustv1.ClusterNode, request []byte, only bool) (begun bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	late := errs.New(errs.Unavailable, "no answer within %s", anyTime)
	stop := func() bool { return true }
	if !only {
		stop = time.AfterFunc(anyTime, cancel).Stop
	}
	var out grpc.ClientStream
	if n.GetName() == c.roots.State.GetNodeName() {
		slot, e := d.conns[c.route.daemon].take()
		if e != nil {
			return false, e
		}
		defer d.conns[c.route.daemon].give(slot)
		out, err = open(ctx, c, slot, grpc.WaitForReady(only))
	} else {
		r, e := d.reach(ctx, n)
		if e != nil {
			return false, e
		}
		defer d.pool.give(r)
		out, err = d.openAt(ctx, c, r)
	}
	if err == nil {
		err = out.SendMsg(&frame{mem.BufferSlice{mem.SliceBuffer(request)}})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	var f frame
	err = out.RecvMsg(&f)
	if !stop() && err != nil { // the time was up
		err = late
	}
	if err != nil {
		return !peer.Repeatable(c.route.name()), err
	}
	if err := in.SendMsg(&f); err != nil || !c.route.stream.ServerStreams {
		return true, err
	}
	return true, answers(in, out)
}
