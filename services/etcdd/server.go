package etcdd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// chunk is the size of a snapshot's pieces, in bytes; the proto promises it.
const chunk = 64 << 10

// snapshotTime is the longest that one snapshot may take; a client that does not read must not hold a read transaction for ever.
const snapshotTime = 30 * time.Minute

type server struct {
	etcdv1.UnimplementedEtcdServer
	d *Daemon
}

// StreamSnapshot reads through etcd's maintenance API, which needs no room on the disk, or one of the node's own snapshots.
func (s *server) StreamSnapshot(r *etcdv1.StreamSnapshotRequest, out grpc.ServerStreamingServer[etcdv1.Chunk]) error {
	if r.GetName() != "" {
		f, err := s.d.keeper.open(r.GetName())
		if err != nil {
			return err
		}
		defer f.Close()
		return send(out, f)
	}
	if err := s.d.kernel.pass(out.Context()); err != nil {
		return err
	}
	_, client := s.d.kernel.running()
	if client == nil {
		return errs.New(errs.Unavailable, "snapshot: the etcd member does not run: %s", s.d.loop.State().GetError())
	}
	done, err := s.d.keeper.alone(out.Context())
	if err != nil {
		return errs.New(errs.Of(err), "snapshot: %w", err)
	}
	defer done()
	ctx, cancel := context.WithTimeout(out.Context(), snapshotTime)
	defer cancel()
	db, err := client.Snapshot(ctx)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	defer db.Close()
	return send(out, db)
}

func send(out grpc.ServerStreamingServer[etcdv1.Chunk], r io.Reader) error {
	for {
		buf := make([]byte, chunk) // grpc may still hold the last one
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			if e := out.Send(&etcdv1.Chunk{Data: buf[:n]}); e != nil {
				return e
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("snapshot: %w", err)
		}
	}
}

// ListSnapshots says what the schedule has made.
func (s *server) ListSnapshots(context.Context, *etcdv1.ListSnapshotsRequest) (*etcdv1.ListSnapshotsResponse, error) {
	return s.d.keeper.list()
}

// GetStatus asks the member now, so that what it says is not older than the question.
func (s *server) GetStatus(ctx context.Context, _ *etcdv1.GetStatusRequest) (*etcdv1.Status, error) {
	return s.status(ctx), nil
}

func (s *server) status(ctx context.Context) *etcdv1.Status {
	_ = s.d.kernel.pass(ctx) // one that restarts on purpose is asked when it is back; if it does not come, that is what there is to say
	loop := s.d.loop.State()
	out := &etcdv1.Status{State: "waiting", Detail: loop.GetError()}
	e, client := s.d.kernel.running()
	if e == nil {
		if p, err := readPhase(s.d.kernel.cfg.DataDir); err == nil && p != inCluster {
			out.State = string(p)
		}
		return out
	}
	select {
	case <-e.Server.ReadyNotify():
	default:
		out.State = "starting"
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	f, err := readFigures(ctx, client, e)
	if err != nil {
		out.State, out.Detail = "error", errs.Text(err)
		return out
	}
	out.State = "running"
	switch {
	case isLearner(e):
		out.State = "joining"
	case awaitLeader(ctx, e) == 0:
		out.State, out.Detail = "error", "no leader: more than half of the voters must answer each other, or an election is under way"
	}
	out.Version, out.MemberId, out.ClusterId, out.Leader = f.Version, f.ID, f.Cluster, f.Leader
	out.Revision, out.RaftTerm, out.RaftIndex = f.Revision, f.Term, f.Index
	out.DatabaseBytes, out.DatabaseUsedBytes = f.DatabaseBytes, f.DatabaseUsedByte
	var list []*etcdserverpb.Member
	for _, m := range e.Server.Cluster().Members() {
		list = append(list, &etcdserverpb.Member{ID: uint64(m.ID), Name: m.Name})
		out.Members = append(out.Members, &etcdv1.Member{
			Id: hexID(uint64(m.ID)), Name: m.Name, PeerUrls: m.PeerURLs, ClientUrls: m.ClientURLs, Learner: m.IsLearner,
		})
	}
	if out.Alarms = alarmTexts(e.Server.Alarms(), list); len(out.Alarms) > 0 {
		out.State = "error"
		out.Detail = "alarm: with NOSPACE etcd takes only deletes until it is compacted, defragmented and disarmed; with CORRUPT the member that has it must be removed"
	}
	return out
}
