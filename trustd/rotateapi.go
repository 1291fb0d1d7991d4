package trustd

import (
	"context"
	"encoding/hex"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// overlap is how long both authorities count before the old one is removed: the life of all certificates of daemons and of the kubelet, of service-account tokens, and what people get if
// they ask for no other.
const overlap = day

// goingBack is how long the new authority is still believed after an abort, so that whoever has a certificate of it can get another one.
const goingBack = 5 * time.Second

// rotatable are the authorities that can be replaced.
var rotatable = []string{"etcd", "front-proxy", "kubernetes", "os"}

type authoritiesServer struct {
	trustv1.UnimplementedAuthoritiesServer
	d *Daemon
}

func (s authoritiesServer) StartRotation(ctx context.Context, r *trustv1.StartRotationRequest) (*trustv1.Rotation, error) {
	d := s.d
	which, err := chosen(r.GetWhich())
	if err != nil {
		return nil, err
	}
	list, _, err := d.roster()
	if err != nil {
		return nil, err
	}
	d.rotating.Lock()
	defer d.rotating.Unlock()
	state, err := list.Read(ctx)
	if err != nil {
		return nil, err
	}
	wait := uint64(overlap / time.Second)
	if r.GetSkipWait() {
		wait = 0
	}
	by := peer.CallerFrom(ctx).Name
	if old := state.Rotation; !old.Over() {
		if !slices.Equal(old.Which, which) || old.Stage == roster.Abort {
			return nil, errs.New(errs.Precondition, "authorities %s are being replaced by %q, stage %q: wait until that is over (bhctl trust rotate-ca --status), or abort it", strings.Join(old.Which, ","), old.By, old.Stage)
		}
		err = list.Change(ctx, func(_ *roster.State, rot *roster.Rotation) (bool, error) {
			changed := rot.ID == old.ID && rot.Wait != wait
			rot.Wait = wait
			return changed, nil
		})
	} else {
		err = d.begin(ctx, list, roster.Rotation{Which: which, Stage: roster.Prepare, By: by, Started: d.cfg.Now(), Entered: d.cfg.Now(), Wait: wait})
	}
	if err != nil {
		return nil, err
	}
	d.log.Info("authorities are replaced", "which", strings.Join(which, ","), "by", by)
	return s.GetRotation(ctx, &trustv1.GetRotationRequest{})
}

// begin makes the new keys, on the disk before anybody hears of them. The caller holds d.rotating.
func (d *Daemon) begin(ctx context.Context, list roster.Roster, rec roster.Rotation) error {
	k, _ := d.keys.Get()
	switch {
	case k.node == nil:
		return errs.New(errs.Precondition, "this node has no place in the cluster yet; try again when it is on the list: bhctl get members")
	case k.rot != nil && !k.rot.final():
		return errs.New(errs.Unavailable, "this node has not done with the replacement before; try again")
	}
	id := make([]byte, 8)
	if _, err := io.ReadFull(d.cfg.Random, id); err != nil {
		return err
	}
	rec.ID = hex.EncodeToString(id)
	rot, err := newRotation(rec.ID, rec.Which, k, d.cfg.Random, d.cfg.Now())
	if err != nil {
		return err
	}
	if _, err := d.joinKey(); err != nil { // the control planes' common secret
		return err
	}
	if err := d.enter(rot); err != nil {
		return err
	}
	// If it is not known whether that was written, rotate finds out.
	return list.Start(ctx, rec)
}

// chosen checks which authorities are to be replaced, and sorts them.
func chosen(which []string) ([]string, error) {
	if len(which) == 0 {
		which = rotatable
	}
	out := slices.Sorted(slices.Values(which))
	for i, w := range out {
		if !slices.Contains(rotatable, w) {
			return nil, errs.New(errs.Invalid, "which: %.40q; allowed are %q, none means all", w, rotatable)
		}
		if i > 0 && out[i-1] == w {
			return nil, errs.New(errs.Invalid, "which: %q is there twice", w)
		}
	}
	return out, nil
}

func (s authoritiesServer) AbortRotation(ctx context.Context, _ *trustv1.AbortRotationRequest) (*trustv1.Rotation, error) {
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	now := s.d.cfg.Now()
	err = list.Change(ctx, func(_ *roster.State, rot *roster.Rotation) (bool, error) {
		switch rot.Stage {
		case roster.Abort, roster.Aborted:
			return false, nil
		case roster.Finish, roster.Done:
			return false, errs.New(errs.Precondition, "stage %q: the old authorities are removed already; to have others again, replace these", rot.Stage)
		}
		if rot.Wait = 0; rot.Stage == roster.Issue {
			rot.Wait = uint64(goingBack / time.Second)
		}
		rot.Stage, rot.Entered = roster.Abort, now
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	s.d.log.Info("replacement of authorities aborted", "by", peer.CallerFrom(ctx).Name)
	return s.GetRotation(ctx, &trustv1.GetRotationRequest{})
}

func (s authoritiesServer) GetRotation(ctx context.Context, _ *trustv1.GetRotationRequest) (*trustv1.Rotation, error) {
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	state, err := list.Read(ctx)
	if err != nil {
		return nil, err
	}
	r := state.Rotation
	if r == nil {
		return &trustv1.Rotation{}, nil
	}
	out := &trustv1.Rotation{Id: r.ID, Which: r.Which, Stage: r.Stage, By: r.By, Started: timestamppb.New(r.Started), Entered: timestamppb.New(r.Entered), Waiting: state.Waiting()}
	if at := r.FinishAt(); !at.IsZero() {
		out.Finish = timestamppb.New(at)
	}
	return out, nil
}

// ConfirmRotation notes what another node has done.
func (s nodesServer) ConfirmRotation(ctx context.Context, r *trustv1.ConfirmRotationRequest) (*trustv1.ConfirmRotationResponse, error) {
	id, stage := r.GetDone().GetId(), r.GetDone().GetStage()
	if len(id) > 64 || len(stage) > 64 {
		return nil, errs.New(errs.Invalid, "the replacement's id has %d characters and its stage %d; allowed are 64", len(id), len(stage))
	}
	n, err := s.d.caller(ctx, r.GetProof(), join.RotationPayload(r.GetProof().GetInstance(), id, stage))
	if err != nil {
		return nil, err
	}
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	if state, _ := s.d.list.Get(); state != nil && state.Rotation != nil && state.Rotation.ID == id && state.Rotation.Over() {
		return &trustv1.ConfirmRotationResponse{}, nil // there is nothing to confirm any more
	}
	return &trustv1.ConfirmRotationResponse{}, list.Confirm(ctx, n, id, stage)
}

func (s signerServer) ReportTrust(ctx context.Context, r *trustv1.ReportTrustRequest) (*trustv1.ReportTrustResponse, error) {
	who, _ := peer.From(ctx) // the socket's list has let it in
	s.d.ears.say(who, r)
	return &trustv1.ReportTrustResponse{}, nil
}
