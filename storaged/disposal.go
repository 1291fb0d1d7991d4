package storaged

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/storaged/wipe"
)

// resetRounds bounds how often what is left of a reset is looked for. Three are enough, unless the loop does the same steps beside.
const resetRounds = 10

// disposalServer is for machined.
type disposalServer struct {
	storagev1.UnimplementedDisposalServer
	d *Daemon
}

// Destroy goes on when its caller leaves: what was begun is finished.
func (s disposalServer) Destroy(r *storagev1.DestroyRequest, out grpc.ServerStreamingServer[storagev1.DestroyProgress]) error {
	ctx := context.WithoutCancel(out.Context())
	say := func(p *storagev1.DestroyProgress) {
		if p.Step != "" {
			s.d.log.Info("reset", "step", p.Step)
		}
		_ = out.Send(p) // who has left is told nothing
	}
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return err
	}
	facts, err := s.begin(ctx, have, r.GetForce(), say)
	if err != nil {
		return errors.Join(err, s.d.kernel.Do(ctx, Step{Op: opRelease}))
	}
	if err := s.finish(ctx, say); err != nil {
		return errs.New(errs.Internal, "%w; the next start goes on", err)
	}
	after, err := s.d.kernel.Read(ctx)
	if err != nil {
		return err
	}
	facts = append(s.facts(have, after), facts...)
	if r.GetRemoveOs() {
		disk := have.withSystem()
		if disk == "" {
			return errs.New(errs.Precondition, "the disk that the system was started from is not known; the system stays on it")
		}
		step := Step{Op: opRemoveOS, Disk: disk}
		say(&storagev1.DestroyProgress{Step: step.String()})
		if err := s.d.kernel.Do(ctx, step); err != nil {
			return errs.New(errs.Internal, "%s: %w", step, err)
		}
		facts = append(facts, "The system is removed: nothing on "+step.Disk+" can be started any more. The firmware's own settings, Secure Boot keys among them, stay.")
	}
	say(&storagev1.DestroyProgress{Facts: facts})
	return nil
}

// begin does what can be refused, and at last marks the volumes: from then on there is no way back.
func (s disposalServer) begin(ctx context.Context, have State, force bool, say func(*storagev1.DestroyProgress)) (facts []string, err error) {
	if err := s.d.kernel.Do(ctx, Step{Op: opHold}); err != nil { // first, or the loop would take the TPM again
		return nil, err
	}
	if have.TPM.Owned {
		say(&storagev1.DestroyProgress{Step: "give the TPM back"})
		given, err := s.giveUp(have)
		switch {
		case err != nil && !force:
			return nil, errs.New(errs.Precondition, "the TPM does not take its owner's authorisation back: %w; nothing was changed. By force the reset goes on, and the TPM "+
				"must be cleared in the firmware's setup one day", err)
		case err != nil:
			facts = append(facts, "The TPM keeps an owner's authorisation that nobody knows any more: clear it in the firmware's setup.")
		case given:
			facts = append(facts, "The TPM has no owner any more. Its epoch stays: images of older epochs get no keys from it, on this disk or another.")
		default:
			facts = append(facts, "The TPM's owner is somebody else, and stays.")
		}
	}
	home, err := have.home("")
	if err != nil {
		return nil, err
	}
	step := "nothing to destroy: there are no volumes"
	if home != nil {
		doom := Step{Op: opDoom, Disk: home.Device}
		if err := s.d.kernel.Do(ctx, doom); err != nil {
			return nil, err
		}
		step = doom.String()
	}
	say(&storagev1.DestroyProgress{Step: step, Begun: true})
	return facts, nil
}

// giveUp gives the TPM back with the authorisation that lies on STATE.
func (s disposalServer) giveUp(have State) (bool, error) {
	if _, ok := have.partition(StateVolume); !ok {
		return false, nil // it was never ours
	}
	folder, err := s.d.folder(have)
	if err != nil {
		return false, err
	}
	given, err := s.d.vault.GiveUpOwnership(folder)
	return given, errors.Join(err, folder.Close())
}

// finish does the steps of planReset until none is left.
func (s disposalServer) finish(ctx context.Context, say func(*storagev1.DestroyProgress)) error {
	for range resetRounds {
		have, err := s.d.kernel.Read(ctx)
		if err != nil {
			return err
		}
		steps := planReset(have)
		if len(steps) == 0 {
			return nil
		}
		for _, step := range steps {
			say(&storagev1.DestroyProgress{Step: step.String()})
			// What the loop was quicker with is skipped.
			if err := s.d.kernel.Do(ctx, step); err != nil && !errors.Is(err, reconcile.ErrSkipped) {
				return fmt.Errorf("%s: %w", step, err)
			}
		}
	}
	return errors.New("the volumes are still there")
}

// withSystem returns the disk that the node's system is on: that of the volumes, if it has one, or else that which was started. They differ where the
// volumes have a disk of their own, and where a medium for installation was started once more: that stays as it is.
func (s State) withSystem() string {
	if home, err := s.home(""); err == nil && home != nil && slices.ContainsFunc(home.Partitions, func(p Partition) bool { return p.Name == "ESP" }) {
		return home.Device
	}
	for _, d := range s.Disks {
		if d.System {
			return d.Device
		}
	}
	return ""
}

// facts says what has become of the volumes.
func (s disposalServer) facts(before, after State) (out []string) {
	for _, v := range volumes {
		p, ok := before.partition(v.name)
		if !ok {
			continue
		}
		how, busy := after.Wiped[v.name], slices.ContainsFunc(after.Disks, func(d Disk) bool {
			return slices.ContainsFunc(d.doomed(), func(q Partition) bool { return q.Name == string(v.name) })
		})
		text := string(v.name) + ": "
		switch {
		case p.encrypted():
			text += "its keyslots and both headers are overwritten, and were read back from the disk as zeros: no key opens it, the recovery key included."
		case how == wipe.Discarded:
			text += "it was not encrypted; the disk was told to forget its data. Whether it has is the disk's word: to be sure, destroy the disk."
		case busy:
			text += "it was NOT encrypted, and the disk forgets nothing that is in use: until the next start who has the disk can recover most of the data."
		default:
			text += "it was NOT encrypted, and the disk cannot be told to forget: who has the disk can recover most of the data. Overwrite or destroy it."
		}
		out = append(out, text)
		if busy {
			out = append(out, string(v.name)+" is still in use, and taken off the disk at the next start.")
		}
	}
	if len(out) == 0 {
		out = append(out, "There is no volume of this node on any disk.")
	}
	return out
}
