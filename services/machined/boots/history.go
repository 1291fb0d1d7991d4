package boots

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

const (
	// Keep is how many boots are kept, the running one among them.
	Keep = 16

	folder   = "boots"
	maxEntry = 8 << 10 // bytes of a boot's own file
	// Suffixes of the files of a boot. A log has an older segment too.
	bootSuffix  = ".boot"
	logSuffix   = ".log"
	olderSuffix = ".log.old"
	panicSuffix = ".panic"
)

// A History is the boots on STATE, in files "<number, 8 digits>.boot", with their last lines beside. One goroutine at a time may use it.
type History struct {
	dir     string
	boots   []Boot // ascending; the last one runs
	journal *Journal
}

// Open opens the history in a folder below parent, or makes it, and tells it of the running boot and of what that found of the one before
// it. The journal then writes there. A process that is started again in the same boot goes on where the last one ended; since is how far
// the journal had come then.
//
// What is damaged is left out; what cannot be written is an error, and the history may be opened again.
func Open(parent string, now Boot, e Evidence, j *Journal) (h *History, since time.Time, err error) {
	h = &History{dir: filepath.Join(parent, folder), journal: j}
	if err := os.Mkdir(h.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, since, err
	}
	if err := h.read(); err != nil {
		return nil, since, err
	}
	if n := len(h.boots); n > 0 && h.boots[n-1].ID == now.ID && now.ID != "" {
		since = h.seen(h.boots[n-1].Number)
	} else if err := h.begin(now, e); err != nil {
		return nil, since, fmt.Errorf("boots: %w", err)
	}
	return h, since, j.open(h.path(h.running().Number, logSuffix))
}

func (h *History) running() *Boot { return &h.boots[len(h.boots)-1] }

// begin settles how the boot before ended and adds the running one.
func (h *History) begin(now Boot, e Evidence) error {
	now.Number = 1
	var fresh []Boot
	if n := len(h.boots); n > 0 {
		last := h.boots[n-1]
		ended, later := settle(last, e)
		if ended.Seen = h.seen(last.Number); ended.Seen.IsZero() {
			ended.Seen = last.Started
		}
		died := last.Number
		fresh = append(fresh, ended)
		if later != nil {
			fresh, died = append(fresh, *later), later.Number
		}
		now.Number = died + 1
		if e.Panic != "" {
			if err := h.write(died, panicSuffix, []byte(e.Panic)); err != nil {
				return err
			}
		}
		h.boots = h.boots[:n-1]
	} else if e.Panic != "" { // of a boot before the first one that got as far as STATE
		fresh = append(fresh, Boot{Number: 1, End: Panic, Detail: reason(e.Panic)})
		now.Number = 2
		if err := h.write(1, panicSuffix, []byte(e.Panic)); err != nil {
			return err
		}
	}
	for _, b := range append(fresh, now) {
		if err := h.store(b); err != nil {
			return err
		}
		h.boots = append(h.boots, b)
	}
	return h.prune()
}

// Order stores who ordered the end of the running boot, and what; "" takes it back.
func (h *History) Order(text string) error {
	b := h.running()
	b.Order = text
	return h.store(*b)
}

// List returns the boots, the running one first.
func (h *History) List() []Boot {
	all := slices.Clone(h.boots)
	slices.Reverse(all)
	return all
}

// Find returns a boot by its number; 0 is the running one, -1 the one before it, and so on. The error wraps fs.ErrNotExist.
func (h *History) Find(n int64) (Boot, error) {
	i := len(h.boots) - 1 + int(max(n, -Keep))
	if n > 0 {
		i = slices.IndexFunc(h.boots, func(b Boot) bool { return b.Number == uint64(n) })
	}
	if i < 0 || i >= len(h.boots) {
		return Boot{}, fmt.Errorf("boot %d: %w", n, fs.ErrNotExist)
	}
	return h.boots[i], nil
}

// A Line is one line of a boot.
type Line struct {
	Time   time.Time
	Source string
	Text   string
}

