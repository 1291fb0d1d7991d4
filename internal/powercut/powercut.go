// Package powercut is a disk in memory that remembers every write and flush, and can be rebuilt as a power cut would have left it. It is
// for tests of code that must survive one.
//
// The model: what was written before a flush that has returned is on the disk. Of what was written since, each sector of 512 bytes is
// there or not, in any combination: disks reorder, and a write of many sectors is not whole.
package powercut

import (
	"bytes"
	"errors"
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
	base := bytes.NewReader(durable)
	try := func(writes []event, part int, pick func() bool) {
		m := newImage(base, int64(len(durable)))
		for i, w := range writes {
			if i == len(writes)-1 {
				w.data = w.data[:part]
			}
			_ = m.lay(w.at, w.data, pick) // a reader of bytes does not fail
		}
		f(m)
		count++
	}
	for i := 0; i <= len(d.log); {
		j := i
		for j < len(d.log) && d.log[j].data != nil {
			j++
		}
		writes := d.log[i:j]
		try(nil, 0, nil)
		for n, w := range writes {
			try(writes[:n+1], len(w.data)/sector/2*sector, nil)
			try(writes[:n+1], len(w.data), nil)
		}
		for range halves {
			if len(writes) == 0 {
				break
			}
			try(writes, len(writes[len(writes)-1].data), func() bool { return random.IntN(2) == 0 })
		}
		for _, w := range writes {
			copy(durable[w.at:], w.data)
		}
		i = j + 1
	}
	return count
}

// An Image is a disk after a cut.
type Image struct {
	base io.ReaderAt
	size int64
	over map[int64]*[page]byte // what is not as in base, by page
}

// page is what an image is copied in, in bytes.
const page = 4096

func newImage(base io.ReaderAt, size int64) *Image {
	return &Image{base, size, map[int64]*[page]byte{}}
}

// page returns one to be changed.
func (m *Image) page(n int64) (*[page]byte, error) {
	b := m.over[n]
	if b == nil {
		b = new([page]byte)
		if _, err := m.base.ReadAt(b[:min(page, m.size-n*page)], n*page); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		m.over[n] = b
	}
	return b, nil
}

// lay puts data into the image: all of it, or those sectors that pick picks.
func (m *Image) lay(at int64, data []byte, pick func() bool) error {
	for len(data) > 0 {
		n := min(int64(len(data)), (at/sector+1)*sector-at)
		if pick == nil || pick() {
			b, err := m.page(at / page)
			if err != nil {
				return err
			}
			copy(b[at%page:], data[:n])
		}
		at, data = at+n, data[n:]
	}
	return nil
}

// Size returns the image's length in bytes.
func (m *Image) Size() int64 { return m.size }

// ReadAt is as in io.ReaderAt.
func (m *Image) ReadAt(p []byte, at int64) (int, error) {
	n, err := m.base.ReadAt(p, at)
	if len(m.over) == 0 {
		return n, err
	}
	for i := at / page; i*page < at+int64(n); i++ {
		if b := m.over[i]; b != nil {
			from := max(at, i*page)
			copy(p[from-at:n], b[from-i*page:])
		}
	}
	return n, err
}

// WriteAt is as in io.WriterAt.
func (m *Image) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > m.size {
		return 0, fmt.Errorf("powercut: write of %d bytes at %d, behind the end", len(p), at)
	}
	if err := m.lay(at, p, nil); err != nil {
		return 0, err
	}
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
