package boots

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// Bounds of a journal, in bytes.
const (
	maxHeld    = 64 << 10 // that are not written yet: STATE may not be open for long, or ever
	maxText    = 1 << 10  // of a line
	maxSource  = 8 << 10  // of one source in one window: one that talks much must not push the others' words out
	window     = 10 * time.Second
	segment    = 64 << 10 // of the file; two are kept
	lineWeight = 32       // what a line takes besides its text
)

// A Journal takes the lines of everything on the node, and keeps the newest, first in memory and then, each time that Flush is called,
// on STATE. Its zero value is ready for use, without a file. It is safe for concurrent use.
type Journal struct {
	mu      sync.Mutex
	held    []entry            // guarded by mu; not written yet
	size    int                // guarded by mu; of held
	lost    int                // guarded by mu; lines that held had no room for
	sources map[string]*source // guarded by mu

	file struct { // one Flush at a time
		sync.Mutex
		log *logs.Log // guarded by file; nil until there is a file
	}
}

type entry struct {
	at           time.Time
	source, text string
}

// source is how much one source has said in the present window.
type source struct {
	since time.Time
	size  int
	left  int // lines left out
}

// Add takes a line that a source said. It does not block on a disk.
func (j *Journal) Add(at time.Time, from, text string) {
	text = logs.Cut(logs.Clean(text), maxText)
	j.mu.Lock()
	defer j.mu.Unlock()
	s := j.sources[from]
	if s == nil {
		if j.sources == nil {
			j.sources = map[string]*source{}
		}
		s = &source{since: at}
		j.sources[from] = s
	}
	if d := at.Sub(s.since); d >= window || d < 0 {
		left := s.left
		*s = source{since: at}
		if left > 0 {
			j.hold(entry{at, from, fmt.Sprintf("[%d lines left out]", left)})
		}
	}
	if s.size += len(text) + lineWeight; s.size > maxSource {
		s.left++
		return
	}
	j.hold(entry{at, from, text})
}

func (j *Journal) hold(e entry) { // mu is held
	j.held = append(j.held, e)
	j.size += len(e.text) + lineWeight
	n := 0
	for ; j.size > maxHeld; n++ {
		j.size -= len(j.held[n].text) + lineWeight
	}
	if n > 0 {
		j.lost += n
		j.held = append(j.held[:0], j.held[n:]...)
	}
}

// open gives the journal its file.
func (j *Journal) open(path string) error {
	l, err := logs.OpenSmall(path, segment)
	if err != nil {
		return err
	}
	j.file.Lock()
	defer j.file.Unlock()
	j.file.log = l
	return nil
}

// Flush writes what was added to the file, if there is one yet, and returns when it is on the disk.
func (j *Journal) Flush() error {
	j.file.Lock()
	defer j.file.Unlock()
	if j.file.log == nil {
		return nil
	}
	j.mu.Lock()
	held, lost := j.held, j.lost
	j.held, j.size, j.lost = nil, 0, 0
	j.mu.Unlock()
	if len(held) == 0 {
		return nil
	}
	if lost > 0 {
		j.file.log.Append(held[0].at, fmt.Sprintf("machined\t[%d older lines are lost: STATE was not open]", lost))
	}
	before := j.file.log.Dropped()
	for _, e := range held {
		j.file.log.Append(e.at, e.source+"\t"+e.text)
	}
	if n := j.file.log.Dropped() - before; n > 0 {
		return fmt.Errorf("%d lines could not be written", n)
	}
	return j.file.log.Sync()
}

// Close writes what is left, and closes the file.
func (j *Journal) Close() error {
	err := j.Flush()
	j.file.Lock()
	defer j.file.Unlock()
	if j.file.log != nil {
		if cerr := j.file.log.Close(); err == nil {
			err = cerr
		}
		j.file.log = nil
	}
	return err
}

// Notable says whether a line of the kernel's log belongs into a journal: warnings and worse, and what PID 1 says. level is as in
// syslog(3).
func Notable(level int, text string) bool { return level <= 4 || strings.HasPrefix(text, "init: ") }
