package powercut

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

// A logWriter writes a recording as QEMU does.
type logWriter struct {
	bytes.Buffer
	count uint64
}

func newLog() *logWriter {
	w := &logWriter{}
	w.Write(make([]byte, sector))
	return w
}

func (w *logWriter) event(at, length int64, flags uint64, data []byte) {
	b := make([]byte, sector)
	le := binary.LittleEndian
	le.PutUint64(b, uint64(at/sector))
	le.PutUint64(b[8:], uint64(length/sector))
	le.PutUint64(b[16:], flags)
	w.Write(append(b, data...))
	w.count++
}

func (w *logWriter) write(at int64, data []byte) { w.event(at, int64(len(data)), 0, data) }
func (w *logWriter) discard(at, length int64)    { w.event(at, length, logDiscard, nil) }
func (w *logWriter) flush()                      { w.event(0, 0, logFlush, nil) }
func (w *logWriter) read() (*Recording, error) {
	return ReadLog(bytes.NewReader(w.end()), int64(w.Len()))
}
func (w *logWriter) bad(change func([]byte)) error {
	b := slices.Clone(w.end())
	change(b)
	_, err := ReadLog(bytes.NewReader(b), int64(len(b)))
	return err
}

func (w *logWriter) end() []byte {
	b := w.Bytes()
	le := binary.LittleEndian
	le.PutUint64(b, logMagic)
	le.PutUint64(b[8:], logVersion)
	le.PutUint64(b[16:], w.count)
	le.PutUint32(b[24:], sector)
	return b
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func TestReadLog(t *testing.T) {
	w := newLog()
	w.write(1024, fill(7, 1024))
	mark := int64(w.Len())
	w.flush()
	w.discard(0, 1<<20)
	r, err := w.read()
	if err != nil {
		t.Fatal(err)
	}
	var got []Event
	for _, e := range r.Events {
		got = append(got, Event{Kind: e.Kind, At: e.At, Length: e.Length})
	}
	if want := []Event{{Kind: Write, At: 1024, Length: 1024}, {Kind: Flush}, {Kind: Discard, Length: 1 << 20}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if b, err := r.data(r.Events[0]); err != nil || !bytes.Equal(b, fill(7, 1024)) {
		t.Errorf("data: %v", err)
	}
	if r.Index(0) != 0 || r.Index(mark) != 1 || r.Index(1<<40) != 3 || r.Place(1) != mark || r.Place(3) < 1<<40 {
		t.Errorf("the mark %d is event %d, which is at %d", mark, r.Index(mark), r.Place(1))
	}
	le := binary.LittleEndian
	for want, change := range map[string]func([]byte){
		"no superblock of version 1": func(b []byte) { b[0]++ },
		"it is cut off":              func(b []byte) { b[16] = 9 },
		"unknown kind 0x8":           func(b []byte) { b[sector+16] = logMark },
		"its own flush":              func(b []byte) { b[sector+16] = logFUA },
		"the log has a hole":         func(b []byte) { clear(b[sector : sector+32]) },
		"is about sectors":           func(b []byte) { le.PutUint64(b[sector:], 1<<50) },
		"data of 1048576 bytes":      nil,
	} {
		var err error
		if change != nil {
			err = w.bad(change)
		} else {
			x := newLog()
			x.write(0, fill(1, 1<<20))
			r, rerr := ReadLog(bytes.NewReader(x.end()[:2048]), 2048)
			if rerr != nil {
				t.Fatal(rerr)
			}
			_, err = r.data(r.Events[0])
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// aDisk is a file of four mebibytes that starts with ones.
func aDisk(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteAt(fill(1, 2*BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(4 * BlockSize); err != nil {
		t.Fatal(err)
	}
	return f
}

func all(t *testing.T, r interface {
	io.ReaderAt
	Size() int64
}) []byte {
	t.Helper()
	b := make([]byte, r.Size())
	if _, err := r.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return b
}

// TestReplay goes through a recording with three flushes and looks at every sector of every state: one that was flushed is there, one that was not may be.
func TestReplay(t *testing.T) {
	w := newLog()
	w.write(512, fill(2, 8192))
	w.write(BlockSize, fill(3, 512))
	w.flush()
	w.discard(0, 2*BlockSize)
	w.write(4096, fill(4, 1024))
	w.flush()
	w.flush()
	w.write(3*BlockSize, fill(5, 4096))
	rec, err := w.read()
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewReplay(rec, aDisk(t))
	if err != nil {
		t.Fatal(err)
	}
	now := append(fill(1, 2*BlockSize), make([]byte, 2*BlockSize)...)
	intervals := 0
	for i, err := p.Next(nil); i != nil || err != nil; i, err = p.Next(i) {
		if err != nil {
			t.Fatal(err)
		}
		next := slices.Clone(now)
		for n := i.First; n < i.Last; n++ {
			e := rec.Events[n]
			data := make([]byte, e.Length)
			if e.Kind == Write {
				if data, err = rec.data(e); err != nil {
					t.Fatal(err)
				}
			}
			copy(next[e.At:], data)
		}
		lookAt(t, i, now, next)
		now = next
		intervals++
	}
	if intervals != 4 {
		t.Errorf("%d intervals", intervals)
	}
	end := filepath.Join(t.TempDir(), "end")
	if err := os.WriteFile(end, now, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(end, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := p.Same(f); err != nil {
		t.Error(err)
	}
	for _, at := range []int64{5, 3*BlockSize + 5, 4*BlockSize - 1} {
		was := make([]byte, 1)
		if _, err := f.ReadAt(was, at); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{was[0] + 1}, at); err != nil {
			t.Fatal(err)
		}
		if err := p.Same(f); err == nil {
			t.Errorf("a byte that differs at %d is not seen", at)
		}
		if _, err := f.WriteAt(was, at); err != nil {
			t.Fatal(err)
		}
	}
}

// lookAt wants the states of an interval that leads from one disk to the next.
func lookAt(t *testing.T, i *Interval, now, next []byte) {
	t.Helper()
	type sums [4]uint64
	content := map[sums]string{}
	different := map[string]bool{}
	for number := range 40 {
		s, err := i.State(number)
		if err != nil {
			t.Fatal(err)
		}
		again, err := i.State(number)
		if err != nil {
			t.Fatal(err)
		}
		b := all(t, s)
		if !bytes.Equal(b, all(t, again)) {
			t.Errorf("flush %d: state %d is another one each time", i.Number, number)
		}
		if number == 0 && !bytes.Equal(b, now) {
			t.Errorf("flush %d: state 0 is not what was flushed", i.Number)
		}
		for at := 0; at < len(b); at += sector {
			if c := b[at : at+sector]; !bytes.Equal(c, now[at:at+sector]) && !bytes.Equal(c, next[at:at+sector]) && i.First != 3 { // there one lies over the other
				t.Fatalf("flush %d, state %d: the sector at %d is neither old nor new", i.Number, number, at)
			}
		}
		sum := sums{s.Sum(0, BlockSize), s.Sum(BlockSize, BlockSize), s.Sum(2*BlockSize, BlockSize), s.Sum(3*BlockSize, BlockSize)}
		if was, ok := content[sum]; ok && was != string(b) {
			t.Errorf("flush %d: state %d has the sums of another content", i.Number, number)
		}
		content[sum] = string(b)
		different[string(b)] = true
		if number < 5 {
			saved(t, s, b)
		}
	}
	if len(different) != len(content) {
		t.Errorf("flush %d: %d contents, %d sums", i.Number, len(different), len(content))
	}
	if !bytes.Equal(now, next) && len(different) < 3 && i.Writes() > 1 {
		t.Errorf("flush %d: only %d different states", i.Number, len(different))
	}
}

// saved wants the same content from Save, from Pages, and from Sum after a change.
func saved(t *testing.T, s *State, want []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "saved")
	if err := s.Save(file); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, want) {
		t.Errorf("saved is another disk: %v", err)
	}
	pages := 0
	if err := s.Pages(0, s.Size(), func(at int64, name uint64) error {
		if bytes.Equal(want[at:at+page], zeros[:]) {
			t.Errorf("the page at %d is zeros", at)
		}
		pages++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(want); at += page {
		if !bytes.Equal(want[at:at+page], zeros[:]) {
			pages--
		}
	}
	if pages != 0 {
		t.Errorf("%d pages too many", pages)
	}
	before := s.Sum(0, s.Size())
	if _, err := s.WriteAt([]byte{99}, 1234); err != nil || s.Sum(0, s.Size()) == before {
		t.Errorf("a change does not change the sum: %v", err)
	}
	if _, err := s.WriteAt(want[1234:1235], 1234); err != nil || s.Sum(0, s.Size()) != before {
		t.Errorf("the change taken back does not: %v", err)
	}
}

func TestReplayRefuses(t *testing.T) {
	w := newLog()
	w.write(4*BlockSize, fill(1, 512))
	rec, err := w.read()
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewReplay(rec, aDisk(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Next(nil); err == nil {
		t.Error("a write behind the disk's end")
	}
	odd := aDisk(t)
	if err := odd.Truncate(BlockSize + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := NewReplay(rec, odd); err == nil {
		t.Error("a disk of half a page")
	}
}

// TestQEMU lets QEMU's driver write the recording: its end must be the disk that QEMU leaves.
func TestQEMU(t *testing.T) {
	tool := testtool.Path(t, "qemu-io", "qemu-utils")
	disk, base := aDisk(t), aDisk(t)
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	testtool.Run(t, tool, "--image-opts", "driver=blklogwrites,file.driver=raw,file.discard=unmap,file.file.driver=file,file.file.discard=unmap,file.file.filename="+disk.Name()+
		",log.driver=file,log.filename="+log+",discard=unmap", "-c", "write -P 2 512 9k", "-c", "flush", "-c", "discard 1M 512k", "-c", "write -z 2M 64k", "-c", "write -P 3 3M 512", "-c", "flush")
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	rec, err := ReadLog(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewReplay(rec, base)
	if err != nil {
		t.Fatal(err)
	}
	flushes := 0
	for i, err := p.Next(nil); i != nil || err != nil; i, err = p.Next(i) {
		if err != nil {
			t.Fatal(err)
		}
		flushes++
	}
	if err := p.Same(disk); err != nil || flushes < 3 {
		t.Errorf("%v, %d flushes", err, flushes)
	}
}
