package luks

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"

	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Health tells which copies of a header are good. The zero value is a header in order.
type Health struct {
	Primary   error // why the first copy cannot be used, or that it is older
	Secondary error // the same of the second
}

// OK reports whether nothing needs Repair.
func (h Health) OK() bool { return h.Primary == nil && h.Secondary == nil }

var errOlder = errors.New("it is older than the other copy")

// Read returns the newer of the two copies that are good. Without any it returns ErrNone if there is no trace of one, else what
// is wrong with them. It changes nothing.
func Read(dev io.ReaderAt) (*Header, Health, error) {
	first, err1 := readCopy(dev, magicPrimary, 0)
	var second *Header
	err2 := error(ErrNone)
	if first != nil {
		second, err2 = readCopy(dev, magicSecondary, first.Size)
	} else {
		for at := int64(16 << 10); at <= maxHeader && errors.Is(err2, ErrNone); at *= 2 { // all places that there can be
			second, err2 = readCopy(dev, magicSecondary, at)
		}
	}
	switch {
	case first == nil && second == nil:
		if errors.Is(err1, ErrNone) && errors.Is(err2, ErrNone) {
			return nil, Health{}, ErrNone
		}
		return nil, Health{err1, err2}, fmt.Errorf("first copy: %w; second copy: %w", err1, err2)
	case first == nil:
		return second, Health{Primary: err1}, nil
	case second == nil:
		return first, Health{Secondary: err2}, nil
	case first.UUID != second.UUID: // the second is what another volume left
		return first, Health{Secondary: errors.New("it is another volume's")}, nil
	case first.Sequence < second.Sequence:
		return second, Health{Primary: errOlder}, nil
	case first.Sequence > second.Sequence:
		return first, Health{Secondary: errOlder}, nil
	}
	return first, Health{}, nil
}

func readCopy(dev io.ReaderAt, magic string, at int64) (*Header, error) {
	b := make([]byte, binarySize)
	if _, err := dev.ReadAt(b, at); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, ErrNone
		}
		return nil, err
	}
	size, err := copySize(b, magic)
	if err != nil {
		return nil, err
	}
	if magic == magicSecondary && size != at {
		return nil, ErrNone
	}
	b = append(b, make([]byte, size-binarySize)...)
	if _, err := dev.ReadAt(b[binarySize:], at+binarySize); err != nil {
		return nil, err
	}
	return decode(b, magic, at)
}

// write writes both copies under the next sequence number: the second, then the first, each flushed. Whenever the power
// fails, at least one is whole, and of two whole ones the newer counts. On an error h is as it was; the disk may have either.
func (h *Header) write(dev Device) error {
	next := *h
	next.Sequence++
	if err := next.put(dev); err != nil {
		return err
	}
	h.Sequence = next.Sequence
	return nil
}

func (h *Header) put(dev Device) error {
	for _, c := range []struct {
		magic string
		at    int64
	}{{magicSecondary, h.Size}, {magicPrimary, 0}} {
		b, err := h.encode(c.magic, c.at)
		if err != nil {
			return err
		}
		if _, err := decode(b, c.magic, c.at); err != nil { // never write what could not be read again
			return err
		}
		if _, err := dev.WriteAt(b, c.at); err != nil {
			return fmt.Errorf("write LUKS2 header: %w", err)
		}
		if err := dev.Sync(); err != nil {
			return fmt.Errorf("write LUKS2 header: %w", err)
		}
	}
	return nil
}

// Repair writes both copies anew, from what Read returned.
func (h *Header) Repair(dev Device) error { return h.write(dev) }

// Options are for Format.
type Options struct {
	UUID       string // "" draws one
	Label      string // at most 47 bytes
	SectorSize int    // of the encrypted data; 0 means 4096
}