// Lines returns the last lines of a boot, oldest first: of one source, or of all if it is ""; at most tail, or all if that is 0. Of the
// running boot it returns what the journal has flushed. It may be called beside everything else.
func (h *History) Lines(b Boot, source string, tail uint32) (all []Line, err error) {
	take := func(at time.Time, from, text string) {
		if source == "" || source == from {
			all = append(all, Line{at, from, text})
		}
	}
	h.journal.file.Lock() // which renames files
	defer h.journal.file.Unlock()
	for _, suffix := range []string{olderSuffix, logSuffix} {
		data, err := h.load(b.Number, suffix, segment+2*logs.MaxLine)
		if err != nil {
			return nil, err
		}
		for record := range strings.Lines(string(data)) {
			l := logs.Parse([]byte(strings.TrimSuffix(record, "\n")))
			from, text, ok := strings.Cut(l.Text, "\t")
			if !ok {
				from, text = "machined", "[damaged] "+l.Text
			}
			take(l.Time, from, text)
		}
	}
	data, err := h.load(b.Number, panicSuffix, maxPanic)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		take(b.Seen, "panic", strings.TrimSuffix(line, "\n"))
	}
	if tail > 0 && uint32(len(all)) > tail {
		all = all[uint32(len(all))-tail:]
	}
	return all, nil
}

// seen is the time of the newest line of a boot; zero if there is none.
func (h *History) seen(n uint64) (at time.Time) {
	lines, err := h.Lines(Boot{Number: n}, "", 0)
	if err != nil {
		return at
	}
	for _, l := range lines {
		if l.Time.After(at) {
			at = l.Time
		}
	}
	return at
}

func (h *History) path(n uint64, suffix string) string {
	return filepath.Join(h.dir, fmt.Sprintf("%08d%s", n, suffix))
}

// read fills the list. A file that is damaged is passed over: the boot it was about is then not told of.
func (h *History) read() error {
	names, err := filepath.Glob(filepath.Join(h.dir, "*"+bootSuffix))
	if err != nil {
		return err
	}
	for _, name := range names {
		n, err := strconv.ParseUint(strings.TrimSuffix(filepath.Base(name), bootSuffix), 10, 64)
		if err != nil {
			continue
		}
		data, err := h.load(n, bootSuffix, maxEntry)
		if err != nil {
			return err
		}
		var b Boot
		if json.Unmarshal(data, &b) == nil && b.Number == n && n > 0 {
			h.boots = append(h.boots, b)
		}
	}
	sort.Slice(h.boots, func(i, j int) bool { return h.boots[i].Number < h.boots[j].Number })
	return nil
}

// load reads a file's last most bytes; none if it does not exist.
func (h *History) load(n uint64, suffix string, most int64) ([]byte, error) {
	f, err := os.Open(h.path(n, suffix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	data := make([]byte, min(info.Size(), most))
	read, err := f.ReadAt(data, info.Size()-int64(len(data)))
	if read == len(data) {
		err = nil
	}
	return data[:read], err
}

func (h *History) store(b Boot) error {
	data, err := json.Marshal(b)
	if err != nil {
		return err
	}
	return h.write(b.Number, bootSuffix, append(data, '\n'))
}

// write replaces a file so that a power cut leaves the old or the new one.
func (h *History) write(n uint64, suffix string, data []byte) error {
	next := filepath.Join(h.dir, "new.tmp")
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, h.path(n, suffix)); err != nil {
		return err
	}
	d, err := os.Open(h.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// prune deletes what is beyond Keep, and files of boots that are not in the list.
func (h *History) prune() error {
	h.boots = h.boots[max(0, len(h.boots)-Keep):]
	entries, err := os.ReadDir(h.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		digits, _, _ := strings.Cut(e.Name(), ".")
		n, perr := strconv.ParseUint(digits, 10, 64)
		if perr == nil && slices.ContainsFunc(h.boots, func(b Boot) bool { return b.Number == n }) {
			continue
		}
		err = errors.Join(err, os.Remove(filepath.Join(h.dir, e.Name())))
	}
	return err
}
