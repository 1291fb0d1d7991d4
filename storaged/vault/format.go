package vault

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// recoveryKDF is for the recovery key. It has 160 random bits, which need no stretching; one round keeps it in the form that people expect of
// a passphrase without a minute's wait under emulation.
var recoveryKDF = luks.KDF{Type: "argon2id", Time: 1, Memory: 64 << 10, CPUs: 2}

// varKeyFile is VAR's key on STATE.
const varKeyFile = "var.key"

// Format is what Vault.Format makes.
type Format struct {
	Target
	// TPM adds a key sealed to the TPM.
	TPM bool
	// Folder, if not nil, is storaged's own on STATE: a key there opens the volume.
	Folder *os.Root
	// Others are volumes that are open already and have the same recovery key. If it is not known any more, since the process has
	// restarted, they get the new one too.
	Others []Target
}

// Format makes an encrypted volume and opens it. Whatever lay on the partition is lost. If it is interrupted, it must be done again from the start.
func (v *Vault) Format(o Format) error {
	recovery, fresh := v.recoveryKey()
	if err := v.format(o, recovery); err != nil {
		return err
	}
	if fresh {
		for _, t := range o.Others {
			if err := v.replaceRecovery(t, recovery); err != nil {
				return fmt.Errorf("%s: new recovery key: %w", t.Name, err)
			}
		}
	}
	return nil
}

// recoveryKey returns the one that was made in this process and not acknowledged yet, or a new one.
func (v *Vault) recoveryKey() (key secret.Bytes, fresh bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.recovery.Len() > 0 {
		return v.recovery.Copy(), false
	}
	v.recovery = secret.From(unlock.NewRecoveryKey())
	return v.recovery.Copy(), true
}

func (v *Vault) format(o Format, recovery secret.Bytes) error {
	f, err := os.OpenFile(o.Device, os.O_RDWR|unix.O_EXCL, 0) // refused if it is in use
	if err != nil {
		return err
	}
	sector := 4096
	if (o.Size-luks.DataOffset)%int64(sector) != 0 {
		sector = 512
	}
	h, vk, err := luks.Format(f, luks.Options{Label: MapName(o.Name), SectorSize: sector})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	defer vk.Wipe()
	err = v.firstKeys(o, f, h, vk, recovery)
	if err = errors.Join(err, f.Close()); err != nil { // closed before device-mapper wants it for itself
		return err
	}
	return v.start(o.Target, h, vk)
}

// firstKeys adds the keys of a new volume: the recovery key first, so that there is no moment in which only the TPM opens it.
func (v *Vault) firstKeys(o Format, f *os.File, h *luks.Header, vk, recovery secret.Bytes) error {
	c, err := personChange(Recovery, recovery)
	if err != nil {
		return err
	}
	if _, err := h.Update(f, vk, c); err != nil {
		return err
	}
	if o.TPM {
		c, err := v.tpmChange()
		if err != nil {
			return err
		}
		defer c.Add.Wipe()
		if _, err := h.Update(f, vk, c); err != nil {
			return err
		}
	}
	if o.Folder == nil {
		return nil
	}
	key, err := keep(o.Folder, varKeyFile)
	if err != nil {
		return err
	}
	defer key.Wipe()
	t, err := newToken(State, tokenState{File: varKeyFile})
	if err != nil {
		return err
	}
	_, err = h.Update(f, vk, luks.Change{Add: key, KDF: luks.Random, Token: t})
	return err
}

// personChange adds a recovery key or passphrase, with its verifier.
func personChange(k Kind, key secret.Bytes) (luks.Change, error) {
	p := tokenPerson{}
	kdf := recoveryKDF
	if k == Passphrase {
		p.Salt, kdf = unlock.NewSalt(), luks.Human
	}
	p.Verifier = unlock.Verifier(string(k), key.Expose(), p.Salt)
	t, err := newToken(k, p)
	return luks.Change{Add: key, KDF: kdf, Token: t}, err
}

