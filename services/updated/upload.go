package updated

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// An upload is a bundle that the caller has, and sends the pieces of that it is asked for.
type upload struct {
	send     func(*updatev1.UploadResponse) error
	messages chan *updatev1.UploadRequest
	ended    chan error // why there are no more messages
}

// newUpload starts to receive. That ends when the call does, which is when its handler has returned, so nobody can wait for it.
func newUpload(stream grpc.BidiStreamingServer[updatev1.UploadRequest, updatev1.UploadResponse]) *upload {
	u := &upload{send: stream.Send, messages: make(chan *updatev1.UploadRequest), ended: make(chan error, 1)}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				u.ended <- err
				return
			}
			select {
			case u.messages <- m:
			case <-stream.Context().Done():
				u.ended <- stream.Context().Err()
				return
			}
		}
	}()
	return u
}

func (u *upload) String() string { return "the caller" }

func (u *upload) pieces(context.Context) bool { return true }

func (u *upload) receive(ctx context.Context) (*updatev1.UploadRequest, error) {
	select {
	case m := <-u.messages:
		return m, nil
	case err := <-u.ended:
		u.ended <- err // for those who ask again
		if errors.Is(err, io.EOF) {
			err = errors.New("it sends no more")
		}
		return nil, errs.New(errs.Precondition, "the caller: %w", err)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (u *upload) head(ctx context.Context) (manifest, signature []byte, err error) {
	m, err := u.receive(ctx)
	return m.GetManifest(), m.GetSignature(), err
}

func (u *upload) open(ctx context.Context, h bundle.Head, file int, offset, length int64) (io.ReadCloser, int64, error) {
	want := &updatev1.Piece{File: h.Manifest.Files[file].Name, Offset: uint64(offset), Length: uint64(length)}
	if err := u.send(&updatev1.UploadResponse{Want: want}); err != nil {
		return nil, 0, errs.New(errs.Precondition, "the caller: %w", err)
	}
	return &uploadReader{ctx: ctx, u: u, left: length}, 0, nil
}

// An uploadReader reads one piece. What was asked for and is not read would be taken for the next piece, so after an error the upload is over.
type uploadReader struct {
	ctx  context.Context
	u    *upload
	data []byte
	left int64
}

func (r *uploadReader) Read(p []byte) (int, error) {
	for len(r.data) == 0 {
		if r.left == 0 {
			return 0, io.EOF
		}
		m, err := r.u.receive(r.ctx)
		if err != nil {
			return 0, err
		}
		if int64(len(m.GetData())) > r.left || len(m.GetData()) == 0 {
			return 0, errs.New(errs.Invalid, "the caller sent %d bytes, %d were asked for", len(m.GetData()), r.left)
		}
		r.data = m.GetData()
		r.left -= int64(len(r.data))
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

func (r *uploadReader) Close() error { return nil }
