// Package logs keeps the newest lines of each source in two files on a tmpfs, so that they outlive the process but not the boot.
//
// A record is "<nanoseconds since 1970> <text>\n"; a file is whole records. One writer appends; any number of readers, each
// at its own position, read behind it. A reader that is slow delays nobody: when its lines are gone, it is told so.
package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// SegmentSize is when a file is put aside and a new one begun; two are kept.
	SegmentSize = 512 << 10
	// MaxLine bounds one line, in bytes; longer ones are cut and end in "…".
	MaxLine = 16 << 10

	maxRecord = MaxLine + 32
	chunk     = 32 << 10 // what a reader takes at once; must hold a record
	ellipsis  = "…"
)

// Line is one line of a log.
type Line struct {
	Time time.Time
	Text string // valid UTF-8, without the newline
}

// Log is one source's lines. Make it with Open; it is safe for concurrent use.
type Log struct {
	// Tap, unless it is nil, is called with every line that Append is given. It must be set before the first of them, and must not block.
	Tap func(time.Time, string)

	path string
	most int64 // bytes of a segment

	mu      sync.Mutex
	segment [2]*os.File   // guarded by mu; older (may be nil) and newer
	size    [2]int64      // guarded by mu; in bytes
	start   int64         // guarded by mu; position of the older segment's first byte
	changed chan struct{} // guarded by mu; closed by Append; nil until somebody waits
	dropped uint64        // guarded by mu; lines that could not be written
}

// Open opens or makes the log's files, path and path.old. What a crash left half-written is cut off.
func Open(path string) (*Log, error) { return OpenSmall(path, SegmentSize) }

// OpenSmall is Open for a log whose segments have at most most bytes and one line.
func OpenSmall(path string, most int64) (*Log, error) {
	l := &Log{path: path, most: most}
	for i, name := range []string{path + ".old", path} {
		flags := os.O_RDWR | os.O_APPEND
		if i == 1 {
			flags |= os.O_CREATE
		}
		f, err := os.OpenFile(name, flags, 0o600)
		if errors.Is(err, fs.ErrNotExist) && i == 0 {
			continue
		}
		if err == nil {
			l.segment[i] = f
			l.size[i], err = trim(f)
		}
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("log: %w", err)
		}
	}
	return l, nil
}

// trim cuts a file behind its last newline and returns its size.
func trim(f *os.File) (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	size := info.Size()
	tail := make([]byte, min(size, maxRecord))
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	whole := size - int64(len(tail)) + int64(bytes.LastIndexByte(tail, '\n')+1)
	if whole == size {
		return size, nil
	}
	return whole, f.Truncate(whole)
}

// Close closes the files; they stay.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for i, f := range l.segment {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
		l.segment[i] = nil
	}
	return err
}

// Sync returns when all that was appended is on the disk.
func (l *Log) Sync() error {
	l.mu.Lock()
	files := l.segment
	l.mu.Unlock()
	var err error
	for _, f := range files {
		if f != nil {
			err = errors.Join(err, f.Sync())
		}
	}
	return err
}

// Dropped is how many lines could not be kept since Open.
func (l *Log) Dropped() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dropped
}

// Append adds lines. A line that cannot be written is counted; there is nowhere to say more.
func (l *Log) Append(now time.Time, lines ...string) {
	if l.Tap != nil {
		for _, text := range lines {
			l.Tap(now, text)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, text := range lines {
		record := strconv.AppendInt(make([]byte, 0, len(text)+24), now.UnixNano(), 10)
		record = append(append(append(record, ' '), Clean(text)...), '\n')
		if err := l.append(record); err != nil {
			l.dropped++
		}
	}
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// Clean makes a text fit for one record: valid UTF-8, at most MaxLine bytes, no newline, and nothing that the terminal of who reads it would obey.
func Clean(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) && r != '\t' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(Cut(text, MaxLine), "?")) // never longer
}

// Cut shortens a text to at most most bytes; one that was cut ends in "…".
func Cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	end := most - len(ellipsis)
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + ellipsis
}

