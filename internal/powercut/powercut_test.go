package powercut

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

func TestCuts(t *testing.T) {
	d := New(make([]byte, 4*sector))
	write := func(b byte, at, n int64) {
		t.Helper()
		if _, err := d.WriteAt(bytes.Repeat([]byte{b}, int(n)), at); err != nil {
			t.Fatal(err)
		}
	}
	write(1, 0, 2*sector)
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	write(2, sector-10, 20)
	write(3, 3*sector, sector)
	seen := map[[6]byte]int{}
	n := d.Cuts(rand.New(rand.NewPCG(1, 2)), 20, func(m *Image) {
		b := make([]byte, m.Size())
		if _, err := m.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		seen[[6]byte{b[0], b[sector-10], b[sector], b[sector+9], b[sector+10], b[3*sector]}]++
		if b[sector+9] == 2 && b[0] == 0 {
			t.Errorf("the second write without the first, over a flush: %v", b)
		}
		if _, err := m.WriteAt([]byte{9}, 5); err != nil {
			t.Fatal(err)
		}
		one := make([]byte, 1)
		if _, err := m.ReadAt(one, 5); err != nil || one[0] != 9 {
			t.Errorf("an image forgets: %v %v", one, err)
		}
	})
	if d.Content()[5] != 1 {
		t.Error("an image's write reached the disk")
	}
	for _, want := range [][6]byte{
		{0, 0, 0, 0, 0, 0}, {1, 1, 0, 0, 0, 0}, {1, 1, 1, 1, 1, 0}, {1, 2, 1, 1, 1, 0}, {1, 1, 2, 2, 1, 3}, {1, 2, 2, 2, 1, 3}, {1, 1, 1, 1, 1, 3},
	} {
		if seen[want] == 0 {
			t.Errorf("no cut gave %v, of %d: %v", want, n, seen)
		}
	}
}

func TestSection(t *testing.T) {
	d := New(make([]byte, 4*sector))
	s := Section{d, sector, 2 * sector}
	if _, err := s.WriteAt(make([]byte, sector), 2*sector-1); err == nil {
		t.Error("a write behind the section's end")
	}
	if _, err := s.WriteAt([]byte{7}, 0); err != nil || d.Content()[sector] != 7 {
		t.Errorf("%v", err)
	}
	if n, err := s.ReadAt(make([]byte, 10), 2*sector-5); n != 5 || err == nil {
		t.Errorf("%d bytes over the end, %v", n, err)
	}
	broken := errors.New("broken")
	d.Fail = func(string) error { return broken }
	if err := s.Sync(); !errors.Is(err, broken) {
		t.Error(err)
	}
}
