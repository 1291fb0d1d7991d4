package dbsum

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"testing"
)

func TestWhole(t *testing.T) {
	body := bytes.Repeat([]byte("page"), 1024)
	sum := sha256.Sum256(body)
	good := append(slices.Clone(body), sum[:]...)
	flipped := slices.Clone(good)
	flipped[100] ^= 1
	odd := []byte("no pages")
	oddSum := sha256.Sum256(odd)
	for name, c := range map[string]struct {
		data []byte
		want bool
	}{
		"good": {good, true}, "flipped": {flipped, false}, "cut by a page": {good[:len(good)-512], false}, "cut": {good[:len(good)-1], false}, "more": {append(slices.Clone(good), 0), false},
		"empty": {nil, false}, "the sum alone": {sum[:], false}, "no database": {append(odd, oddSum[:]...), false},
	} {
		for _, piece := range []int{1, 31, 33, 1000, 1 << 20} {
			var s Sum
			for p := range slices.Chunk(c.data, piece) {
				s.Write(p)
			}
			if s.Whole() != c.want || s.Bytes() != int64(len(c.data)) {
				t.Errorf("%s, in pieces of %d bytes: whole is %v, want %v; %d bytes of %d", name, piece, s.Whole(), c.want, s.Bytes(), len(c.data))
			}
		}
	}
}
