package bundle

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"testing/iotest"
)

func split(t testing.TB, b []byte) (chunks [][]byte) {
	t.Helper()
	next := int64(0)
	if err := Split(bytes.NewReader(b), func(at int64, c []byte) error {
		if at != next {
			t.Fatalf("chunk at %d, want %d", at, next)
		}
		next += int64(len(c))
		chunks = append(chunks, bytes.Clone(c))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytes.Join(chunks, nil), b) {
		t.Fatal("the chunks are not the data")
	}
	return chunks
}

func TestSplit(t *testing.T) {
	for _, n := range []int{0, 1, MinChunk, MinChunk + 1, MaxChunk, MaxChunk + 1, 20 << 20} {
		all := split(t, noise(7, n))
		for i, c := range all {
			if len(c) > MaxChunk || len(c) < MinChunk && i < len(all)-1 {
				t.Errorf("%d bytes: chunk %d of %d has %d", n, i, len(all), len(c))
			}
		}
		if mean := n / max(len(all), 1); n > 1<<20 && (mean < aim*9/10 || mean > aim*11/10) {
			t.Errorf("chunks have %d bytes on average, want about %d", mean, aim)
		}
	}
	for i, c := range split(t, make([]byte, 3*MaxChunk)) {
		if len(c) != MaxChunk {
			t.Errorf("zeros: chunk %d has %d bytes", i, len(c))
		}
	}
}

// The format: if this changes, nodes find nothing of their running version any more.
func TestSplitIsStable(t *testing.T) {
	var got []int
	for _, c := range split(t, noise(8, 600_000)) {
		got = append(got, len(c))
	}
	if want := []int{228092, 33794, 67822, 54259, 58089, 50748, 18038, 89158}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// However the reader cuts its pieces, the chunks are the same.
func TestSplitReaders(t *testing.T) {
	data := noise(9, 1<<20)
	want := split(t, data)
	i := 0
	if err := Split(iotest.HalfReader(iotest.DataErrReader(bytes.NewReader(data))), func(_ int64, c []byte) error {
		if !bytes.Equal(c, want[i]) {
			t.Errorf("chunk %d differs", i)
		}
		i++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := Split(iotest.ErrReader(broken), nil); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

// Data that were inserted change the chunks around them and no others.
func TestSplitFindsWhatIsEqual(t *testing.T) {
	old := noise(10, 8<<20)
	changed := slices.Concat(old[:3<<20], noise(11, 1000), old[3<<20:])
	known := map[Digest]bool{}
	for _, c := range split(t, old) {
		known[Sum(c)] = true
	}
	fresh := 0
	for _, c := range split(t, changed) {
		if !known[Sum(c)] {
			fresh += len(c)
		}
	}
	if fresh > 3*MaxChunk {
		t.Errorf("%d bytes are to be fetched after 1000 were inserted", fresh)
	}
}

func BenchmarkDescribe(b *testing.B) {
	data := noise(1, 16<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Describe(RootName, bytes.NewReader(data)); err != nil {
			b.Fatal(err)
		}
	}
}