func (l *Log) append(record []byte) error { // mu is held
	if l.size[1] >= l.most {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	if l.segment[1] == nil {
		return os.ErrClosed
	}
	n, err := l.segment[1].Write(record)
	if err != nil && n > 0 { // a part of a record: take it back
		err = errors.Join(err, l.segment[1].Truncate(l.size[1]))
		n = 0
	}
	l.size[1] += int64(n)
	return err
}

// rotate puts the newer segment in the older one's place.
func (l *Log) rotate() error { // mu is held
	if err := os.Rename(l.path, l.path+".old"); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return errors.Join(err, os.Rename(l.path+".old", l.path))
	}
	if l.segment[0] != nil {
		err = l.segment[0].Close()
	}
	l.start += l.size[0]
	l.segment[0], l.size[0] = l.segment[1], l.size[1]
	l.segment[1], l.size[1] = f, 0
	return err
}

// read fills buf with whole records from pos on, and returns where they began (later than pos if that is gone) and, if there
// is nothing yet, a channel that is closed when there is.
func (l *Log) read(pos int64, buf []byte) (n int, at int64, wait <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at = max(pos, l.start)
	i, offset := 0, at-l.start
	if offset >= l.size[0] {
		i, offset = 1, offset-l.size[0]
	}
	if offset >= l.size[i] {
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		return 0, at, l.changed, nil
	}
	if l.segment[i] == nil {
		return 0, at, nil, os.ErrClosed
	}
	n, err = l.segment[i].ReadAt(buf[:min(int64(len(buf)), l.size[i]-offset)], offset)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	n = bytes.LastIndexByte(buf[:n], '\n') + 1
	if n == 0 && err == nil {
		err = fmt.Errorf("log %s: no record at %d", filepath.Base(l.path), at)
	}
	return n, at, nil, err
}

// tail returns the position from which there are at most last lines to the end; 0 means all.
func (l *Log) tail(last uint32) (int64, error) {
	if last == 0 {
		return 0, nil
	}
	// Count all records, then skip all but the last ones: a log is small, and this needs no memory.
	count := func(visit func(at int64, n uint64) bool) error {
		buf := make([]byte, chunk)
		var pos int64
		var seen uint64
		for {
			n, at, wait, err := l.read(pos, buf)
			if err != nil || wait != nil {
				return err
			}
			for rest := buf[:n]; len(rest) > 0; seen++ {
				if !visit(at, seen) {
					return nil
				}
				end := bytes.IndexByte(rest, '\n') + 1
				at += int64(end)
				rest = rest[end:]
			}
			pos = at
		}
	}
	var all uint64
	if err := count(func(_ int64, n uint64) bool { all = n + 1; return true }); err != nil || all <= uint64(last) {
		return 0, err
	}
	var from int64
	err := count(func(at int64, n uint64) bool { from = at; return n < all-uint64(last) })
	return from, err
}

// Stream calls send with each line, oldest first: the last tail ones, or all if tail is 0; with follow, then those that come,
// until ctx is done. A line is sent once. What was lost because send is slow is said in a line of its own.
func (l *Log) Stream(ctx context.Context, tail uint32, follow bool, send func(Line) error) error {
	pos, err := l.tail(tail)
	if err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for first := true; ; first = false {
		n, at, wait, err := l.read(pos, buf)
		if err != nil {
			return err
		}
		if at > pos && !first {
			lost := fmt.Sprintf("[%d bytes of log are lost: this reader was too slow]", at-pos)
			if err := send(Line{time.Now(), lost}); err != nil {
				return err
			}
		}
		pos = at + int64(n)
		for rest := buf[:n]; len(rest) > 0; {
			record, after, _ := bytes.Cut(rest, []byte{'\n'})
			rest = after
			if err := send(Parse(record)); err != nil {
				return err
			}
		}
		if wait == nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			continue
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-wait:
		}
	}
}

// Parse reads a record; one that is damaged has no time.
func Parse(record []byte) Line {
	stamp, text, ok := strings.Cut(string(record), " ")
	n, err := strconv.ParseInt(stamp, 10, 64)
	if !ok || err != nil {
		return Line{Text: strings.ToValidUTF8(string(record), "?")}
	}
	return Line{time.Unix(0, n), strings.ToValidUTF8(text, "?")}
}
