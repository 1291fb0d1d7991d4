// Package audit keeps the node's audit log on STATE: a chain of records (internal/auditchain) in two files of bounded size.
//
// apid's audit lines come in through its log; apid itself has no file and cannot change what was written. Before STATE is open, lines are held in memory.
// Nothing here knows who may read, nor what a call means.
package audit

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/auditchain"
)

const (
	// SegmentSize is when a file is put aside and a new one begun, in bytes; two are kept.
	SegmentSize = 8 << 20
	// maxHeld bounds lines that wait for STATE, or for a disk that does not take them.
	maxHeld = 2048
	// syncPause is the longest time for which a record may be in the kernel and not on the disk.
	syncPause = time.Second

	newer, older = "log", "log.old"
	chunk        = auditchain.MaxLine + 1
)

// Log is the audit log. Make it with New; Run must be called once. It is safe for concurrent use.
type Log struct {
	boot string
	most int64 // bytes of a segment
	wake chan struct{}

	mu      sync.Mutex
	held    []auditchain.Record // guarded by mu; not in the file yet, without number and hash
	lost    uint64              // guarded by mu; calls that held had no room for, and that no record tells of yet
	dropped uint64              // guarded by mu; of all, since New
	folder  *os.Root            // guarded by mu; nil: STATE is not open
	file    [2]*os.File         // guarded by mu; older (may be nil) and newer
	size    [2]int64            // guarded by mu
	start   int64               // guarded by mu; position of the older file's first byte, for readers
	first   [2]uint64           // guarded by mu; number of each file's first record; 0: it is empty
	head    auditchain.Head     // guarded by mu; of what is written
	safe    auditchain.Head     // guarded by mu; of what is on the disk
	changed chan struct{}       // guarded by mu; closed when something was written; nil until somebody waits
	trouble error               // guarded by mu; why the newest records are not written
}

// New returns a log that has no file yet. boot is the kernel's id of the boot.
func New(boot string) *Log { return newLog(boot, SegmentSize) }

func newLog(boot string, most int64) *Log {
	return &Log{boot: boot, most: most, wake: make(chan struct{}, 1)}
}

// Add takes what apid logged at a time, if it is an audit line. It does not wait for a disk: the record is written, in the order of Add, by Run.
func (l *Log) Add(at time.Time, line string) {
	if !bytes.Contains([]byte(line), []byte(`"msg":"audit"`)) {
		return
	}
	r := auditchain.Record{Boot: l.boot, Kind: auditchain.Call, Time: at.UTC(), Entry: json.RawMessage(line)}
	if !json.Valid(r.Entry) { // it was too long and was cut
		r.Entry, r.Note = nil, line
	}
	l.hold(r)
}

func (l *Log) hold(r auditchain.Record) {
	l.mu.Lock()
	if len(l.held) < maxHeld {
		l.held = append(l.held, r)
	} else {
		l.lost++
		l.dropped++
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Dropped is how many calls could not be kept since New. A record tells of each such gap.
func (l *Log) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// Head is the newest record that is on the disk: a power cut does not take it back. The zero value: there is none.
func (l *Log) Head() auditchain.Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.safe
}

// Open gives the log its folder on STATE, which it closes. After an error that is about writing it is open all the same, and Run goes on trying. What an end of power left half-written is cut off, and a record says so.
func (l *Log) Open(folder *os.Root) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.folder != nil {
		return errors.Join(fs.ErrExist, folder.Close())
	}
	l.folder, l.head, l.first, l.start = folder, auditchain.Head{}, [2]uint64{}, 0
	torn, err := l.read()
	if err != nil {
		return errors.Join(fmt.Errorf("audit log: %w", err), l.close())
	}
	now := time.Now().UTC()
	begin := auditchain.Record{Boot: l.boot, Kind: auditchain.Start, Time: now}
	if l.head.Sequence == 0 {
		name := make([]byte, 8)
		_, _ = rand.Read(name) // it never fails
		l.head.Chain = hex.EncodeToString(name)
		begin.Note = "a new log"
	}
	fresh := []auditchain.Record{begin}
	if torn != "" {
		fresh = []auditchain.Record{{Boot: l.boot, Kind: auditchain.Torn, Time: now, Note: torn}, begin}
	}
	l.held = append(fresh, l.held...)
	// A disk that is full just now is tried again by Run: the log is open.
	if err := errors.Join(l.flush(), l.sync()); err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// Close writes what is left, and closes the files; the log may be opened again.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.folder == nil {
		return nil
	}
	return errors.Join(l.flush(), l.sync(), l.close())
}

func (l *Log) close() error { // mu is held
	err := l.folder.Close()
	for i, f := range l.file {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		l.file[i], l.size[i] = nil, 0
	}
	l.folder = nil
	if l.changed != nil { // who follows hears that there is no log any more
		close(l.changed)
		l.changed = nil
	}
	return err
}

