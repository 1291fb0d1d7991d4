package updated

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
)

// The journal is what outlives a boot: who installed what and when, and what the version on trial was doing last. It is a file on STATE,
// which the version that is fallen back to must be able to read: fields are added, never changed, and unknown ones are left out.
const (
	journalFile   = "journal.json"
	journalFormat = 1
	maxJournal    = 1 << 20 // bytes
	maxHistory    = 32
	maxLines      = 120
	maxLine       = 400 // bytes
)

// A journal is the file's content. The zero value is an empty one.
type journal struct {
	Format  int      `json:"format"`
	History []event  `json:"history"` // oldest first
	Trial   *trial   `json:"trial,omitempty"`
	Failure *failure `json:"failure,omitempty"`
}

// An event is one line of history.
type event struct {
	Time    time.Time `json:"time"`
	What    string    `json:"what"` // as in update.v1.History
	Version string    `json:"version"`
	By      string    `json:"by,omitempty"`
	Detail  string    `json:"detail,omitempty"`
}

// A trial is the last sign of life of a version on trial. It is written every few seconds, so that the version after it can say what became of it.
type trial struct {
	Version  string        `json:"version"`
	Root     string        `json:"root"`
	Sequence uint32        `json:"sequence"`
	Try      uint32        `json:"try"`
	Time     time.Time     `json:"time"`
	Uptime   time.Duration `json:"uptime"` // nanoseconds
	Missing  string        `json:"missing"`
	End      string        `json:"end,omitempty"`  // why it ended, if it knew
	Late     bool          `json:"late,omitempty"` // an earlier try of the same version has had all its time
	Lines    []string      `json:"lines"`          // of the kernel's log, PID 1's among them
}

// of reports whether the trial is of the version that runs.
func (t *trial) of(r *slotv1.Slot) bool {
	return t != nil && t.Root == r.GetRootHash() && t.Sequence == r.GetSequence()
}

// late reports whether an earlier try of the version that runs has had all its time.
func (t *trial) late(r *slotv1.Slot) bool {
	return t.of(r) && (t.Late || t.End != "" && t.Try != r.GetTriesDone())
}

// A failure is a version that was tried and left.
type failure struct {
	Version  string    `json:"version"`
	Root     string    `json:"root"`
	Sequence uint32    `json:"sequence"`
	Tries    uint32    `json:"tries"`
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
	Lines    []string  `json:"lines"`
}

// readJournal reads the file in a folder; a folder without one has an empty journal.
func readJournal(dir string) (journal, error) {
	f, err := os.Open(filepath.Join(dir, journalFile))
	if errors.Is(err, fs.ErrNotExist) {
		return journal{}, nil
	}
	if err != nil {
		return journal{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return journal{}, err
	}
	if fi.Size() > maxJournal {
		return journal{}, fmt.Errorf("%s has %d bytes; at most %d are allowed", journalFile, fi.Size(), maxJournal)
	}
	var j journal
	if err := json.NewDecoder(f).Decode(&j); err != nil {
		return journal{}, fmt.Errorf("%s: %w", journalFile, err)
	}
	if j.Format > journalFormat {
		j.Format = journalFormat // a later version's: what it added is left out
	}
	return j, nil
}

// write replaces the file: a power cut leaves the old or the new one.
func (j journal) write(dir string) error {
	j.Format = journalFormat
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	next := filepath.Join(dir, "new.tmp")
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(next, filepath.Join(dir, journalFile)), d.Sync())
}

// say adds to the history.
func (j *journal) say(e event) {
	e.Detail = cut(e.Detail)
	j.History = append(j.History, e)
	if n := len(j.History) - maxHistory; n > 0 {
		j.History = slices.Clone(j.History[n:])
	}
}

// cut bounds a line.
func cut(s string) string {
	if len(s) <= maxLine {
		return s
	}
	return string(bytes.ToValidUTF8([]byte(s[:maxLine-3]), nil)) + "…"
}

// tail bounds lines to the last ones.
func tail(lines []string) []string {
	if n := len(lines) - maxLines; n > 0 {
		lines = lines[n:]
	}
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = cut(l)
	}
	return out
}
