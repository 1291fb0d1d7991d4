package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"io"
	"math"
)

// Where files are cut follows from their content (gear hash), so that what is equal in two versions gives equal chunks, wherever it
// lies. The numbers and the table are part of the format only for the sake of reuse: a node takes any chunks that a manifest names,
// but finds the equal ones of its running version by cutting that one again.
const (
	MinChunk = 16 << 10  // bytes; but for a file's last chunk, and files that are smaller
	MaxChunk = 256 << 10 // bytes
	aim      = 64 << 10  // bytes, on average
)

// boundary: a chunk ends behind the byte that makes the hash smaller than this, which happens once in aim-MinChunk bytes.
const boundary = math.MaxUint64 / (aim - MinChunk)

// gear has a random number for each byte: the first eight bytes, big endian, of the SHA-256 of "bulkhead gear " and the byte.
var gear = func() (t [256]uint64) {
	for i := range t {
		sum := sha256.Sum256(append([]byte("bulkhead gear "), byte(i)))
		t[i] = binary.BigEndian.Uint64(sum[:])
	}
	return t
}()

// cut returns the length of the first chunk of b, which must hold MaxChunk bytes unless the data end there.
func cut(b []byte) int {
	if len(b) <= MinChunk {
		return len(b)
	}
	b = b[:min(len(b), MaxChunk)]
	var h uint64
	for i := MinChunk - 64; i < len(b); i++ { // a byte counts in 64 rounds
		h = h<<1 + gear[b[i]]
		if i >= MinChunk-1 && h < boundary {
			return i + 1
		}
	}
	return len(b)
}

// Split cuts what r holds and calls f with each chunk, in order. The bytes are valid until f returns. It holds 512 KiB.
func Split(r io.Reader, f func(offset int64, chunk []byte) error) error {
	buf := make([]byte, 2*MaxChunk)
	have, offset, end := 0, int64(0), false
	for {
		for !end && have < MaxChunk {
			n, err := r.Read(buf[have:])
			have += n
			if err == io.EOF {
				end = true
			} else if err != nil {
				return err
			}
		}
		if have == 0 {
			return nil
		}
		at := 0
		for have-at >= MaxChunk || end && at < have {
			n := cut(buf[at:have])
			if err := f(offset, buf[at:at+n]); err != nil {
				return err
			}
			at, offset = at+n, offset+int64(n)
		}
		have = copy(buf, buf[at:have])
	}
}

// Describe reads a whole file and returns what a manifest says of it.
func Describe(name string, r io.Reader) (File, error) {
	f, whole := File{Name: name}, sha256.New()
	err := Split(r, func(_ int64, b []byte) error {
		whole.Write(b)
		f.Chunks = append(f.Chunks, Chunk{Size: len(b), SHA256: Sum(b)})
		f.Size += int64(len(b))
		return nil
	})
	f.SHA256 = Digest(whole.Sum(nil))
	return f, err
}
