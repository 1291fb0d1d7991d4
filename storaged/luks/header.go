package luks

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"hash"

	"github.com/bulkhead-os/bulkhead/internal/pattern"
)

var be = binary.BigEndian

// The two copies' magics: the first at the start of the device, the second behind it.
const (
	magicPrimary   = "LUKS\xba\xbe"
	magicSecondary = "SKUL\xba\xbe"
)

// Places in the binary part of a header.
const (
	atVersion   = 6
	atSize      = 8
	atSequence  = 16
	atLabel     = 24
	atAlgorithm = 72
	atSalt      = 104
	atUUID      = 168
	atSubsystem = 208
	atOffset    = 256
	atPadding   = 264
	atChecksum  = 448
	endChecksum = 512
)

// hashes are those that headers may name.
var hashes = map[string]func() hash.Hash{"sha256": sha256.New, "sha512": sha512.New}

// size returns the length of one copy that b begins, or why it begins none.
func copySize(b []byte, magic string) (int64, error) {
	if len(b) < binarySize || string(b[:len(magic)]) != magic || be.Uint16(b[atVersion:]) != 2 {
		return 0, ErrNone
	}
	n := be.Uint64(b[atSize:])
	if n < 16<<10 || n > maxHeader || n&(n-1) != 0 {
		return 0, fmt.Errorf("LUKS2 header: its size, %d bytes, is impossible", n)
	}
	return int64(n), nil
}

// uuidForm is what device-mapper's names are made from, so it must be just this.
var uuidForm = pattern.Lazy(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// decode reads one whole copy, which lies at an offset of the device.
func decode(b []byte, magic string, offset int64) (*Header, error) {
	size, err := copySize(b, magic)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) < size {
		return nil, fmt.Errorf("LUKS2 header: it ends after %d of %d bytes", len(b), size)
	}
	b = b[:size]
	if at := be.Uint64(b[atOffset:]); at != uint64(offset) {
		return nil, fmt.Errorf("LUKS2 header: it lies at %d and says %d", offset, at)
	}
	if alg := text(b[atAlgorithm:atSalt]); alg != "sha256" {
		return nil, fmt.Errorf("LUKS2 header: checksum %q; only sha256 is known", alg)
	}
	if sum := checksum(b); !bytes.Equal(sum[:], b[atChecksum:atChecksum+sha256.Size]) {
		return nil, fmt.Errorf("LUKS2 header: the checksum is wrong")
	}
	h := &Header{
		UUID: text(b[atUUID:atSubsystem]), Label: text(b[atLabel:atAlgorithm]), Subsystem: text(b[atSubsystem:atOffset]),
		Sequence: be.Uint64(b[atSequence:]), Size: size,
	}
	if !uuidForm().MatchString(h.UUID) {
		return nil, fmt.Errorf("LUKS2 header: the UUID %q has not the form of one", h.UUID)
	}
	document, rest, _ := bytes.Cut(b[binarySize:], []byte{0})
	if len(bytes.Trim(rest, "\x00")) > 0 {
		return nil, fmt.Errorf("LUKS2 header: there is something behind the JSON")
	}
	if err := h.parse(document); err != nil {
		return nil, fmt.Errorf("LUKS2 header: %w", err)
	}
	return h, nil
}

// text is a field up to its first NUL.
func text(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

// checksum is over the whole copy with zeros in the checksum's own place.
func checksum(b []byte) [sha256.Size]byte {
	s := sha256.New()
	s.Write(b[:atChecksum])
	s.Write(make([]byte, endChecksum-atChecksum))
	s.Write(b[endChecksum:])
	return [sha256.Size]byte(s.Sum(nil))
}

// encode writes one copy, to lie at an offset of the device.
func (h *Header) encode(magic string, offset int64) ([]byte, error) {
	document, err := h.document()
	if err != nil {
		return nil, err
	}
	if n := h.Size - binarySize; int64(len(document)) >= n {
		return nil, fmt.Errorf("LUKS2 header: keyslots and tokens take %d bytes, %d is the most: remove a key", len(document), n-1)
	}
	b := make([]byte, h.Size)
	copy(b, magic)
	be.PutUint16(b[atVersion:], 2)
	be.PutUint64(b[atSize:], uint64(h.Size))
	be.PutUint64(b[atSequence:], h.Sequence)
	copy(b[atLabel:atAlgorithm-1], h.Label)
	copy(b[atAlgorithm:], "sha256")
	_, _ = rand.Read(b[atSalt:atUUID]) // never fails; it makes each write another one
	copy(b[atUUID:atSubsystem-1], h.UUID)
	copy(b[atSubsystem:atOffset-1], h.Subsystem)
	be.PutUint64(b[atOffset:], uint64(offset))
	copy(b[binarySize:], document)
	sum := checksum(b)
	copy(b[atChecksum:], sum[:])
	return b, nil
}
