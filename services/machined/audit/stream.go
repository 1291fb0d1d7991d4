package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"time"
)

// Run writes what Add takes and brings it to the disk, until ctx is done; it returns ctx's error. say is told when records cannot be written, once each time
// that it begins: they are held, as many as there is room for, and tried again.
func (l *Log) Run(ctx context.Context, say func(error)) error {
	var said bool
	timer := time.NewTimer(syncPause)
	defer timer.Stop()
	for {
		err := l.write()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			err = errors.Join(err, l.Sync())
			timer.Reset(syncPause)
		case <-l.wake:
		}
		if err != nil && !said {
			say(err)
		}
		said = err != nil
	}
}

func (l *Log) write() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.folder == nil || len(l.held)+int(min(l.lost, 1)) == 0 {
		return nil
	}
	return l.flush()
}

// ErrClosed is returned by Stream while STATE is not open.
var ErrClosed = errors.New("the audit log is on STATE, which is not open")

// Stream calls send with each line, without its newline, oldest first; with follow, then with those that come, until ctx is done. send must not keep the line.
func (l *Log) Stream(ctx context.Context, follow bool, send func(line []byte) error) error {
	buf := make([]byte, chunk)
	var pos int64
	for {
		n, at, wait, err := l.readAt(pos, buf)
		if err != nil {
			return err
		}
		pos = at + int64(n)
		for rest := buf[:n]; len(rest) > 0; {
			var line []byte
			line, rest, _ = bytes.Cut(rest, []byte{'\n'})
			if err := send(line); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if wait == nil {
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

// readAt fills buf with whole lines from pos on, and returns where they begin: later than pos if that is deleted. At the end it returns a channel that is
// closed when there is more. A line longer than any record is given in parts, which are none.
func (l *Log) readAt(pos int64, buf []byte) (n int, at int64, wait <-chan struct{}, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.folder == nil {
		return 0, 0, nil, ErrClosed
	}
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
	most := min(int64(len(buf)), l.size[i]-offset)
	n, err = l.file[i].ReadAt(buf[:most], offset)
	if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	if whole := bytes.LastIndexByte(buf[:n], '\n') + 1; whole > 0 {
		n = whole
	}
	if n == 0 && err == nil {
		err = os.ErrClosed
	}
	return n, at, nil, err
}

// eachLine calls f with each whole line and where it begins.
func eachLine(r io.Reader, f func(at int64, line []byte)) error {
	b := bufio.NewReaderSize(r, chunk)
	var at int64
	for {
		line, err := b.ReadSlice('\n')
		if err == nil {
			f(at, line[:len(line)-1])
		}
		at += int64(len(line))
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) { // that: longer than any record, so none
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}
