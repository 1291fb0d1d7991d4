package vault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/dm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// ErrProof: nothing that is locked knows this key.
var ErrProof = errors.New("the key is wrong")

// tpmTries is how often the TPM is asked: another program may use it, or it may be busy. A refusal is not repeated.
const tpmTries = 3

// Open opens a volume by what opens it without a person: STATE by TPM, file or server, others by the key on STATE and by nothing else, for who
// can write to the disk can give them a header of his own. folder is storaged's own on STATE; nil while that is not mounted. If nothing
// opens it, the error has a reason for each, and Why keeps it.
func (v *Vault) Open(ctx context.Context, t Target, folder *os.Root) error {
	f, h, err := header(t)
	if err != nil {
		return err
	}
	defer f.Close()
	var reasons []string
	kinds := []Kind{TPM, KeyFile, Service} // from quick to slow
	if t.Name != "STATE" {
		kinds = []Kind{State}
	}
	for _, k := range kinds {
		for _, token := range tokens(h, k) {
			key, err := v.fetch(ctx, token, folder)
			if err == nil {
				err = v.openWith(t, f, h, key, token.Keyslots)
				key.Wipe()
			}
			if err == nil {
				v.setWhy(t.Name, "")
				return nil
			}
			reasons = append(reasons, fmt.Sprintf("%s: %v", k, err))
		}
	}
	if len(reasons) == 0 {
		reasons = []string{"it has only keys that people have"}
	}
	text := strings.Join(reasons, "; ")
	v.setWhy(t.Name, text)
	return fmt.Errorf("%s does not open: %s", t.Name, text)
}

// fetch gets the key that a token stands for.
func (v *Vault) fetch(ctx context.Context, token luks.Token, folder *os.Root) (secret.Bytes, error) {
	switch kindOf(token) {
	case TPM:
		return v.unseal(token)
	case State:
		s, err := value[tokenState](token)
		if err != nil {
			return secret.Bytes{}, err
		}
		if folder == nil {
			return secret.Bytes{}, errors.New("STATE, which its key lies on, is not there")
		}
		return kept(folder, s.File)
	case KeyFile:
		f, err := value[tokenFile](token)
		if err != nil {
			return secret.Bytes{}, err
		}
		return v.readFile(f)
	case Service:
		s, err := value[tokenService](token)
		if err != nil {
			return secret.Bytes{}, err
		}
		return v.askService(ctx, s)
	}
	return secret.Bytes{}, fmt.Errorf("a key of kind %s", kindOf(token))
}

// openWith opens a volume with a key for certain keyslots.
func (v *Vault) openWith(t Target, dev luks.Device, h *luks.Header, key secret.Bytes, slots []int) error {
	vk, _, err := h.Open(dev, key, slots...)
	if err != nil {
		return err
	}
	defer vk.Wipe()
	return v.start(t, h, vk)
}

// table is the device-mapper table of a volume.
func table(t Target, h *luks.Header, vk secret.Bytes) (dm.Crypt, error) {
	s := h.Segment
	length := (t.Size - s.Offset) / int64(s.SectorSize) * int64(s.SectorSize)
	if s.Length > 0 {
		length = min(length, s.Length)
	}
	if length <= 0 {
		return dm.Crypt{}, fmt.Errorf("%s: %d bytes are too few for a header", t.Device, t.Size)
	}
	return dm.Crypt{Device: t.Dev, Offset: s.Offset, Length: length, IVTweak: s.IVTweak, SectorSize: s.SectorSize, Key: vk}, nil
}

