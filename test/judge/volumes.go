package judge

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// What storaged has written on disks, and never changes: see storaged/layout.go, storaged/vault/token.go.
const (
	unformatted   = 1 << 48
	stateLabel    = "BULKHEAD-STATE"
	tokenTPM      = "bulkhead-tpm2"
	tokenRecovery = "bulkhead-recovery"
	tokenState    = "bulkhead-state"
)

// A volume is an encrypted one that opens.
type volume struct {
	piece
	header *luks.Header
	key    secret.Bytes
}

// state looks at the volumes and what is on STATE.
func (j *Judge) state(d Disk, t gpt.Table) (Found, error) {
	if p, ok := t.ByName("STATE"); !ok || p.Attributes&unformatted != 0 {
		return Found{}, nil
	}
	v, err := j.volume(d, t, "STATE", tokenTPM)
	if err != nil {
		return Found{}, err
	}
	from, length := v.from+v.header.Segment.Offset, v.length-v.header.Segment.Offset
	on, err := once(j, "files "+v.header.UUID, [4]uint64{d.Sum(from, length)}, func() (contents, error) { return j.files(v, from, length) })
	if err != nil {
		return Found{}, fmt.Errorf("STATE: %w", err)
	}
	f := Found{Formatted: true, Owner: on.owner, Generation: on.generation, Documents: on.documents, Repaired: on.repaired}
	if p, ok := t.ByName("VAR"); !ok || p.Attributes&unformatted != 0 {
		return f, nil
	}
	w, err := j.volume(d, t, "VAR", tokenState)
	if err != nil {
		return f, err
	}
	_, err = once(j, "VAR by STATE "+hex.EncodeToString(on.varKey), [4]uint64{w.Sum(w.from, luks.DataOffset)}, func() (bool, error) {
		_, _, err := w.header.Open(readOnly{w.reader()}, secret.From(on.varKey), keyslots(w.header, tokenState)...)
		return true, err
	})
	if err != nil {
		return f, fmt.Errorf("VAR: the key on STATE: %w", err)
	}
	return f, nil
}

// volume reads a header, and opens it as a person would. The keyslot that opens it without a person must be as it was made: what is in it is
// the TPM's secret, so it is compared with what Learn has seen.
func (j *Judge) volume(d Disk, t gpt.Table, name, automatic string) (volume, error) {
	p, err := part(d, t, name)
	if err != nil {
		return volume{}, err
	}
	h, err := once(j, "header "+name, [4]uint64{d.Sum(p.from, luks.DataOffset)}, func() (volume, error) {
		h, _, err := luks.Read(p.reader())
		if err != nil {
			return volume{}, err
		}
		v := volume{header: h}
		if v.key, err = j.byPerson(p, h); err != nil {
			return volume{}, err
		}
		for _, n := range keyslots(h, automatic) {
			id, err := identity(p, h, n)
			if err != nil {
				return volume{}, err
			}
			j.mu.Lock()
			known := j.slots[id]
			j.mu.Unlock()
			if known {
				return v, nil
			}
		}
		return volume{}, fmt.Errorf("no key of the kind %s is whole", automatic)
	})
	if err != nil {
		return volume{}, fmt.Errorf("%s: %w", name, err)
	}
	h.piece = p
	return h, nil
}

// byPerson opens a volume with a recovery key that somebody has or had.
func (j *Judge) byPerson(p piece, h *luks.Header) (secret.Bytes, error) {
	for _, n := range keyslots(h, tokenRecovery) {
		id, err := identity(p, h, n)
		if err != nil {
			return secret.Bytes{}, err
		}
		key, err := once(j, "recovery "+hex.EncodeToString(id[:]), [4]uint64{}, func() (secret.Bytes, error) { // argon2id takes its time
			for _, text := range j.o.Recovery {
				typed, err := unlock.ParseRecoveryKey(text)
				if err != nil {
					return secret.Bytes{}, err
				}
				if key, _, err := h.Open(readOnly{p.reader()}, secret.From(typed), n); err == nil {
					return key, nil
				}
			}
			return secret.Bytes{}, luks.ErrKey
		})
		if err == nil && h.Is(key) {
			return key, nil
		}
	}
	return secret.Bytes{}, errors.New("no recovery key opens it")
}

// keyslots returns those of the tokens of a type.
func keyslots(h *luks.Header, typ string) (out []int) {
	for _, t := range h.Tokens {
		if t.Type == typ {
			out = append(out, t.Keyslots...)
		}
	}
	slices.Sort(out)
	return out
}

// identity tells a keyslot apart, with its area and the token that says what opens it.
func identity(p piece, h *luks.Header, n int) (id [32]byte, err error) {
	k, ok := h.Keyslots[n]
	if !ok {
		return id, fmt.Errorf("there is no keyslot %d", n)
	}
	area := make([]byte, k.Size)
	if _, err := p.reader().ReadAt(area, k.Offset); err != nil {
		return id, err
	}
	sum := sha256.New()
	sum.Write(area)
	fmt.Fprintf(sum, "%+v", k.KDF)
	for _, t := range h.Tokens {
		if slices.Contains(t.Keyslots, n) && t.Type == tokenTPM {
			text, err := json.Marshal(t.Fields)
			if err != nil {
				return id, err
			}
			sum.Write(text)
		}
	}
	return [32]byte(sum.Sum(nil)), nil
}

// Learn takes the keyslots of a disk for whole: it is called for disks of machines that were in order.
func (j *Judge) Learn(d Disk) error {
	t, _, err := gpt.Read(d, d.Size())
	if err != nil {
		return err
	}
	for _, name := range []string{"STATE", "VAR"} {
		p, err := part(d, t, name)
		if err != nil {
			continue
		}
		h, _, err := luks.Read(p.reader())
		if err != nil {
			continue
		}
		for n := range h.Keyslots {
			id, err := identity(p, h, n)
			if err != nil {
				return err
			}
			j.mu.Lock()
			j.slots[id] = true
			j.mu.Unlock()
		}
	}
	return nil
}

// Contents are what counts on STATE.
type contents struct {
	owner, documents string
	generation       uint64
	varKey           []byte
	repaired         bool
}

// files mounts STATE, as far as that goes without a kernel, and reads what is on it.
func (j *Judge) files(v volume, from, length int64) (c contents, err error) {
	dir, err := os.MkdirTemp(j.o.Folder, "state-")
	if err != nil {
		return c, err
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "image")
	if err := j.decrypt(v, from, length, image); err != nil {
		return c, err
	}
	if c.repaired, err = mountable(image); err != nil {
		return c, err
	}
	if err := errors.Join(dump(image, dir), sound(image)); err != nil {
		return c, err
	}
	if c.varKey, err = optional(dir, "storaged/var.key"); err != nil {
		return c, err
	}
	identity, err := optional(dir, "trustd/identity.json")
	if err != nil {
		return c, err
	}
	for name, b := range map[string][]byte{"trustd/identity.json": identity, "updated/journal.json": nil} {
		if b == nil {
			if b, err = optional(dir, name); err != nil {
				return c, err
			}
		}
		if b != nil && !json.Valid(b) {
			return c, fmt.Errorf("%s is not whole: %d bytes", name, len(b))
		}
	}
	if identity != nil {
		sum := sha256.Sum256(identity)
		c.owner = hex.EncodeToString(sum[:])
	}
	c.generation, c.documents, err = newest(filepath.Join(dir, "machined"))
	return c, err
}

// optional reads a file that need not be there.
func optional(dir, name string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}
