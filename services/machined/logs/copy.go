package logs

import (
	"bytes"
	"io"
	"time"
)

// Copy reads lines from r and appends them, stamped with the time of their arrival, until r fails. What stands behind the
// last newline then becomes a line too. It returns r's error, never nil.
func (l *Log) Copy(r io.Reader, now func() time.Time) error {
	buf := make([]byte, 8<<10)
	var line []byte // begun, without its newline yet
	cut := false    // the line is too long: the rest of it is dropped
	add := func(part []byte) {
		if room := MaxLine + 1 - len(line); len(part) > room {
			part, cut = part[:room], true
		}
		line = append(line, part...)
	}
	for {
		n, err := r.Read(buf)
		stamp := now()
		for rest := buf[:n]; len(rest) > 0; {
			part, after, whole := bytes.Cut(rest, []byte{'\n'})
			rest = after
			if !cut {
				add(part)
			}
			if whole {
				l.Append(stamp, string(line))
				line, cut = line[:0], false
			}
		}
		if err != nil {
			if len(line) > 0 {
				l.Append(stamp, string(line))
			}
			return err
		}
		if cap(line) > 4<<10 && len(line) == 0 {
			line = nil // one long line must not cost memory for ever
		}
	}
}
