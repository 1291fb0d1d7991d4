package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// BlockSize is what Sum counts in, in bytes.
const BlockSize = 1 << 20

// A Replay does a recording again, flush by flush, on a copy of the disk that it was made of, and gives the states that a power cut may leave.
type Replay struct {
	rec  *Recording
	disk *os.File // with all that was flushed so far
	size int64

	seed maphash.Seed
	sums map[int64]uint64 // of each page that is not all zeros
	sum  []uint64         // of each block: its pages' together
}

// NewReplay starts one. disk is as it was when the recording began; the replay changes it, and the caller closes it. Its length is a multiple of a mebibyte.
func NewReplay(rec *Recording, disk *os.File) (*Replay, error) {
	fi, err := disk.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size()%BlockSize != 0 {
		return nil, fmt.Errorf("replay: a disk of %d bytes: want whole mebibytes", fi.Size())
	}
	p := &Replay{rec: rec, disk: disk, size: fi.Size(), seed: maphash.MakeSeed(), sums: map[int64]uint64{}, sum: make([]uint64, fi.Size()/BlockSize)}
	return p, p.scan(disk, func(n int64, sum uint64) { p.note(n, sum) })
}

// scan hashes every page of a file but those in its holes.
func (p *Replay) scan(f *os.File, note func(n int64, sum uint64)) error {
	buf := make([]byte, BlockSize)
	for at := int64(0); at < p.size; at += BlockSize {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		} else if err != nil {
			return os.NewSyscallError("lseek", err)
		}
		at = data / BlockSize * BlockSize
		if _, err := f.ReadAt(buf, at); err != nil {
			return err
		}
		for i := int64(0); i < BlockSize; i += page {
			note((at+i)/page, p.hash((at+i)/page, buf[i:i+page]))
		}
	}
	return nil
}

// Same says where a disk differs from what the replay has done so far; nil if nowhere.
func (p *Replay) Same(disk *os.File) error {
	left, differs := len(p.sums), int64(-1)
	err := p.scan(disk, func(n int64, sum uint64) {
		if sum != p.sums[n] && differs < 0 {
			differs = n * page
		}
		if sum != 0 {
			left--
		}
	})
	if err == nil && differs >= 0 {
		err = fmt.Errorf("it differs at byte %d", differs)
	}
	if err == nil && left != 0 {
		err = fmt.Errorf("it has %d pages too few", left)
	}
	return err
}

var zeros [page]byte

// hash returns 0 for a page of zeros.
func (p *Replay) hash(n int64, b []byte) uint64 {
	if bytes.Equal(b, zeros[:]) {
		return 0
	}
	return maphash.Comparable(p.seed, [2]uint64{uint64(n), maphash.Bytes(p.seed, b)}) | 1
}

// note makes sum that of a page.
func (p *Replay) note(n int64, sum uint64) {
	p.sum[n*page/BlockSize] ^= p.sums[n] ^ sum
	if sum == 0 {
		delete(p.sums, n)
	} else {
		p.sums[n] = sum
	}
}

// An Interval is what was done between two flushes. It and its states are valid until the next one is asked for.
type Interval struct {
	Number      int // from 0
	First, Last int // events; Last is the flush, or behind the last event
	replay      *Replay
	data        [][]byte // of each event that is no flush; nil for a discard
}

// Next returns the next interval, having done the one before. It returns nil at the end: then the disk is as the machine left it.
func (p *Replay) Next(before *Interval) (*Interval, error) {
	i := &Interval{replay: p}
	if before != nil {
		if err := p.do(before); err != nil {
			return nil, err
		}
		if i.Number, i.First = before.Number+1, before.Last+1; before.Last >= len(p.rec.Events) {
			return nil, nil
		}
	}
	for i.Last = i.First; i.Last < len(p.rec.Events) && p.rec.Events[i.Last].Kind != Flush; i.Last++ {
		e := p.rec.Events[i.Last]
		if e.At+e.Length > p.size {
			return nil, fmt.Errorf("replay: event %d ends at %d, the disk at %d", i.Last, e.At+e.Length, p.size)
		}
		var b []byte
		if e.Kind == Write {
			var err error
			if b, err = p.rec.data(e); err != nil {
				return nil, err
			}
		}
		i.data = append(i.data, b)
	}
	return i, nil
}

// do makes an interval durable.
func (p *Replay) do(i *Interval) error {
	m := newImage(p.disk, p.size)
	if err := i.all(m); err != nil {
		return err
	}
	for n, b := range m.over {
		if _, err := p.disk.WriteAt(b[:], n*page); err != nil {
			return err
		}
		p.note(n, p.hash(n, b[:]))
	}
	return nil
}

// Writes is how many writes and discards the interval has.
func (i *Interval) Writes() int { return len(i.data) }

func (i *Interval) all(m *Image) error {
	for n := range i.data {
		if err := i.put(m, n, nil); err != nil {
			return err
		}
	}
	return nil
}

