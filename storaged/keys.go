package storaged

import (
	"context"
	"errors"
	"os"
	"time"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

const (
	// wrongProofs is how many wrong keys are answered at once, each after wrongDelay: so many guesses per second. A right one does not wait for them.
	wrongProofs = 4
	wrongDelay  = time.Second
)

// unlockServer is for people whose key is all that they have to show.
type unlockServer struct {
	storagev1.UnimplementedUnlockServer
	d *Daemon
}

// locked returns the volumes that are.
func (s unlockServer) locked(ctx context.Context) (State, []vault.Target, error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return have, nil, err
	}
	all := have.targets(false)
	if len(all) == 0 {
		return have, nil, errs.New(errs.Precondition, "no volume is locked")
	}
	return have, all, nil
}

func (s unlockServer) Challenge(ctx context.Context, r *storagev1.ChallengeRequest) (*storagev1.ChallengeResponse, error) {
	if len(r.GetChannelBinding()) != unlock.BindingSize {
		return nil, errs.New(errs.Invalid, "channel_binding: %d bytes, not %d", len(r.GetChannelBinding()), unlock.BindingSize)
	}
	have, locked, err := s.locked(ctx)
	if err != nil {
		return nil, err
	}
	all, err := s.d.vault.Challenges(locked, r.GetChannelBinding())
	if err != nil {
		return nil, err
	}
	out := &storagev1.ChallengeResponse{}
	for _, c := range all {
		out.Challenges = append(out.Challenges, &storagev1.Challenge{Kind: string(c.Kind), Salt: c.Salt, Proof: c.Proof})
	}
	for _, t := range locked {
		if p, ok := have.partition(VolumeName(t.Name)); ok {
			out.Reasons = append(out.Reasons, t.Name+": "+have.why(p))
		}
	}
	return out, nil
}

func (s unlockServer) Unlock(ctx context.Context, r *storagev1.UnlockRequest) (*storagev1.UnlockResponse, error) {
	key, err := unlock.Normalize(r.GetKind(), r.GetKey())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	k := secret.From(key)
	defer k.Wipe()
	if len(r.GetChannelBinding()) != unlock.BindingSize {
		return nil, errs.New(errs.Invalid, "channel_binding: %d bytes, not %d", len(r.GetChannelBinding()), unlock.BindingSize)
	}
	_, locked, err := s.locked(ctx)
	if err != nil {
		return nil, err
	}
	opened, err := s.d.vault.Unlock(locked, vault.Kind(r.GetKind()), k, r.GetChannelBinding(), r.GetProof())
	if errors.Is(err, vault.ErrProof) {
		s.d.meters.refused.Add(1)
		s.d.log.Warn("a wrong key was shown", "kind", r.GetKind())
		if err := s.d.delay(ctx); err != nil {
			return nil, err
		}
		return nil, errs.New(errs.Unauthenticated, "the key is wrong")
	}
	if err != nil {
		return nil, err
	}
	s.d.log.Info("volumes unlocked by a person", "volumes", opened, "kind", r.GetKind())
	s.d.loop.Wake()
	return &storagev1.UnlockResponse{Volumes: opened}, nil
}

// delay holds back the answer to a wrong key.
func (d *Daemon) delay(ctx context.Context) error {
	select {
	case d.slow <- struct{}{}:
		defer func() { <-d.slow }()
	case <-ctx.Done():
		return ctx.Err()
	}
	t := time.NewTimer(wrongDelay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// partition returns a volume's on the disk that counts.
func (s State) partition(name VolumeName) (Partition, bool) {
	home, err := s.home("")
	if home == nil || err != nil {
		return Partition{}, false
	}
	return home.volume(volumeNamed(name))
}

// keyServer is for administrators.
type keyServer struct {
	storagev1.UnimplementedKeysServer
	d *Daemon
}

// volumes returns what the vault needs to change keys. The caller closes the folder, if there is one.
func (s keyServer) volumes(ctx context.Context) (o vault.Volumes, err error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return o, err
	}
	for _, t := range have.targets(true) {
		if t.Name == string(StateVolume) {
			o.State = &t
		} else {
			o.Var = &t
		}
	}
	if o.State != nil {
		o.Folder, err = s.d.folder(have)
	}
	return o, err
}

// done closes the folder and lets the loop see what changed.
func (s keyServer) done(o vault.Volumes) {
	if o.Folder != nil {
		if err := o.Folder.Close(); err != nil {
			s.d.log.Warn("folder on STATE", "err", err.Error())
		}
	}
	s.d.loop.Wake()
}

func (s keyServer) ListKeys(ctx context.Context, _ *storagev1.ListKeysRequest) (*storagev1.ListKeysResponse, error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return nil, err
	}
	out := &storagev1.ListKeysResponse{}
	for _, v := range volumes {
		if p, ok := have.partition(v.name); ok && p.encrypted() {
			out.Keys = append(out.Keys, keyStatus(v, p.LUKS)...)
		}
	}
	key, pending := s.d.vault.RecoveryKey()
	key.Wipe()
	out.RecoveryPending = pending
	return out, nil
}

