// Package powercut is a disk in memory that remembers every write and flush, and can be rebuilt as a power cut would have left it. It is
// for tests of code that must survive one.
//
// The model: what was written before a flush that has returned is on the disk. Of what was written since, each sector of 512 bytes is
// there or not, in any combination: disks reorder, and a write of many sectors is not whole.
package powercut

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
)

const sector = 512

// A Disk is for one goroutine.
type Disk struct {
	start []byte // at the last Forget
	now   []byte
	log   []event
	// Fail, if not nil, is asked before every write and flush; its error is the disk's.
	Fail func(what string) error
}

// An event is a write, or a flush if data is nil.
type event struct {
	at   int64
	data []byte
}

// New returns a disk with that content, which belongs to the disk from now on. Its length is a multiple of 512.
func New(content []byte) *Disk {
	if len(content)%sector != 0 {
		panic("powercut: a disk has whole sectors")
	}
	return &Disk{start: slices.Clone(content), now: content}
}

// Size returns the disk's length in bytes.
func (d *Disk) Size() int64 { return int64(len(d.now)) }

// ReadAt is as in io.ReaderAt.
func (d *Disk) ReadAt(p []byte, at int64) (int, error) { return readAt(d.now, p, at) }

func readAt(from, p []byte, at int64) (int, error) {
	if at < 0 || at >= int64(len(from)) {
		return 0, io.EOF
	}
	n := copy(p, from[at:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt is as in io.WriterAt.
func (d *Disk) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > int64(len(d.now)) {
		return 0, fmt.Errorf("powercut: write of %d bytes at %d, behind the end", len(p), at)
	}
	if d.Fail != nil {
		if err := d.Fail("write"); err != nil {
			return 0, err
		}
	}
	copy(d.now[at:], p)
	d.log = append(d.log, event{at, slices.Clone(p)})
	return len(p), nil
}

// Sync is a flush.
func (d *Disk) Sync() error {
	if d.Fail != nil {
		if err := d.Fail("flush"); err != nil {
			return err
		}
	}
	d.log = append(d.log, event{})
	return nil
}

// Forget makes the present content, flushed, the start of the story.
func (d *Disk) Forget() { d.start, d.log = slices.Clone(d.now), nil }

// Content returns the present content. It belongs to the disk.
func (d *Disk) Content() []byte { return d.now }

// Cuts calls f with what a cut may have left, for every flush since Forget: nothing of what was written since the flush before, all of it, each
// write up to its middle and up to its end, and random halves of its sectors. f may read and write its image; nothing of that stays. It
// returns the number of images.
func (d *Disk) Cuts(random *rand.Rand, halves int, f func(*Image)) int {
	count := 0
	durable := slices.Clone(d.start)
	try := func(over map[int64][]byte) {
		f(&Image{durable, over})
		count++
	}
	for i := 0; i <= len(d.log); {
		j := i
		for j < len(d.log) && d.log[j].data != nil {
			j++
		}
		writes := d.log[i:j]
		try(map[int64][]byte{})
		for n := range writes {
			for _, part := range []int{len(writes[n].data) / sector / 2 * sector, len(writes[n].data)} {
				over := map[int64][]byte{}
				for _, w := range writes[:n] {
					lay(durable, over, w, nil)
				}
				lay(durable, over, event{writes[n].at, writes[n].data[:part]}, nil)
				try(over)
			}
		}
		for range halves {
			if len(writes) == 0 {
				break
			}
			over := map[int64][]byte{}
			for _, w := range writes {
				lay(durable, over, w, random)
			}
			try(over)
		}
		for _, w := range writes {
			copy(durable[w.at:], w.data)
		}
		i = j + 1
	}
	return count
}

// lay puts a write into an overlay, all its sectors or a random half of them.
func lay(base []byte, over map[int64][]byte, w event, random *rand.Rand) {
	for done := int64(0); done < int64(len(w.data)); {
		at := w.at + done
		s := at / sector
		n := min(int64(len(w.data))-done, (s+1)*sector-at)
		if random == nil || random.IntN(2) == 0 {
			b := over[s]
			if b == nil {
				b = slices.Clone(base[s*sector : (s+1)*sector])
				over[s] = b
			}
			copy(b[at-s*sector:], w.data[done:done+n])
		}
		done += n
	}
}

// An Image is a disk after a cut.
type Image struct {
	base []byte
	over map[int64][]byte // by sector
}

// Size returns the image's length in bytes.
func (m *Image) Size() int64 { return int64(len(m.base)) }

// ReadAt is as in io.ReaderAt.
func (m *Image) ReadAt(p []byte, at int64) (int, error) {
	n, err := readAt(m.base, p, at)
	if len(m.over) == 0 {
		return n, err
	}
	for s := at / sector; s*sector < at+int64(n); s++ {
		if b := m.over[s]; b != nil {
			from := max(at, s*sector)
			copy(p[from-at:n], b[from-s*sector:])
		}
	}
	return n, err
}

// WriteAt is as in io.WriterAt.
func (m *Image) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > int64(len(m.base)) {
		return 0, fmt.Errorf("powercut: write of %d bytes at %d, behind the end", len(p), at)
	}
	lay(m.base, m.over, event{at, p}, nil)
	return len(p), nil
}

// Sync does nothing: an image is cut off only once.
func (m *Image) Sync() error { return nil }

// A Device is a disk or an image.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// A Section is a part of a device: a partition.
type Section struct {
	Device
	From, Length int64
}

// Size returns the section's length in bytes.
func (s Section) Size() int64 { return s.Length }

// ReadAt is as in io.ReaderAt.
func (s Section) ReadAt(p []byte, at int64) (int, error) {
	return io.NewSectionReader(s.Device, s.From, s.Length).ReadAt(p, at)
}

// WriteAt is as in io.WriterAt.
func (s Section) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > s.Length {
		return 0, fmt.Errorf("powercut: write of %d bytes at %d, behind the section's end", len(p), at)
	}
	return s.Device.WriteAt(p, s.From+at)
}