// Format makes a new volume without any keyslot on dev, and returns its header and volume key. All that an older header or keyslot left is
// overwritten first. It has no place in the sequence of changes that a power cut may interrupt: a cut leaves nothing usable.
func Format(dev Device, o Options) (*Header, secret.Bytes, error) {
	if o.UUID == "" {
		o.UUID = newUUID()
	}
	if o.SectorSize == 0 {
		o.SectorSize = 4096
	}
	if !uuidForm().MatchString(o.UUID) || len(o.Label) >= atAlgorithm-atLabel || bits.OnesCount(uint(o.SectorSize)) != 1 || o.SectorSize < 512 || o.SectorSize > 4096 {
		return nil, secret.Bytes{}, fmt.Errorf("format: impossible options %+v", o)
	}
	key := secret.New(KeySize)
	d, err := newDigest(key)
	if err != nil {
		return nil, secret.Bytes{}, err
	}
	h := &Header{
		UUID: o.UUID, Label: o.Label, Size: headerSize, Keyslots: map[int]Keyslot{}, Tokens: map[int]Token{},
		Segment: Segment{Offset: DataOffset, SectorSize: o.SectorSize}, digest: d, area: DataOffset - 2*headerSize, priority: map[int]int{},
	}
	noise := make([]byte, 1<<20)
	for at := int64(0); at < DataOffset; at += int64(len(noise)) {
		_, _ = rand.Read(noise) // never fails
		if at == 0 {
			clear(noise[:2*headerSize])
		}
		if _, err := dev.WriteAt(noise, at); err != nil {
			return nil, secret.Bytes{}, fmt.Errorf("format: %w", err)
		}
	}
	if err := dev.Sync(); err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("format: %w", err)
	}
	if err := h.write(dev); err != nil {
		return nil, secret.Bytes{}, err
	}
	return h, key, nil
}

func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:])  // never fails
	b[6] = b[6]&0x0f | 0x40 // version 4
	b[8] = b[8]&0x3f | 0x80 // of RFC 9562
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Open returns the volume key, and the keyslot that gave it. It tries the slots given, or all if there are none, cheap ones first. ErrKey
// says that none opens with this key; a slot that cannot be used is passed over if another one opens.
func (h *Header) Open(dev Device, key secret.Bytes, only ...int) (secret.Bytes, int, error) {
	if len(only) == 0 {
		only = slices.SortedFunc(maps.Keys(h.Keyslots), func(a, b int) int {
			if ka, kb := h.Keyslots[a].KDF.Memory, h.Keyslots[b].KDF.Memory; ka != kb {
				return ka - kb
			}
			return a - b
		})
	}
	var errs []error
	for _, n := range only {
		k, ok := h.Keyslots[n]
		if !ok {
			return secret.Bytes{}, 0, fmt.Errorf("there is no keyslot %d", n)
		}
		got, err := k.open(dev, key)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if h.Is(got) {
			return got, n, nil
		}
		got.Wipe()
	}
	return secret.Bytes{}, 0, errors.Join(append(errs, ErrKey)...)
}

// Change is what Update does to the keyslots in one step.
type Change struct {
	// Add, if not empty, is the key for a new keyslot.
	Add secret.Bytes
	// KDF is that of the new slot, without a salt.
	KDF KDF
	// Token, if it has a type, is added for the new slot.
	Token Token
	// Remove lists keyslots that go away, with the tokens that are for them alone.
	Remove []int
}

// Update changes keyslots while the volume may be open. The new slot's area is written first, then the header, then the areas of removed
// slots are overwritten: a power cut leaves all the old slots or all the new ones, never neither. It returns the new slot's number, or -1. It refuses to
// remove the last slot (ErrLast).
func (h *Header) Update(dev Device, volumeKey secret.Bytes, c Change) (int, error) {
	next := h.clone()
	var gone []Keyslot
	for _, n := range c.Remove {
		k, ok := next.Keyslots[n]
		if !ok {
			return -1, fmt.Errorf("there is no keyslot %d", n)
		}
		gone = append(gone, k)
		next.drop(n)
	}
	added := -1
	if c.Add.Len() > 0 {
		if !h.Is(volumeKey) {
			return -1, errors.New("this is not the volume's key")
		}
		var err error
		if added, err = h.add(dev, next, volumeKey, c); err != nil {
			return -1, err
		}
	}
	if len(next.Keyslots) == 0 {
		return -1, ErrLast
	}
	if err := next.write(dev); err != nil {
		return -1, err
	}
	*h = *next
	for _, k := range gone {
		noise := make([]byte, k.Size)
		_, _ = rand.Read(noise) // never fails
		if _, err := dev.WriteAt(noise, k.Offset); err != nil {
			return added, fmt.Errorf("overwrite a removed keyslot: %w", err)
		}
	}
	if len(gone) > 0 {
		return added, dev.Sync()
	}
	return added, nil
}

