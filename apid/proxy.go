package apid

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that raw falls back to
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

const (
	// leastTime is what a call must have left when it arrives: with less it would only make work.
	leastTime = 5 * time.Millisecond
	// unaryTime bounds calls whose caller sets no deadline.
	unaryTime = 2 * time.Minute
	// backendWindow is how much a daemon may send ahead of a slow client, per call and per daemon.
	backendWindow     = 128 << 10
	backendConnWindow = 1 << 20
)

// backendOptions are those of connections to daemons.
func backendOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(daemon.MaxMessage), grpc.MaxCallSendMsgSize(daemon.MaxMessage)),
		grpc.WithInitialWindowSize(backendWindow), grpc.WithInitialConnWindowSize(backendConnWindow),
	}
}

// frame is one message as it came from the wire. It is sent exactly once, which passes its buffers on.
type frame struct{ data mem.BufferSlice }

// raw is a codec that leaves frames alone and knows protobuf for all else (health, reflection, claim, unlock).
type raw struct{ proto encoding.CodecV2 }

func newRaw() raw { return raw{encoding.GetCodecV2("proto")} }

func (c raw) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*frame); ok {
		return f.data, nil
	}
	return c.proto.Marshal(v)
}

func (c raw) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*frame); ok {
		data.Ref() // grpc frees its own reference when this returns; sending frees this one
		f.data = data
		return nil
	}
	return c.proto.Unmarshal(data, v)
}

func (raw) Name() string { return "proto" }

// forward is the handler of all methods that apid does not serve itself. The interceptor has let the call in. When stop is done,
// streams end, for some of them only end when the client does, and would hold up the end of apid.
func (d *Daemon) forward(stop context.Context, in grpc.ServerStream) error {
	c := callFrom(in.Context())
	if c == nil || c.route.daemon == "" && c.aim.here() {
		return errNoMethod
	}
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	streams := c.route.stream.ServerStreams || c.route.stream.ClientStreams
	if _, ok := ctx.Deadline(); !ok && !streams {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, unaryTime)
		defer cancel()
	}
	if streams {
		defer context.AfterFunc(stop, cancel)()
	} else {
		var cancel context.CancelFunc
		ctx, cancel = early(ctx)
		defer cancel()
	}
	start := time.Now()
	err := d.pass(ctx, in, c, cancel)
	if !streams && ctx.Err() != nil && in.Context().Err() == nil {
		err = c.unanswered(err, time.Since(start))
	}
	if c.proved.node != "" { // here it was repeated if it may be: a node that repeated it once more, for a daemon that has nothing else to say, would make 25 of one
		err = tried(ctx, err)
	}
	if err != nil && streams && stop.Err() != nil && in.Context().Err() == nil {
		return errs.New(errs.Unavailable, "apid is stopping; try again")
	}
	return err
}

// A call ends here a little before its time is up, a tenth of what is left but no more than ownWord: a client whose time is up hears nothing any more, least of all
// who did not answer.
const ownWord = 500 * time.Millisecond

func early(ctx context.Context) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, end.Add(-min(ownWord, time.Until(end)/10)))
}

// unanswered is the error of a call whose time is up: it names who did not answer. If that is another node, its apid, or the way to it, has named it.
func (c *call) unanswered(err error, took time.Duration) error {
	if !c.aim.here() {
		return err
	}
	return status.Errorf(codes.DeadlineExceeded, "%s has not answered for %s; bhctl why tells whether it hangs", c.route.daemon, took.Round(100*time.Millisecond))
}

// pass moves a call's messages between the client and whoever answers.
func (d *Daemon) pass(ctx context.Context, in grpc.ServerStream, c *call, cancel context.CancelFunc) error {
	switch {
	case c.bound:
		return d.forwardBound(ctx, in, c)
	case c.aim.any:
		return d.forwardAny(ctx, in, c)
	case c.aim.node != nil:
		r, err := d.reach(ctx, c.aim.node)
		if err != nil {
			return tried(ctx, err)
		}
		defer d.pool.give(r)
		out, err := d.openAt(ctx, c, r)
		if err == nil {
			err = converse(in, out, c, cancel)
		}
		return r.blame(err)
	}
	slot, err := d.conns[c.route.daemon].take()
	if err != nil {
		return err
	}
	defer d.conns[c.route.daemon].give(slot)
	out, err := open(ctx, c, slot)
	if err != nil {
		return err
	}
	return converse(in, out, c, cancel)
}

// converse moves all messages of a call that has been opened, and the answer's status.
func converse(in grpc.ServerStream, out grpc.ClientStream, c *call, cancel context.CancelFunc) error {
	if c.route.stream.ClientStreams {
		return both(in, out, cancel)
	}
	if err := pass(in, out); err != nil {
		return err
	}
	if c.route.stream.ServerStreams {
		return answers(in, out)
	}
	return pass(out, in)
}

// open starts the call to the daemon, in the name of the caller. Nothing else of the client's metadata is passed on.
func open(ctx context.Context, c *call, s *slot, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	md := metadata.MD{peer.CallerKey: {c.who.name}}
	md.Append(peer.RolesKey, c.who.roles...)
	return s.conn.NewStream(metadata.NewOutgoingContext(ctx, md), &c.route.stream, c.route.name(), append(opts, grpc.ForceCodecV2(newRaw()))...)
}

type receiver interface{ RecvMsg(any) error }
type sender interface{ SendMsg(any) error }

// pass moves one message. io.EOF means that there are no more, or that the other side has ended: its RecvMsg says why.
func pass(from receiver, to sender) error {
	var f frame
	if err := from.RecvMsg(&f); err != nil {
		return err
	}
	if err := to.SendMsg(&f); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

// answers moves all messages of the daemon to the client, and then its status.
func answers(in grpc.ServerStream, out grpc.ClientStream) error {
	for {
		if err := pass(out, in); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// both moves messages in both directions at once.
func both(in grpc.ServerStream, out grpc.ClientStream, cancel context.CancelFunc) error {
	go func() {
		for {
			if err := pass(in, out); errors.Is(err, io.EOF) {
				if out.CloseSend() != nil {
					cancel()
				}
				return
			} else if err != nil { // the client is gone
				cancel()
				return
			}
		}
	}()
	// The pump is not waited for: it ends when grpc ends the incoming stream, which is after this returned.
	return answers(in, out)
}

// codeOf returns the status code under which an outcome is counted and logged.
func codeOf(err error) codes.Code {
	if errors.Is(err, context.Canceled) {
		return codes.Canceled
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return codes.DeadlineExceeded
	}
	return status.Code(err)
}
