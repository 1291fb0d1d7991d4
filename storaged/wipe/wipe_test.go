package wipe

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/powercut"
)

// noise fills a device of that size.
func noise(size int) []byte {
	b := make([]byte, size)
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i+8 <= len(b); i += 8 {
		for j, v := 0, r.Uint64(); j < 8; j++ {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}

// A mark that is zero is the proof that nothing is left of head and tail, whenever the power failed.
func TestPowerCut(t *testing.T) {
	const size = 4 << 20
	d := powercut.New(noise(size))
	d.Forget()
	if err := Overwrite(d, size); err != nil {
		t.Fatal(err)
	}
	if err := Check(d, size); err != nil {
		t.Error(err)
	}
	zeros := make([]byte, Mark)
	mark := make([]byte, Mark)
	done := 0
	n := d.Cuts(rand.New(rand.NewPCG(3, 4)), 8, func(m *powercut.Image) {
		if _, err := m.ReadAt(mark, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(mark, zeros) {
			return
		}
		done++
		if err := Check(m, size); err != nil {
			t.Errorf("the mark is zero, but %v", err)
		}
	})
	if n < 20 || done == 0 || done == n {
		t.Errorf("%d cuts, %d of them after the end", n, done)
	}
}

// TestPartition wipes files of all lengths: what is between head and tail stays, for a file cannot be discarded.
func TestPartition(t *testing.T) {
	for _, size := range []int{0, 512, Mark, Head - 512, Head, Head + 512, Head + 5<<20} {
		path := filepath.Join(t.TempDir(), "partition")
		was := noise(size)
		if err := os.WriteFile(path, was, 0o600); err != nil {
			t.Fatal(err)
		}
		how, err := Partition(path, int64(size))
		if err != nil || how != Kept {
			t.Errorf("%d bytes: %q, %v", size, how, err)
		}
		got, err := os.ReadFile(path)
		if err != nil || len(got) != size {
			t.Fatalf("%d bytes: %d are left, %v", size, len(got), err)
		}
		head, tail := min(size, Head), max(min(size, Head), size-Tail)
		if len(bytes.Trim(got[:head], "\x00"))+len(bytes.Trim(got[tail:], "\x00")) > 0 || !bytes.Equal(got[head:tail], was[head:tail]) {
			t.Errorf("%d bytes: head or tail are left, or more is gone", size)
		}
	}
}

// A disk that says yes and writes nothing is found out.
func TestCheck(t *testing.T) {
	b := make([]byte, Head+2<<20)
	for _, at := range []int{0, Mark, Head - 1, len(b) - 1} {
		b[at] = 1
		if err := Check(bytes.NewReader(b), int64(len(b))); err == nil || !strings.Contains(err.Error(), "does not keep") {
			t.Errorf("a byte at %d: %v", at, err)
		}
		b[at] = 0
	}
	if err := Check(bytes.NewReader(b), int64(len(b))); err != nil {
		t.Error(err)
	}
}