// add puts a new slot into next, writes its area where h has none, and reads it back.
func (h *Header) add(dev Device, next *Header, volumeKey secret.Bytes, c Change) (int, error) {
	n, err := h.free()
	if err != nil {
		return -1, err
	}
	k := Keyslot{KeySize: volumeKey.Len(), Size: areaSize(volumeKey.Len()), Hash: "sha256", KDF: c.KDF}
	if k.Offset, err = h.room(k.Size); err != nil {
		return -1, err
	}
	k.KDF.Salt = secret.New(32).Expose()
	area, err := k.seal(volumeKey, c.Add)
	if err != nil {
		return -1, err
	}
	if _, err := dev.WriteAt(area, k.Offset); err != nil {
		return -1, fmt.Errorf("write a keyslot: %w", err)
	}
	if err := dev.Sync(); err != nil {
		return -1, fmt.Errorf("write a keyslot: %w", err)
	}
	got := make([]byte, len(area))
	if _, err := dev.ReadAt(got, k.Offset); err != nil || !slices.Equal(got, area) {
		return -1, errors.Join(errors.New("a keyslot does not read back as it was written"), err)
	}
	next.Keyslots[n] = k
	if c.Token.Type != "" {
		t := c.Token
		t.Keyslots = []int{n}
		at := 0
		for ; at < maxTokens; at++ {
			if _, taken := next.Tokens[at]; !taken {
				break
			}
		}
		next.Tokens[at] = t
	}
	return n, nil
}

// SetToken replaces a token's fields; the token must exist.
func (h *Header) SetToken(dev Device, number int, fields Token) error {
	next := h.clone()
	t, ok := next.Tokens[number]
	if !ok {
		return fmt.Errorf("there is no token %d", number)
	}
	t.Fields = fields.Fields
	next.Tokens[number] = t
	if err := next.write(dev); err != nil {
		return err
	}
	*h = *next
	return nil
}

// drop takes a slot out, and tokens that are for nothing else.
func (h *Header) drop(n int) {
	delete(h.Keyslots, n)
	delete(h.priority, n)
	for i, t := range h.Tokens {
		if !slices.Contains(t.Keyslots, n) {
			continue
		}
		t.Keyslots = slices.DeleteFunc(slices.Clone(t.Keyslots), func(s int) bool { return s == n })
		if h.Tokens[i] = t; len(t.Keyslots) == 0 {
			delete(h.Tokens, i)
		}
	}
}

// free returns a number that no slot has.
func (h *Header) free() (int, error) {
	for n := range MaxKeyslots {
		if _, taken := h.Keyslots[n]; !taken {
			return n, nil
		}
	}
	return 0, fmt.Errorf("all %d keyslots are taken", MaxKeyslots)
}

// room returns where an area of so many bytes fits between those that are there.
func (h *Header) room(size int64) (int64, error) {
	at := 2 * h.Size
	for _, k := range slices.SortedFunc(maps.Values(h.Keyslots), func(a, b Keyslot) int { return int(a.Offset - b.Offset) }) {
		if k.Offset-at >= size {
			break
		}
		at = k.Offset + k.Size
	}
	if at+size > 2*h.Size+h.area {
		return 0, errors.New("there is no room for another keyslot")
	}
	return at, nil
}

// clone copies all that is changed in place.
func (h *Header) clone() *Header {
	c := *h
	c.Keyslots, c.Tokens, c.priority = maps.Clone(h.Keyslots), maps.Clone(h.Tokens), maps.Clone(h.priority)
	return &c
}