// tpmChange adds a random key, sealed to the TPM for images with the running one's signer and for the firmware's keys as they are now.
func (v *Vault) tpmChange() (luks.Change, error) {
	if v.noPCR != "" {
		return luks.Change{}, errors.New(v.noPCR)
	}
	m, err := v.cfg.TPM()
	if err != nil {
		return luks.Change{}, err
	}
	defer m.Close()
	if err := m.Prepare(); err != nil {
		return luks.Change{}, err
	}
	events, err := tpm.Events(v.log(), pcrpolicy.PCRSecureBoot)
	if err != nil {
		events = nil // only for words, later
	}
	key := secret.New(secretSize)
	sealed, err := m.Seal(key, v.image.Key, events)
	if err != nil {
		return luks.Change{}, err
	}
	t, err := newToken(TPM, sealed)
	return luks.Change{Add: key, KDF: luks.Random, Token: t}, err
}

// unseal gets a key back from the TPM. A refusal is final; another error may pass.
func (v *Vault) unseal(token luks.Token) (key secret.Bytes, err error) {
	sealed, err := value[tpm.Sealed](token)
	if err != nil {
		return secret.Bytes{}, err
	}
	m, err := v.cfg.TPM()
	if err != nil {
		return secret.Bytes{}, err
	}
	defer m.Close()
	if pcr, err := m.PCR(pcrpolicy.PCRImage); err == nil && v.cappedAt(pcr) {
		if why := v.lastWhy(); why != "" {
			return secret.Bytes{}, errors.New("it was asked once in this boot: " + why)
		}
		return secret.Bytes{}, errors.New("it was asked once in this boot, which is all that there is")
	}
	for range tpmTries {
		var r *tpm.Refusal
		if key, err = m.Unseal(sealed, v.image, v.log()); err == nil || errors.As(err, &r) {
			break
		}
	}
	if err == nil || v.noPCR == "" {
		return key, err
	}
	return key, fmt.Errorf("%w (%s)", err, v.noPCR)
}

// replaceRecovery gives an open volume another recovery key, in the place of those that it has.
func (v *Vault) replaceRecovery(t Target, key secret.Bytes) error {
	v.change.Lock()
	defer v.change.Unlock()
	f, h, vk, err := v.opened(t)
	if err != nil {
		return err
	}
	defer f.Close()
	defer vk.Wipe()
	c, err := personChange(Recovery, key)
	if err != nil {
		return err
	}
	for _, old := range tokens(h, Recovery) {
		c.Remove = append(c.Remove, old.Keyslots...)
	}
	_, err = h.Update(f, vk, c)
	return err
}

// RecoveryKey returns the recovery key that was made in this process and nobody has acknowledged yet; ok is false if there is none.
func (v *Vault) RecoveryKey() (key secret.Bytes, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.recovery.Copy(), v.recovery.Len() > 0
}

// Acknowledge forgets the recovery key, and writes on the volumes that somebody has it.
func (v *Vault) Acknowledge(volumes []Target) error {
	v.change.Lock()
	defer v.change.Unlock()
	v.mu.Lock()
	v.recovery.Wipe()
	v.recovery = secret.Bytes{}
	v.mu.Unlock()
	var errs []error
	for _, t := range volumes {
		f, h, err := header(t)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, markGiven(f, h), f.Close())
	}
	return errors.Join(errs...)
}

func markGiven(f *os.File, h *luks.Header) error {
	for n, token := range h.Tokens {
		if kindOf(token) != Recovery {
			continue
		}
		p, err := value[tokenPerson](token)
		if err != nil {
			return err
		}
		if p.Given {
			continue
		}
		p.Given = true
		given, err := newToken(Recovery, p)
		if err != nil {
			return err
		}
		if err := h.SetToken(f, n, given); err != nil {
			return err
		}
	}
	return nil
}