func (s keyServer) AddKey(ctx context.Context, r *storagev1.AddKeyRequest) (*storagev1.AddKeyResponse, error) {
	w := vault.Wish{Kind: vault.Kind(r.GetKind()), Partition: r.GetPartition(), Firmware: r.GetFirmware(), Address: r.GetAddress(), Pin: r.GetPin()}
	if err := checkWish(w, r.GetPassphrase()); err != nil {
		return nil, err
	}
	w.Passphrase = secret.From([]byte(r.GetPassphrase()))
	defer w.Passphrase.Wipe()
	o, err := s.volumes(ctx)
	if err != nil {
		return nil, err
	}
	defer s.done(o)
	k, recovery, err := s.d.vault.Add(ctx, o, w)
	if err != nil {
		return nil, err
	}
	s.d.log.Info("key added", "kind", r.GetKind(), "key", vault.ID(string(StateVolume), k.Slot))
	return &storagev1.AddKeyResponse{Key: keyOf(string(StateVolume), k), RecoveryKey: recovery}, nil
}

func (s keyServer) RemoveKey(ctx context.Context, r *storagev1.RemoveKeyRequest) (*storagev1.RemoveKeyResponse, error) {
	volume, slot, err := vault.ParseID(r.GetId())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	o, err := s.volumes(ctx)
	if err != nil {
		return nil, err
	}
	defer s.done(o)
	if err := s.d.vault.Remove(o, volume, slot, r.GetAllowLocked()); err != nil {
		return nil, err
	}
	s.d.log.Info("key removed", "key", r.GetId())
	return &storagev1.RemoveKeyResponse{}, nil
}

func (s keyServer) RotateKey(ctx context.Context, r *storagev1.RotateKeyRequest) (*storagev1.RotateKeyResponse, error) {
	volume, slot, err := vault.ParseID(r.GetId())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	passphrase := secret.From([]byte(r.GetPassphrase()))
	defer passphrase.Wipe()
	o, err := s.volumes(ctx)
	if err != nil {
		return nil, err
	}
	defer s.done(o)
	k, recovery, err := s.d.vault.Rotate(ctx, o, volume, slot, passphrase)
	if err != nil {
		return nil, err
	}
	s.d.log.Info("key rotated", "key", r.GetId(), "kind", string(k.Kind))
	return &storagev1.RotateKeyResponse{Key: keyOf(string(StateVolume), k), RecoveryKey: recovery}, nil
}

// settled wants both volumes to be made, if one is: until then the recovery key may still be replaced.
func (s keyServer) settled(ctx context.Context) (State, error) {
	have, err := s.d.kernel.Read(ctx)
	if err != nil {
		return have, err
	}
	for _, v := range volumes {
		if p, ok := have.partition(v.name); !ok && v.name == VarVolume || ok && p.Attributes&unformatted != 0 {
			return have, errs.New(errs.Unavailable, "%s is still being made; try again", v.name)
		}
	}
	return have, nil
}

func (s keyServer) GetRecoveryKey(ctx context.Context, _ *storagev1.GetRecoveryKeyRequest) (*storagev1.GetRecoveryKeyResponse, error) {
	key, ok := s.d.vault.RecoveryKey()
	if ok {
		if _, err := s.settled(ctx); err != nil {
			key.Wipe()
			return nil, err
		}
	}
	if !ok {
		return nil, errs.New(errs.NotFound, "there is no recovery key to show: it was acknowledged, storaged has restarted since it was made, or nothing is encrypted; rotating it makes a new one")
	}
	defer key.Wipe()
	s.d.log.Info("recovery key shown")
	return &storagev1.GetRecoveryKeyResponse{RecoveryKey: string(key.Expose())}, nil
}

func (s keyServer) AcknowledgeRecoveryKey(ctx context.Context, _ *storagev1.AcknowledgeRecoveryKeyRequest) (*storagev1.AcknowledgeRecoveryKeyResponse, error) {
	have, err := s.settled(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.d.vault.Acknowledge(have.targets(true)); err != nil {
		return nil, err
	}
	s.d.log.Info("recovery key acknowledged")
	s.d.loop.Wake()
	return &storagev1.AcknowledgeRecoveryKeyResponse{}, nil
}

// folderOf opens storaged's folder on STATE; a model has none.
type folderOf func(State) (*os.Root, error)

// checkWish refuses what Storage.keys would refuse too.
func checkWish(w vault.Wish, passphrase string) error {
	if w.Kind == vault.Passphrase || w.Kind == vault.Recovery {
		if w.Partition+w.Firmware+w.Address+w.Pin != "" {
			return errs.New(errs.Invalid, "partition, firmware, address and pin are not for a key of kind %s", w.Kind)
		}
		if (w.Kind == vault.Passphrase) != (passphrase != "") {
			return errs.New(errs.Invalid, "passphrase: a key of kind passphrase, and no other, is made from one")
		}
		return nil
	}
	if passphrase != "" {
		return errs.New(errs.Invalid, "passphrase: it is for a key of kind passphrase")
	}
	err := config.Validate(config.Set{Storage: &config.Storage{Encryption: config.EncryptionLUKS2, Keys: []config.StorageKey{
		{Kind: config.KeyKind(w.Kind), Partition: w.Partition, Firmware: w.Firmware, Address: w.Address, Pin: w.Pin},
	}}})
	if err != nil {
		return errs.New(errs.Invalid, "%w", err)
	}
	return nil
}
