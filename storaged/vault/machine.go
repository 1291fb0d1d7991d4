package vault

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
)

// Machine is what was seen of the TPM and of the image that runs.
type Machine struct {
	TPM        bool   // there is one
	Unusable   string // why no key can be sealed to it; see Useless
	Capped     bool   // PCR 11 was capped by us
	Owned      bool   // the owner's authorisation is set
	Epoch      int    // of the TPM; 0: none yet
	ImageEpoch int    // of the image; 0: it has none
}

// Useless says why no key can be sealed to the TPM; "" if one can.
func (m Machine) Useless() string {
	if !m.TPM {
		return "the machine has no TPM 2.0"
	}
	return m.Unusable
}

// Names of files. The first two are PID 1's, from /.extra; nothing else of that is looked at.
const (
	signatureFile = "tpm2-pcr-signature.json"
	keyFile       = "tpm2-pcr-public-key.pem"
	cappedFile    = "capped"    // in Runtime: the capped PCR's value, and why STATE did not open
	ownerFile     = "tpm-owner" // on STATE: the TPM owner's authorisation
	maxSmall      = 8 << 10     // bytes of any of them
)

// readSmall reads a file of at most maxSmall bytes.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, path)
}

func readAll(r io.Reader, name string) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSmall+1))
	if err == nil && len(b) > maxSmall {
		err = fmt.Errorf("%s: more than %d bytes", name, maxSmall)
	}
	return b, err
}

// readImage finds out once what the stub passed on; it does not change while the machine runs.
func (v *Vault) readImage() {
	image, err := v.signed()
	if err != nil {
		v.noPCR = err.Error()
		return
	}
	v.image = image
}

func (v *Vault) signed() (i tpm.Image, err error) {
	data, err := readSmall(filepath.Join(v.cfg.Boot, signatureFile))
	if errors.Is(err, fs.ErrNotExist) {
		return i, errors.New("the machine was not started with a signed image (there is no signed PCR policy)")
	} else if err != nil {
		return i, err
	}
	if i.Signature, err = pcrpolicy.ParseSignature(data); err != nil {
		return i, err
	}
	if data, err = readSmall(filepath.Join(v.cfg.Boot, keyFile)); err != nil {
		return i, err
	}
	key, err := pcrpolicy.ParseKey(data)
	if err != nil {
		return i, err
	}
	if data, err = readSmall(v.cfg.Key); err == nil {
		var own = key
		if own, err = pcrpolicy.ParseKey(data); err == nil && !own.Equal(key) {
			err = errors.New("the image brought another key of PCR policies than its root has")
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return i, err
	}
	if err := i.Signature.Verify(key); err != nil {
		return i, fmt.Errorf("PCR signature: %w", err)
	}
	if i.Epoch, err = v.imageEpoch(); err != nil {
		return i, err
	}
	i.Key = key
	return i, nil
}

// imageEpoch reads bulkhead.epoch from the kernel's command line, which is measured.
func (v *Vault) imageEpoch() (int, error) {
	line, err := readSmall(v.cfg.Cmdline)
	if err != nil {
		return 0, err
	}
	epoch := 0
	for _, w := range strings.Fields(string(line)) {
		if text, ok := strings.CutPrefix(w, "bulkhead.epoch="); ok {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 || n > pcrpolicy.MaxEpoch || epoch != 0 {
				return 0, fmt.Errorf("kernel command line: %q: one epoch from 1 to %d is wanted", w, pcrpolicy.MaxEpoch)
			}
			epoch = n
		}
	}
	if epoch == 0 {
		return 0, errors.New("kernel command line: there is no bulkhead.epoch")
	}
	return epoch, nil
}

// Machine looks at the TPM. What cannot change any more is not asked again.
func (v *Vault) Machine() Machine {
	m := Machine{Unusable: v.noPCR, ImageEpoch: v.image.Epoch}
	t, err := v.cfg.TPM()
	if errors.Is(err, fs.ErrNotExist) {
		return m
	}
	m.TPM = true
	if err == nil {
		defer t.Close()
		err = v.ask(t, &m)
	}
	if err != nil {
		m.Unusable = err.Error()
	}
	return m
}

func (v *Vault) ask(t *tpm.TPM, m *Machine) error {
	pcr, err := t.PCR(pcrpolicy.PCRImage)
	if err != nil {
		return err
	}
	m.Capped = v.cappedAt(pcr)
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.owned {
		if v.owned, err = t.OwnerSet(); err != nil {
			return err
		}
	}
	if v.epoch < 0 {
		if n, err := t.Epoch(); err == nil { // without an index there is none yet
			v.epoch = n
		}
	}
	m.Owned, m.Epoch = v.owned, max(v.epoch, 0)
	return nil
}

// cappedAt reports whether a PCR 11 is what Cap left. A TPM that was reset behind the machine's back has another value.
func (v *Vault) cappedAt(pcr pcrpolicy.Digest) bool {
	data, err := readSmall(filepath.Join(v.cfg.Runtime, cappedFile))
	first, _, _ := strings.Cut(string(data), "\n")
	return err == nil && first == pcr.String()
}

// lastWhy returns why STATE did not open before PCR 11 was capped, also if that was before a restart of the process.
func (v *Vault) lastWhy() string {
	data, err := readSmall(filepath.Join(v.cfg.Runtime, cappedFile))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(data), "\n")
	return strings.TrimSpace(rest)
}

