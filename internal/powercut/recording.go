package powercut

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
)

// A Recording is what a machine did to its disk: every write, flush and discard, in the order in which they were done. QEMU's driver
// "blklogwrites" writes it, in the form of Linux' dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst): a superblock, then for each event
// a sector that says what it is and, for a write, its data.
type Recording struct {
	Events []Event
	log    io.ReaderAt
}

// Kind is what an event is.
type Kind int

// The kinds there are.
const (
	Write Kind = iota
	Flush
	Discard // what it covers reads as zeros
)

// An Event is one thing that was done. At and Length are in bytes of the disk; both are 0 for a flush.
type Event struct {
	Kind       Kind
	At, Length int64
	in         int64 // where the log has it
	sector     int64 // of the log, in bytes
}

const (
	logMagic   = 0x6a736677736872
	logVersion = 1

	logFlush   = 1 << 0
	logFUA     = 1 << 1
	logDiscard = 1 << 2
	logMark    = 1 << 3
)

// ReadLog reads what a log of size bytes tells, but for the data. QEMU must have ended.
func ReadLog(log io.ReaderAt, size int64) (*Recording, error) {
	le := binary.LittleEndian
	b := make([]byte, 32)
	if _, err := log.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("recording: superblock: %w", err)
	}
	count, unit := le.Uint64(b[16:]), int64(le.Uint32(b[24:]))
	if le.Uint64(b) != logMagic || le.Uint64(b[8:]) != logVersion || unit < sector || unit > 1<<20 || unit&(unit-1) != 0 {
		return nil, errors.New("recording: no superblock of version 1: was the machine ended in order?")
	}
	r := &Recording{log: log}
	for at := unit; at < size; {
		if _, err := log.ReadAt(b, at); err != nil {
			return nil, fmt.Errorf("recording: event %d: %w", len(r.Events), err)
		}
		from, length, flags := int64(le.Uint64(b)), int64(le.Uint64(b[8:])), le.Uint64(b[16:])
		e := Event{At: from * unit, Length: length * unit, in: at, sector: unit}
		if from < 0 || length < 0 || from > 1<<40 || length > 1<<40 {
			return nil, fmt.Errorf("recording: event %d is about sectors %d to %d", len(r.Events), from, from+length)
		}
		switch at += unit; {
		case flags&logMark != 0, flags&^(logFlush|logFUA|logDiscard) != 0:
			return nil, fmt.Errorf("recording: event %d is of the unknown kind %#x", len(r.Events), flags)
		case flags&logFlush != 0 && length == 0:
			e.Kind, e.At = Flush, 0
		case flags&(logFlush|logFUA) != 0: // a driver without a write cache; nobody tests it, so nobody shall rely on it
			return nil, fmt.Errorf("recording: event %d is a write that is its own flush, which is not understood", len(r.Events))
		case flags&logDiscard != 0:
			e.Kind = Discard
		case length == 0:
			return nil, fmt.Errorf("recording: event %d is a write of nothing: the log has a hole", len(r.Events))
		default:
			at += e.Length
		}
		r.Events = append(r.Events, e)
	}
	if uint64(len(r.Events)) < count {
		return nil, fmt.Errorf("recording: %d events, and its superblock counts %d: it is cut off", len(r.Events), count)
	}
	return r, nil
}

// Index returns how many events were in the log when its file was size bytes long. So the length of the file, while QEMU writes it, marks a moment.
func (r *Recording) Index(size int64) int {
	return sort.Search(len(r.Events), func(i int) bool { return r.Events[i].in >= size })
}

// Place returns how long the log's file was before an event.
func (r *Recording) Place(event int) int64 {
	if event < len(r.Events) {
		return r.Events[event].in
	}
	return 1<<63 - 1
}

// data returns what a write wrote.
func (r *Recording) data(e Event) ([]byte, error) {
	b := make([]byte, e.Length)
	if _, err := r.log.ReadAt(b, e.in+e.sector); err != nil {
		return nil, fmt.Errorf("recording: data of %d bytes: %w", e.Length, err)
	}
	return b, nil
}
