package storaged

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzMended reads a superblock that does not fit its checksum, and its copy. Only the checksum is ever changed, and only if the copy is whole.
func FuzzMended(f *testing.F) {
	good := make([]byte, superSize)
	copy(good[0x38:], "\x53\xef")
	binary.LittleEndian.PutUint32(good[checksumAt:], superSum(good))
	f.Add(good, good)
	torn := bytes.Clone(good)
	torn[0x2c]++
	f.Add(torn, good)
	testfuzz.Run(f, func(t *testing.T, torn, copied []byte) {
		a, b := make([]byte, superSize), make([]byte, superSize)
		copy(a, torn)
		copy(b, copied)
		was := bytes.Clone(a)
		out, err := mended(a, b)
		if !bytes.Equal(a, was) {
			t.Error("what was read is changed")
		}
		if err == nil && (!bytes.Equal(out[:checksumAt], a[:checksumAt]) || binary.LittleEndian.Uint32(out[checksumAt:]) != superSum(out) || binary.LittleEndian.Uint32(b[checksumAt:]) != superSum(b)) {
			t.Errorf("%x and %x become %x", a, b, out)
		}
	})
}