// Cap extends PCR 11, so that nothing that runs from now on can open what the image could, and takes a note of it. Between the two a
// crash makes the PCR be extended twice, which is no harm.
func (v *Vault) Cap() error {
	v.change.Lock()
	defer v.change.Unlock()
	t, err := v.cfg.TPM()
	if err != nil {
		return err
	}
	defer t.Close()
	if pcr, err := t.PCR(pcrpolicy.PCRImage); err != nil || v.cappedAt(pcr) {
		return err
	}
	if err := t.Cap(); err != nil {
		return err
	}
	pcr, err := t.PCR(pcrpolicy.PCRImage)
	if err != nil {
		return err
	}
	return v.noteCapped(pcr, v.Why("STATE"))
}

// noteCapped takes a note of the capped PCR's value, and of why STATE did not open.
func (v *Vault) noteCapped(pcr pcrpolicy.Digest, why string) error {
	path := filepath.Join(v.cfg.Runtime, cappedFile)
	if err := os.WriteFile(path+".new", []byte(pcr.String()+"\n"+why+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// forgetWhy is for when STATE got another key that opens it without a person: what went wrong at the start is settled.
func (v *Vault) forgetWhy() error {
	v.setWhy("STATE", "")
	data, err := readSmall(filepath.Join(v.cfg.Runtime, cappedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var pcr pcrpolicy.Digest
	first, _, _ := strings.Cut(string(data), "\n")
	if err := pcr.UnmarshalText([]byte(first)); err != nil {
		return err
	}
	return v.noteCapped(pcr, "")
}

// TakeOwnership sets the TPM owner's authorisation to a random value that is on STATE before. folder is storaged's own there.
func (v *Vault) TakeOwnership(folder *os.Root) error {
	v.change.Lock()
	defer v.change.Unlock()
	auth, err := keep(folder, ownerFile)
	if err != nil {
		return err
	}
	defer auth.Wipe()
	t, err := v.cfg.TPM()
	if err != nil {
		return err
	}
	defer t.Close()
	if set, err := t.OwnerSet(); err != nil || set {
		return err
	}
	return t.TakeOwnership(auth)
}

// GiveUpOwnership empties the TPM owner's authorisation, so that a system which comes later can set its own. It returns false if there was nothing to
// give up: no TPM, no owner, or one whose authorisation is not on STATE, because it is somebody else's.
func (v *Vault) GiveUpOwnership(folder *os.Root) (bool, error) {
	v.change.Lock()
	defer v.change.Unlock()
	t, err := v.cfg.TPM()
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer t.Close()
	if set, err := t.OwnerSet(); err != nil || !set {
		return false, err
	}
	auth, err := kept(folder, ownerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer auth.Wipe()
	if err := t.GiveUpOwnership(auth); err != nil {
		return false, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.owned = false
	return true, nil
}

// Epoch returns the TPM's epoch; kept is false if it keeps none: without a TPM, or while nothing was ever sealed to it.
func (v *Vault) Epoch() (epoch int, kept bool, err error) {
	t, err := v.cfg.TPM()
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	} else if err != nil {
		return 0, false, err
	}
	defer t.Close()
	epoch, err = t.Epoch()
	if errors.Is(err, tpm.ErrNoIndex) {
		return 0, false, nil
	}
	return epoch, err == nil, err
}

// RaiseEpoch makes images of older epochs unable to open anything here, for ever. Where no epoch is kept it does nothing.
func (v *Vault) RaiseEpoch(epoch int) error {
	v.change.Lock()
	defer v.change.Unlock()
	if _, kept, err := v.Epoch(); err != nil || !kept {
		return err
	}
	t, err := v.cfg.TPM()
	if err != nil {
		return err
	}
	defer t.Close()
	if err := t.RaiseEpoch(epoch); err != nil {
		return err
	}
	n, err := t.Epoch()
	v.mu.Lock()
	defer v.mu.Unlock()
	if err == nil {
		v.epoch = n
	}
	return err
}

// log reads the firmware's log; nil if there is none.
func (v *Vault) log() []byte {
	f, err := os.Open(v.cfg.Log)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, tpm.MaxLog+1))
	if err != nil {
		return nil
	}
	return b
}

// secretSize is that of keys that nobody has to remember, in bytes.
const secretSize = 32

// keep returns the secret in a file of the folder; if there is none it makes one, durably. Whoever reads half a file would lock himself
// out, so the file appears whole.
func keep(folder *os.Root, name string) (secret.Bytes, error) {
	s, err := kept(folder, name)
	if !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	s = secret.New(secretSize)
	return s, store(folder, name, s.Expose())
}

// kept reads it.
func kept(folder *os.Root, name string) (secret.Bytes, error) {
	f, err := folder.Open(name)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer f.Close()
	b, err := readAll(f, name)
	if err == nil && len(b) != secretSize {
		err = fmt.Errorf("%s: %d bytes, not %d", name, len(b), secretSize)
	}
	if err != nil {
		return secret.Bytes{}, err
	}
	return secret.From(b), nil
}

// store writes a file so that after a power cut it is there whole or not at all. Mode 0600.
func store(folder *os.Root, name string, data []byte) error {
	f, err := folder.OpenFile(name+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := folder.Rename(name+".new", name); err != nil {
		return err
	}
	d, err := folder.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
