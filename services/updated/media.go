package updated

import (
	"context"
	"io"
	"strings"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// autoMedia finds the device by itself, if there is one only.
const autoMedia = "auto"

// A medium is a bundle at the start of a block device. storaged reads it: updated may open no device.
type medium struct {
	slots  slotv1.SlotsClient
	device string
}

func (m *medium) String() string { return m.device }

func (m *medium) pieces(context.Context) bool { return true }

func (m *medium) head(ctx context.Context) (manifest, signature []byte, err error) {
	if m.device == autoMedia {
		r, err := m.slots.FindMedia(ctx, &slotv1.FindMediaRequest{})
		switch {
		case err != nil:
			return nil, nil, err
		case len(r.GetDevices()) == 0:
			return nil, nil, errs.New(errs.NotFound, "no device starts with an update bundle")
		case len(r.GetDevices()) > 1:
			return nil, nil, errs.New(errs.Precondition, "more than one device starts with an update bundle: %s; name one", strings.Join(r.GetDevices(), ", "))
		}
		m.device = r.GetDevices()[0]
	}
	manifest, signature, err = bundle.ReadHead(io.NewSectionReader(mediumAt{ctx, m}, 0, bundle.HeadSize(bundle.MaxManifest)+512))
	if errs.Of(err) != errs.Internal { // storaged's word
		return nil, nil, err
	}
	return manifest, signature, headError(err)
}

func (m *medium) open(ctx context.Context, h bundle.Head, file int, offset, length int64) (io.ReadCloser, int64, error) {
	return io.NopCloser(io.NewSectionReader(mediumAt{ctx, m}, h.Offsets()[file]+offset, length)), 0, nil
}

// mediumAt reads from the device, over the socket.
type mediumAt struct {
	ctx context.Context
	m   *medium
}

func (r mediumAt) ReadAt(p []byte, at int64) (int, error) {
	r2, err := r.m.slots.ReadMedia(r.ctx, &slotv1.ReadMediaRequest{Device: r.m.device, Offset: uint64(at), Length: uint32(min(len(p), maxWrite))})
	if err != nil {
		return 0, err
	}
	n := copy(p, r2.GetData())
	if n < len(p) && n < maxWrite {
		return n, io.EOF
	}
	if n < len(p) {
		more, err := r.ReadAt(p[n:], at+int64(n))
		return n + more, err
	}
	return n, nil
}