// start makes the volume's device. If there is one already that is ours, somebody was quicker.
func (v *Vault) start(t Target, h *luks.Header, vk secret.Bytes) error {
	tab, err := table(t, h, vk)
	if err != nil {
		return err
	}
	v.change.Lock()
	defer v.change.Unlock()
	m, err := v.cfg.Mapper()
	if err != nil {
		return fmt.Errorf("device-mapper: %w", err)
	}
	defer m.Close()
	name, uuid := MapName(t.Name), MapUUID(t.Name, h.UUID)
	switch have, err := m.Status(name); {
	case err == nil && have.UUID == uuid && have.Live:
		return nil
	case err == nil: // of an earlier header, or half made
		if err := m.Remove(name); err != nil {
			return err
		}
	case !errors.Is(err, dm.ErrNone):
		return err
	}
	_, err = m.Create(name, uuid, tab)
	return err
}

// Close takes a volume's device away; it must not be in use. None is fine.
func (v *Vault) Close(volume string) error {
	v.change.Lock()
	defer v.change.Unlock()
	m, err := v.cfg.Mapper()
	if err != nil {
		return fmt.Errorf("device-mapper: %w", err)
	}
	defer m.Close()
	if err := m.Remove(MapName(volume)); err != nil && !errors.Is(err, dm.ErrNone) {
		return err
	}
	return nil
}

// Resize makes an open volume's device as large as its partition.
func (v *Vault) Resize(t Target) error {
	v.change.Lock()
	defer v.change.Unlock()
	f, h, vk, err := v.opened(t)
	if err != nil {
		return err
	}
	defer f.Close()
	defer vk.Wipe()
	tab, err := table(t, h, vk)
	if err != nil {
		return err
	}
	m, err := v.cfg.Mapper()
	if err != nil {
		return fmt.Errorf("device-mapper: %w", err)
	}
	defer m.Close()
	return m.Reload(MapName(t.Name), tab)
}

// Repair writes both copies of a header anew, from the one that is good.
func (v *Vault) Repair(t Target) error {
	v.change.Lock()
	defer v.change.Unlock()
	f, h, err := header(t)
	if err != nil {
		return err
	}
	return errors.Join(h.Repair(f), f.Close())
}

// Challenge is what a person with a key is shown before they send it.
type Challenge struct {
	Kind        Kind
	Salt, Proof []byte
}

// Challenges returns one for each recovery key and passphrase of the volumes, which are locked. binding is that of the caller's connection.
func (v *Vault) Challenges(locked []Target, binding []byte) ([]Challenge, error) {
	var out []Challenge
	seen := map[string]bool{}
	for _, t := range locked {
		f, h, err := header(t)
		if err != nil {
			return nil, err
		}
		f.Close()
		for _, k := range []Kind{Recovery, Passphrase} {
			for _, token := range tokens(h, k) {
				p, err := value[tokenPerson](token)
				if err != nil || seen[string(p.Verifier)] {
					continue
				}
				seen[string(p.Verifier)] = true
				out = append(out, Challenge{k, p.Salt, unlock.NodeProof(p.Verifier, binding)})
			}
		}
	}
	return out, nil
}

// Unlock opens all of the locked volumes that the key opens, and returns their names. Nothing that costs time is done before the proof was
// found right: if it is not, for any of them, that is ErrProof.
func (v *Vault) Unlock(locked []Target, kind Kind, key secret.Bytes, binding, proof []byte) ([]string, error) {
	var opened []string
	var errs []error
	known := false
	for _, t := range locked {
		f, h, err := header(t)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, token := range tokens(h, kind) {
			p, err := value[tokenPerson](token)
			if err != nil || len(p.Verifier) == 0 || !unlock.Equal(unlock.CallerProof(p.Verifier, binding), proof) {
				continue
			}
			known = true
			if err := v.openWith(t, f, h, key, token.Keyslots); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", t.Name, err))
				continue
			}
			opened = append(opened, t.Name)
			break
		}
		f.Close()
	}
	if len(opened) > 0 {
		for _, name := range opened {
			v.setWhy(name, "")
		}
		return opened, nil
	}
	if !known {
		errs = append(errs, ErrProof)
	}
	return nil, errors.Join(errs...)
}
