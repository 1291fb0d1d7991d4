package vault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/unlock"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Wish is a key that somebody wants. Fields that its kind does not need are zero.
type Wish struct {
	Kind                Kind
	Passphrase          secret.Bytes
	Partition, Firmware string // KeyFile
	Address, Pin        string // Service
}

// String is for people.
func (w Wish) String() string {
	switch w.Kind {
	case KeyFile:
		return fmt.Sprintf("%s (%s)", w.Kind, tokenFile{w.Partition, w.Firmware})
	case Service:
		return fmt.Sprintf("%s (%s)", w.Kind, w.Address)
	}
	return string(w.Kind)
}

// Is reports whether a key is what the wish is for, as far as one can see.
func (w Wish) Is(k Key) bool {
	if k.Kind != w.Kind {
		return false
	}
	switch w.Kind {
	case KeyFile:
		return k.Detail == tokenFile{w.Partition, w.Firmware}.String()
	case Service:
		return k.Detail == w.Address
	}
	return true
}

// Volumes are the encrypted volumes of the node that are open, and storaged's folder on STATE.
type Volumes struct {
	State, Var *Target // nil: there is none, or it is locked
	Folder     *os.Root
}

func (o Volumes) targets() (out []Target) {
	for _, t := range []*Target{o.State, o.Var} {
		if t != nil {
			out = append(out, *t)
		}
	}
	return out
}

// Add adds a key to STATE; a recovery key to both volumes, with its text. The returned key's slot is on STATE.
func (v *Vault) Add(ctx context.Context, o Volumes, w Wish) (Key, string, error) {
	if o.State == nil {
		return Key{}, "", errs.New(errs.Precondition, "STATE is not encrypted, or it is locked")
	}
	if w.Kind == Recovery {
		return v.newRecovery(o, false)
	}
	c, err := v.wished(ctx, o.Folder, w)
	if err != nil {
		return Key{}, "", err
	}
	if w.Kind != Passphrase {
		defer c.Add.Wipe()
	}
	k, err := v.update(*o.State, func(h *luks.Header) (luks.Change, error) {
		if w.Kind != Passphrase && slices.ContainsFunc(keys(h), w.Is) {
			return c, errs.New(errs.Conflict, "there is such a key already; rotate it, or remove it first")
		}
		return c, nil
	})
	if err == nil && w.Kind.Automatic() {
		err = v.forgetWhy()
	}
	return k, "", err
}

// wished makes the change that a wish is for; the key comes from where the wish says.
func (v *Vault) wished(ctx context.Context, folder *os.Root, w Wish) (c luks.Change, err error) {
	switch w.Kind {
	case TPM:
		c, err = v.tpmChange()
	case Passphrase:
		if n := w.Passphrase.Len(); n < unlock.MinPassphrase || n > unlock.MaxPassphrase {
			return c, errs.New(errs.Invalid, "passphrase: %d bytes; allowed are %d to %d", n, unlock.MinPassphrase, unlock.MaxPassphrase)
		}
		return personChange(Passphrase, w.Passphrase)
	case KeyFile:
		f := tokenFile{w.Partition, w.Firmware}
		c.KDF = luks.Random
		if c.Add, err = v.readFile(f); err == nil {
			c.Token, err = newToken(KeyFile, f)
		}
	case Service:
		var s tokenService
		c.KDF = luks.Random
		if s, c.Add, err = v.newService(ctx, folder, w.Address, w.Pin); err == nil {
			c.Token, err = newToken(Service, s)
		}
	default:
		return c, errs.New(errs.Invalid, "a key of kind %.32q cannot be added", w.Kind)
	}
	if err != nil {
		return c, errs.New(errs.Precondition, "%s: %w", w.Kind, err)
	}
	return c, nil
}

// update changes an open volume's keyslots and returns the new one.
func (v *Vault) update(t Target, change func(*luks.Header) (luks.Change, error)) (Key, error) {
	v.change.Lock()
	defer v.change.Unlock()
	f, h, vk, err := v.opened(t)
	if err != nil {
		return Key{}, err
	}
	defer f.Close()
	defer vk.Wipe()
	c, err := change(h)
	if err != nil {
		return Key{}, err
	}
	n, err := h.Update(f, vk, c)
	if err != nil {
		return Key{}, err
	}
	for _, k := range keys(h) {
		if k.Slot == n {
			return k, nil
		}
	}
	return Key{}, nil
}

