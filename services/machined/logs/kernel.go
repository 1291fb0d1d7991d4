package logs

import (
	"bytes"
	"context"
	"strconv"
	"strings"
	"sync"
	"time"
)

// markSize is how much of a kernel log's end is remembered to find the place again; stamps in it are of microseconds.
const markSize = 512

// Kernel reads the kernel's ring as whole texts and tells what is new in them. One buffer serves all readers.
type Kernel struct {
	// Size returns the ring's size in bytes, and Read fills a buffer with its newest bytes.
	Size func() (int, error)
	Read func([]byte) (int, error)
	// Boot is when the stamps' clock was zero.
	Boot func() time.Time

	mu      sync.Mutex
	buf     []byte // guarded by mu; nil while nobody reads
	readers int    // guarded by mu
}

// Stream sends the kernel's lines as Log.Stream does. With follow, it looks for new ones every pause.
func (k *Kernel) Stream(ctx context.Context, tail uint32, follow bool, pause time.Duration, send func(Line) error) error {
	k.mu.Lock()
	k.readers++
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.readers--; k.readers == 0 {
			k.buf = nil
		}
	}()
	boot := k.Boot()
	text, mark, err := k.news(nil)
	if err != nil {
		return err
	}
	text = lastLines(text, tail)
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		for line := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
			if line == "" {
				continue
			}
			if err := send(kernelLine(line, boot)); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if text, mark, err = k.news(mark); err != nil {
			return err
		}
	}
}

// news returns what stands behind the mark, and the next mark. If the mark is gone, all is news.
func (k *Kernel) news(mark []byte) (string, []byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.buf == nil {
		size, err := k.Size()
		if err != nil {
			return "", nil, err
		}
		k.buf = make([]byte, min(max(size, 4<<10), 4<<20))
	}
	n, err := k.Read(k.buf)
	if err != nil {
		return "", nil, err
	}
	all := k.buf[:bytes.LastIndexByte(k.buf[:n], '\n')+1]
	fresh := all
	if i := bytes.LastIndex(all, mark); len(mark) > 0 && i >= 0 {
		fresh = all[i+len(mark):]
	}
	next := bytes.Clone(all[max(0, len(all)-markSize):])
	return string(fresh), next, nil
}

// lastLines returns the last lines of a text; 0 means all.
func lastLines(text string, last uint32) string {
	if last == 0 {
		return text
	}
	at := len(strings.TrimSuffix(text, "\n"))
	for range last {
		if at = strings.LastIndexByte(text[:at], '\n'); at < 0 {
			return text
		}
	}
	return text[at+1:]
}

// kernelLine reads `<6>[   12.345678] text`; what is missing in it is left out.
func kernelLine(line string, boot time.Time) Line {
	out := Line{Time: boot}
	text := line
	level := ""
	if rest, ok := strings.CutPrefix(text, "<"); ok {
		if digits, after, ok := strings.Cut(rest, ">"); ok {
			if n, err := strconv.Atoi(digits); err == nil {
				level, text = levels[n&7], after
			}
		}
	}
	if rest, ok := strings.CutPrefix(text, "["); ok {
		if stamp, after, ok := strings.Cut(rest, "] "); ok {
			if d, err := time.ParseDuration(strings.TrimSpace(stamp) + "s"); err == nil {
				out.Time, text = boot.Add(d), after
			}
		}
	}
	if level != "" {
		text = level + ": " + text
	}
	out.Text = Clean(text)
	return out
}

// levels are those of syslog(2); those that say nothing are empty.
var levels = [8]string{"emerg", "alert", "crit", "err", "warning", "", "", ""}
