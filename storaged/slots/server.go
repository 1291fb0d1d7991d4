package slots

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Limits of a call.
const (
	maxPiece = 1 << 20 // bytes of one write or read
	tellTime = 200 * time.Millisecond
)

// Server is slot.v1 for updated.
type Server struct {
	slotv1.UnimplementedSlotsServer
	Store *Store
	Linux *Linux
}

// Get is as in the proto.
func (s *Server) Get(ctx context.Context, _ *slotv1.GetRequest) (*slotv1.GetResponse, error) {
	r, err := s.Store.Get(ctx)
	if err != nil {
		return nil, err
	}
	return response(r), nil
}

func response(r Report) *slotv1.GetResponse {
	out := &slotv1.GetResponse{Epoch: uint32(r.Epoch), EpochFloor: uint32(r.Floor), EpochKept: r.Kept}
	for _, v := range r.Slots {
		n := v.Entry.Name
		out.Slots = append(out.Slots, &slotv1.Slot{
			Name: v.Label, RootHash: v.Root.String(), Status: string(v.Status), Running: v.Running, Next: v.Next, Version: n.Version,
			Sequence: uint32(n.Sequence), TriesLeft: uint32(n.Left), TriesDone: uint32(n.Done), Epoch: uint32(v.Entry.Epoch), File: v.Entry.File,
		})
	}
	return out
}

// teller passes progress on, a few times a second at most.
func teller(send func(*slotv1.Progress)) func(Progress) {
	var last time.Time
	return func(p Progress) {
		if now := time.Now(); p.Done == p.Total || now.Sub(last) >= tellTime {
			last = now
			send(&slotv1.Progress{Step: p.Step, DoneBytes: uint64(p.Done), TotalBytes: uint64(p.Total)})
		}
	}
}

// Begin is as in the proto.
func (s *Server) Begin(r *slotv1.BeginRequest, out grpc.ServerStreamingServer[slotv1.BeginResponse]) error {
	number, missing, err := s.Store.Begin(out.Context(), r.GetManifest(), r.GetSignature(), teller(func(p *slotv1.Progress) {
		_ = out.Send(&slotv1.BeginResponse{Progress: p}) // a caller that left ends the context
	}))
	if err != nil {
		return err
	}
	last := &slotv1.BeginResponse{Session: number}
	for _, m := range missing {
		last.Missing = append(last.Missing, &slotv1.Range{File: uint32(m.File), First: uint32(m.First), Count: uint32(m.Count)})
	}
	return out.Send(last)
}

// WriteChunks is as in the proto.
func (s *Server) WriteChunks(_ context.Context, r *slotv1.WriteChunksRequest) (*slotv1.WriteChunksResponse, error) {
	if len(r.GetData()) > maxPiece {
		return nil, errs.New(errs.Invalid, "data: %d bytes; at most %d are allowed", len(r.GetData()), maxPiece)
	}
	return &slotv1.WriteChunksResponse{}, s.Store.WriteChunks(r.GetSession(), int(r.GetFile()), int(r.GetFirst()), r.GetData())
}

// Commit is as in the proto.
func (s *Server) Commit(r *slotv1.CommitRequest, out grpc.ServerStreamingServer[slotv1.CommitResponse]) error {
	version, err := s.Store.Commit(out.Context(), r.GetSession(), teller(func(p *slotv1.Progress) {
		_ = out.Send(&slotv1.CommitResponse{Progress: p})
	}))
	if err != nil {
		return err
	}
	return out.Send(&slotv1.CommitResponse{Version: version})
}

// Abort is as in the proto.
func (s *Server) Abort(_ context.Context, r *slotv1.AbortRequest) (*slotv1.AbortResponse, error) {
	s.Store.Abort(r.GetSession())
	return &slotv1.AbortResponse{}, nil
}

// MarkGood is as in the proto.
func (s *Server) MarkGood(ctx context.Context, r *slotv1.MarkGoodRequest) (*slotv1.GetResponse, error) {
	report, err := s.Store.MarkGood(ctx, r.GetOverride())
	if err != nil {
		return nil, err
	}
	return response(report), nil
}

// Rollback is as in the proto.
func (s *Server) Rollback(ctx context.Context, _ *slotv1.RollbackRequest) (*slotv1.RollbackResponse, error) {
	version, restart, err := s.Store.Rollback(ctx)
	if err != nil {
		return nil, err
	}
	return &slotv1.RollbackResponse{Version: version, Restart: restart}, nil
}

// FindMedia is as in the proto.
func (s *Server) FindMedia(context.Context, *slotv1.FindMediaRequest) (*slotv1.FindMediaResponse, error) {
	all, err := s.Linux.media()
	return &slotv1.FindMediaResponse{Devices: all}, err
}

// ReadMedia is as in the proto. It looks for the bundle each time: a device may have been exchanged.
func (s *Server) ReadMedia(_ context.Context, r *slotv1.ReadMediaRequest) (*slotv1.ReadMediaResponse, error) {
	if r.GetLength() > maxPiece || r.GetOffset() > 1<<40 {
		return nil, errs.New(errs.Invalid, "length: %d bytes at %d; at most %d are allowed", r.GetLength(), r.GetOffset(), maxPiece)
	}
	all, err := s.Linux.media()
	if err != nil {
		return nil, err
	}
	if !slices.Contains(all, r.GetDevice()) {
		text := "no device starts with an update bundle"
		if len(all) > 0 {
			text = "these start with an update bundle: " + strings.Join(all, ", ")
		}
		return nil, errs.New(errs.NotFound, "%.80q is not fit to be read; %s", r.GetDevice(), text)
	}
	f, err := os.Open(r.GetDevice())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, r.GetLength())
	n, err := f.ReadAt(b, int64(r.GetOffset()))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, errs.New(errs.Unavailable, "%w", err)
	}
	return &slotv1.ReadMediaResponse{Data: b[:n]}, nil
}