// Sync writes what was added, and returns when it is on the disk.
func (l *Log) Sync() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.folder == nil {
		return nil
	}
	return errors.Join(l.flush(), l.sync())
}

func (l *Log) sync() error { // mu is held
	if l.safe == l.head || l.file[1] == nil {
		return nil
	}
	if err := l.file[1].Sync(); err != nil {
		return err
	}
	l.safe = l.head
	return nil
}

// flush writes what is held. What cannot be written stays held. mu is held.
func (l *Log) flush() error {
	if len(l.held) == 0 && l.lost == 0 {
		return nil
	}
	if l.lost > 0 && len(l.held) < maxHeld {
		l.held = append(l.held, auditchain.Record{Boot: l.boot, Kind: auditchain.Lost, Time: time.Now().UTC(), Note: fmt.Sprintf("%d calls before this record could not be kept", l.lost)})
		l.lost = 0
	}
	for len(l.held) > 0 {
		if l.size[1] >= l.most {
			if l.trouble = l.rotate(); l.trouble != nil {
				return l.trouble
			}
		}
		if l.trouble = l.put(&l.held[0]); l.trouble != nil {
			return l.trouble
		}
		l.held = l.held[1:]
	}
	l.held = nil
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return nil
}

// put writes one record. mu is held.
func (l *Log) put(r *auditchain.Record) error {
	line, err := l.head.Next(r)
	if err != nil {
		return err
	}
	if len(line) > auditchain.MaxLine { // escapes can make a line longer
		r.Entry, r.Note = nil, "a line that is too long: it was not kept"
		if line, err = l.head.Next(r); err != nil {
			return err
		}
	}
	n, err := l.file[1].Write(append(line, '\n'))
	if err != nil {
		if n > 0 { // a part of a record: take it back
			err = errors.Join(err, l.file[1].Truncate(l.size[1]))
		}
		return err
	}
	l.size[1] += int64(n)
	if l.first[1] == 0 {
		l.first[1] = r.Sequence
	}
	l.head = r.Head()
	return nil
}

// rotate puts the newer file in the older one's place. The record that says which ones are deleted is on the disk before they are. mu is held.
func (l *Log) rotate() error {
	if l.first[0] != 0 {
		r := auditchain.Record{Boot: l.boot, Kind: auditchain.Rotated, Time: time.Now().UTC(), First: l.first[1],
			Note: fmt.Sprintf("records %d to %d are deleted: the log has its size", l.first[0], l.first[1]-1)}
		if err := l.put(&r); err != nil {
			return err
		}
	}
	if err := l.file[1].Sync(); err != nil {
		return err
	}
	l.safe = l.head
	if err := l.folder.Rename(newer, older); err != nil {
		return err
	}
	f, err := l.folder.OpenFile(newer, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return errors.Join(err, l.folder.Rename(older, newer))
	}
	if l.file[0] != nil {
		err = l.file[0].Close()
	}
	l.start += l.size[0]
	l.file[0], l.size[0], l.first[0] = l.file[1], l.size[1], l.first[1]
	l.file[1], l.size[1], l.first[1] = f, 0, 0
	return errors.Join(err, syncFolder(l.folder))
}

func syncFolder(folder *os.Root) error {
	d, err := folder.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// read opens both files and finds the end of the log. It returns what it cut off, in a sentence; "" if nothing. mu is held.
func (l *Log) read() (torn string, err error) {
	for i, name := range []string{older, newer} {
		flags := os.O_RDWR | os.O_APPEND
		if i == 1 {
			flags |= os.O_CREATE
		}
		f, err := l.folder.OpenFile(name, flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) && i == 0 {
			continue
		}
		if err != nil {
			return "", err
		}
		l.file[i] = f
		found, err := scan(f)
		if err != nil {
			return "", err
		}
		l.size[i], l.first[i] = found.size, found.first
		if found.last.Sequence > 0 {
			l.head = found.last
		}
		if i == 1 && found.good < found.size {
			torn = fmt.Sprintf("%d bytes at the end were no whole record, as after a power cut, and were cut off", found.size-found.good)
			if err := f.Truncate(found.good); err != nil {
				return "", err
			}
			l.size[i] = found.good
		}
	}
	return torn, syncFolder(l.folder)
}

// end is what scan finds in a file.
type end struct {
	size, good int64  // of the file, and of it up to the end of its last whole record
	first      uint64 // number of the first record that can be read
	last       auditchain.Head
}

// scan looks for the last record that can be read. Lines before it that cannot be read stay, for whoever checks the log: they are no torn end.
func scan(f *os.File) (end, error) {
	var e end
	info, err := f.Stat()
	if err != nil {
		return e, err
	}
	e.size = info.Size()
	err = eachLine(io.NewSectionReader(f, 0, e.size), func(at int64, line []byte) {
		r, err := auditchain.Parse(line)
		if err != nil {
			return
		}
		if e.first == 0 {
			e.first = r.Sequence
		}
		e.last, e.good = r.Head(), at+int64(len(line))+1
	})
	return e, err
}