// put does one event of the interval, or of its sectors those that pick picks. Of a discard only what is not zero already is looked at, for it may
// be of the whole disk.
func (i *Interval) put(m *Image, n int, pick func() bool) error {
	e := i.replay.rec.Events[i.First+n]
	if e.Kind == Write {
		return m.lay(e.At, i.data[n], pick)
	}
	var pages []int64
	first, last := e.At/page, (e.At+e.Length-1)/page
	for p := range i.replay.sums {
		if p >= first && p <= last {
			pages = append(pages, p)
		}
	}
	for p := range m.over {
		if p >= first && p <= last && i.replay.sums[p] == 0 {
			pages = append(pages, p)
		}
	}
	slices.Sort(pages) // or chance would not be the same each time
	for _, p := range pages {
		from, to := max(e.At, p*page), min(e.At+e.Length, (p+1)*page)
		if err := m.lay(from, zeros[:to-from], pick); err != nil {
			return err
		}
	}
	return nil
}

// A State is a disk after a power cut within an interval.
type State struct {
	*Image
	// Interval and Number name it: 0 has nothing of the interval, every other number a random part of its own.
	Interval, Number int

	replay *Replay
	delta  map[int64]uint64 // what Sum has to add, by block
}

// State returns the state of that number. States of one interval may be used at once.
func (i *Interval) State(number int) (*State, error) {
	s := &State{newImage(i.replay.disk, i.replay.size), i.Number, number, i.replay, map[int64]uint64{}}
	if number > 0 && len(i.data) > 0 {
		if err := i.part(s.Image, rand.New(rand.NewPCG(uint64(i.Number), uint64(number)))); err != nil {
			return nil, err
		}
	}
	for n, b := range s.over {
		s.delta[n*page/BlockSize] ^= i.replay.sums[n] ^ i.replay.hash(n, b[:])
	}
	return s, nil
}

// Done returns the disk with all that was done so far, and nothing else. It is valid until Next.
func (p *Replay) Done() *State {
	return &State{newImage(p.disk, p.size), -1, 0, p, map[int64]uint64{}}
}

// part does a random part of the interval, in one of five ways: for most of what goes wrong, one of them is likely to hit it.
func (i *Interval) part(m *Image, random *rand.Rand) error {
	coin := func() bool { return random.IntN(2) == 0 }
	way, chosen := random.IntN(5), random.IntN(len(i.data))
	for n := range i.data {
		pick := func() bool { return false }
		switch way {
		case 0: // each sector, or not
			pick = coin
		case 1: // each write, or not
			if coin() {
				pick = nil
			}
		case 2: // in order, up to the middle of one
			if n == chosen {
				left := random.Int64N(i.replay.rec.Events[i.First+n].Length/sector + 1)
				pick = func() bool { left--; return left >= 0 }
			} else if n < chosen {
				pick = nil
			}
		case 3: // all but one, and of that one half
			if pick = nil; n == chosen {
				pick = coin
			}
		case 4: // one alone
			if n == chosen {
				pick = nil
			}
		}
		if err := i.put(m, n, pick); err != nil {
			return err
		}
	}
	return nil
}

// WriteAt changes the state, not the disk that the replay has.
func (s *State) WriteAt(p []byte, at int64) (int, error) {
	first, last := at/page, (at+int64(len(p))-1)/page
	change := func() { // takes the pages' sums out, and puts them in
		for n := first; n <= last; n++ {
			if b := s.over[n]; b != nil {
				s.delta[n*page/BlockSize] ^= s.replay.sums[n] ^ s.replay.hash(n, b[:])
			}
		}
	}
	change()
	n, err := s.Image.WriteAt(p, at)
	change()
	return n, err
}

// Sum tells contents apart: of two states of one replay it is the same for a range, in whole mebibytes, if and, but for one chance in 2^63, only if they have the same there.
func (s *State) Sum(from, length int64) (sum uint64) {
	if from%BlockSize != 0 || length%BlockSize != 0 {
		panic("powercut: a sum is of whole mebibytes")
	}
	for b := from / BlockSize; b < (from+length)/BlockSize; b++ {
		sum ^= s.replay.sum[b] ^ s.delta[b]
	}
	return sum
}

// Pages calls f for each page of 4096 bytes in a range that is not all zeros, in order, with a name for its content: equal names, equal content.
func (s *State) Pages(from, length int64, f func(at int64, name uint64) error) error {
	first, last := from/page, (from+length)/page
	var pages []int64
	for n := range s.replay.sums {
		if n >= first && n < last && s.over[n] == nil {
			pages = append(pages, n)
		}
	}
	for n, b := range s.over {
		if n >= first && n < last && *b != zeros {
			pages = append(pages, n)
		}
	}
	slices.Sort(pages)
	for _, n := range pages {
		name := s.replay.sums[n]
		if b := s.over[n]; b != nil {
			name = s.replay.hash(n, b[:])
		}
		if err := f(n*page, name); err != nil {
			return err
		}
	}
	return nil
}

// Save writes the state to a new file, with holes where there are zeros.
func (s *State) Save(name string) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(s.size); err != nil {
		return err
	}
	b := make([]byte, page)
	return s.Pages(0, s.size, func(at int64, _ uint64) error {
		if _, err := s.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err := f.WriteAt(b, at)
		return err
	})
}