// newRecovery gives all volumes a new recovery key; without replace only if there is none.
func (v *Vault) newRecovery(o Volumes, replace bool) (Key, string, error) {
	if _, err := v.key(*o.State, func(k Key) bool { return k.Kind == Recovery }); err == nil && !replace {
		return Key{}, "", errs.New(errs.Conflict, "%s has a recovery key; rotate it", o.State.Name)
	}
	key := secret.From(unlock.NewRecoveryKey())
	defer key.Wipe()
	for _, t := range o.targets() {
		if err := v.replaceRecovery(t, key); err != nil {
			return Key{}, "", fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	// The answer has it: one that was waiting to be shown is void.
	if err := v.Acknowledge(o.targets()); err != nil {
		return Key{}, "", err
	}
	k, err := v.key(*o.State, func(k Key) bool { return k.Kind == Recovery })
	return k, string(key.Expose()), err
}

// key finds a key of a volume.
func (v *Vault) key(t Target, is func(Key) bool) (Key, error) {
	f, h, err := header(t)
	if err != nil {
		return Key{}, err
	}
	defer f.Close()
	for _, k := range keys(h) {
		if is(k) {
			return k, nil
		}
	}
	return Key{}, errs.New(errs.NotFound, "%s has no such key", t.Name)
}

// Remove removes a key for ever; a recovery key from both volumes. Without locked it refuses to remove the last one that opens the
// volume without a person.
func (v *Vault) Remove(o Volumes, volume string, slot int, locked bool) error {
	all := o.targets()
	i := slices.IndexFunc(all, func(t Target) bool { return t.Name == volume })
	if i < 0 {
		return errs.New(errs.Precondition, "%s is not encrypted, or it is locked", volume)
	}
	k, err := v.key(all[i], func(k Key) bool { return k.Slot == slot })
	if err != nil {
		return err
	}
	if k.Kind != Recovery {
		all = all[i : i+1]
	}
	for _, t := range all { // all or none: what is refused for one is so before the first is changed
		if _, err := v.removal(t, k, locked); err != nil {
			return err
		}
	}
	for _, t := range all {
		if _, err := v.update(t, func(*luks.Header) (luks.Change, error) { return v.removal(t, k, locked) }); err != nil {
			return err
		}
	}
	return nil
}

// removal is the change that takes a key away, or why it must stay. A recovery key is all of the volume's.
func (v *Vault) removal(t Target, k Key, locked bool) (c luks.Change, err error) {
	f, h, err := header(t)
	if err != nil {
		return c, err
	}
	defer f.Close()
	left := 0
	for _, x := range keys(h) {
		switch {
		case x.Slot == k.Slot && x.Kind == k.Kind, k.Kind == Recovery && x.Kind == Recovery:
			c.Remove = append(c.Remove, x.Slot)
		case x.Kind.Automatic():
			left++
		}
	}
	switch {
	case len(c.Remove) == len(h.Keyslots):
		return c, errs.New(errs.Precondition, "it is the last key of %s: without it its data are lost", t.Name)
	case k.Kind == State:
		return c, errs.New(errs.Precondition, "%s opens by it whenever STATE is open; it stays", t.Name)
	case k.Kind.Automatic() && left == 0 && !locked:
		return c, errs.New(errs.Precondition, "it is the last key that opens %s without a person; from the next start on somebody would have to unlock it: say so if that is wanted", t.Name)
	}
	return c, nil
}

// Rotate replaces a key by a new one of its kind in one step. With a recovery key it returns the text of the new one; passphrase is the new one of a passphrase.
func (v *Vault) Rotate(ctx context.Context, o Volumes, volume string, slot int, passphrase secret.Bytes) (Key, string, error) {
	all := o.targets()
	i := slices.IndexFunc(all, func(t Target) bool { return t.Name == volume })
	if i < 0 || o.State == nil {
		return Key{}, "", errs.New(errs.Precondition, "%s is not encrypted, or it is locked", volume)
	}
	old, err := v.key(all[i], func(k Key) bool { return k.Slot == slot })
	if err != nil {
		return Key{}, "", err
	}
	if old.Kind == Recovery {
		return v.newRecovery(o, true)
	}
	if volume != o.State.Name {
		return Key{}, "", errs.New(errs.Precondition, "keys of %s follow from STATE: only its recovery key can be rotated", volume)
	}
	w, err := v.wishOf(all[i], old)
	if err != nil {
		return Key{}, "", err
	}
	w.Passphrase = passphrase
	c, err := v.wished(ctx, o.Folder, w)
	if err != nil {
		return Key{}, "", err
	}
	if w.Kind != Passphrase {
		defer c.Add.Wipe()
	}
	c.Remove = []int{slot}
	k, err := v.update(all[i], func(h *luks.Header) (luks.Change, error) {
		if _, ok := h.Keyslots[slot]; !ok {
			return c, errs.New(errs.Conflict, "somebody else has removed it meanwhile")
		}
		return c, nil
	})
	if err == nil && w.Kind.Automatic() {
		err = v.forgetWhy()
	}
	return k, "", err
}

// wishOf is the wish that would make such a key again.
func (v *Vault) wishOf(t Target, k Key) (Wish, error) {
	f, h, err := header(t)
	if err != nil {
		return Wish{}, err
	}
	defer f.Close()
	w := Wish{Kind: k.Kind}
	for _, token := range tokens(h, k.Kind) {
		if !slices.Contains(token.Keyslots, k.Slot) {
			continue
		}
		switch k.Kind {
		case KeyFile:
			s, err := value[tokenFile](token)
			w.Partition, w.Firmware = s.Partition, s.Firmware
			return w, err
		case Service:
			s, err := value[tokenService](token)
			w.Address, w.Pin = s.Address, s.Pin
			return w, err
		}
		return w, nil
	}
	return w, errors.New("it is nothing of ours")
}
