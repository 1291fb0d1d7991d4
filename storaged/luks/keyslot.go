package luks

import (
	"crypto/aes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/xts"

	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// areaSize is what a keyslot for a key of this size takes on the disk, in bytes.
func areaSize(key int) int64 {
	return (int64(key)*stripes + areaAlign - 1) / areaAlign * areaAlign
}

// derive makes a key of n bytes out of what opens the slot. With argon2id it takes k.Memory and about a second.
func (k KDF) derive(key secret.Bytes, n int) (secret.Bytes, error) {
	if err := k.check(); err != nil {
		return secret.Bytes{}, err
	}
	if k.Type == "argon2id" {
		return secret.From(argon2.IDKey(key.Expose(), k.Salt, uint32(k.Time), uint32(k.Memory), uint8(k.CPUs), uint32(n))), nil
	}
	out, err := pbkdf2.Key(hashes[k.Hash], string(key.Expose()), k.Salt, k.Iterations, n)
	return secret.From(out), err
}

// crypt encrypts or decrypts a keyslot's area in place, in sectors of 512 bytes that are counted from its start.
func crypt(key secret.Bytes, area []byte, encrypt bool) error {
	c, err := xts.NewCipher(aes.NewCipher, key.Expose())
	if err != nil {
		return err
	}
	for i := 0; i+sectorSize <= len(area); i += sectorSize {
		s := area[i : i+sectorSize]
		if encrypt {
			c.Encrypt(s, s, uint64(i/sectorSize))
		} else {
			c.Decrypt(s, s, uint64(i/sectorSize))
		}
	}
	return nil
}

// diffuse is LUKS1's: each piece as long as a digest is replaced by the digest of its number and itself.
func diffuse(h hash.Hash, b []byte) {
	var sum, number []byte
	for i := 0; i*h.Size() < len(b); i++ {
		piece := b[i*h.Size() : min((i+1)*h.Size(), len(b))]
		number = binary.BigEndian.AppendUint32(number[:0], uint32(i))
		h.Reset()
		h.Write(number)
		h.Write(piece)
		sum = h.Sum(sum[:0])
		copy(piece, sum)
	}
	clear(sum)
}

// split spreads a key over so many stripes that a few lost sectors of an area lose the key: that is how one is wiped.
func split(newHash func() hash.Hash, key []byte) []byte {
	n := len(key)
	out := make([]byte, n*stripes)
	_, _ = rand.Read(out[:n*(stripes-1)]) // never fails
	d, h := make([]byte, n), newHash()
	for i := range stripes - 1 {
		subtle.XORBytes(d, d, out[i*n:(i+1)*n])
		diffuse(h, d)
	}
	subtle.XORBytes(out[n*(stripes-1):], d, key)
	clear(d)
	return out
}

// merge undoes split.
func merge(newHash func() hash.Hash, b []byte, n int) secret.Bytes {
	d, h := make([]byte, n), newHash()
	for i := range stripes - 1 {
		subtle.XORBytes(d, d, b[i*n:(i+1)*n])
		diffuse(h, d)
	}
	subtle.XORBytes(d, d, b[n*(stripes-1):n*stripes])
	return secret.From(d)
}

// seal encrypts the volume key for a new slot, and returns the area's content.
func (k Keyslot) seal(volumeKey, key secret.Bytes) ([]byte, error) {
	derived, err := k.KDF.derive(key, k.KeySize)
	if err != nil {
		return nil, err
	}
	defer derived.Wipe()
	area := make([]byte, k.Size)
	copy(area, split(hashes[k.Hash], volumeKey.Expose()))
	return area, crypt(derived, area, true)
}

// open returns what the area holds under a key, whether it is a volume key or not.
func (k Keyslot) open(dev Device, key secret.Bytes) (secret.Bytes, error) {
	area := make([]byte, (k.KeySize*stripes+sectorSize-1)/sectorSize*sectorSize)
	if _, err := dev.ReadAt(area, k.Offset); err != nil {
		return secret.Bytes{}, fmt.Errorf("read a keyslot at %d: %w", k.Offset, err)
	}
	derived, err := k.KDF.derive(key, k.KeySize)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer derived.Wipe()
	defer clear(area)
	if err := crypt(derived, area, false); err != nil {
		return secret.Bytes{}, err
	}
	return merge(hashes[k.Hash], area, k.KeySize), nil
}

// newDigest makes the digest by which the key is recognised. A volume key is random: nothing need be stretched.
func newDigest(volumeKey secret.Bytes) (digest, error) {
	d := digest{hash: "sha256", iterations: 1000, salt: make([]byte, 32)}
	_, _ = rand.Read(d.salt) // never fails
	var err error
	d.sum, err = pbkdf2.Key(hashes[d.hash], string(volumeKey.Expose()), d.salt, d.iterations, 32)
	return d, err
}

// Is reports whether a key is the volume's.
func (h *Header) Is(volumeKey secret.Bytes) bool {
	sum, err := pbkdf2.Key(hashes[h.digest.hash], string(volumeKey.Expose()), h.digest.salt, h.digest.iterations, len(h.digest.sum))
	return err == nil && subtle.ConstantTimeCompare(sum, h.digest.sum) == 1
}
