package updated

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// A book is the journal in memory and, once STATE is there, on the disk. It is safe for concurrent use.
type book struct {
	dir string

	mu      sync.Mutex
	journal journal // guarded by mu; until it is open, what is to be added
	open    bool    // guarded by mu
}

// load reads what earlier boots have written, if STATE is there, and reports whether the book is open. A damaged journal is put aside.
func (b *book) load() (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open {
		return true, nil
	}
	// Below the empty folder /state of the image, which is root's alone, nothing can be seen before STATE is mounted on it.
	if _, err := os.Stat(b.dir); errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return false, nil
	}
	j, err := readJournal(b.dir)
	if err != nil {
		err = errors.Join(err, os.Rename(filepath.Join(b.dir, journalFile), filepath.Join(b.dir, journalFile+".damaged")))
	}
	added := b.journal
	b.journal, b.open = j, true
	for _, e := range added.History {
		b.journal.say(e)
	}
	return true, err
}

// get returns the journal. What it points to is not changed any more.
func (b *book) get() journal {
	b.mu.Lock()
	defer b.mu.Unlock()
	j := b.journal
	j.History = append([]event(nil), j.History...)
	return j
}

// change changes the journal and writes it, if it is open.
func (b *book) change(f func(*journal)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.journal)
	if !b.open {
		return nil
	}
	return b.journal.write(b.dir)
}

// add adds to the history, and does what else is to be done with it. An error shows when the journal is written the next time.
func (b *book) add(e event, also func(*journal)) {
	_ = b.change(func(j *journal) {
		j.say(e)
		if also != nil {
			also(j)
		}
	})
}

// end notes why the running version's try ends.
func (b *book) end(why string) {
	_ = b.change(func(j *journal) {
		if j.Trial != nil {
			t := *j.Trial
			t.End = why
			j.Trial = &t
		}
	})
}

// keepBook opens the journal when STATE is there, explains what became of a version that was left, and notes signs of life of one on trial.
// It returns ctx's error.
func (d *Daemon) keepBook(ctx context.Context) error {
	said := ""
	for {
		s, changed := d.state.Get()
		err := d.turnPage(ctx, s)
		if text := errs.Text(err); err != nil && text != said && ctx.Err() == nil {
			d.log.Warn("journal not kept", "err", text)
			said = text
		}
		d.publish()
		wait := resyncTime
		switch {
		case !d.openBook() || err != nil: // somebody may be waiting for what it says
			wait, changed = bookTime, nil
		case s.onTrial():
			wait, changed = trialTime, nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
			d.loop.Wake() // a version on trial is looked at more often than the loop would by itself
		case <-changed:
			timer.Stop()
		}
	}
}

// openBook opens the journal if STATE is there, and reports whether it is open.
func (d *Daemon) openBook() bool {
	open, err := d.book.load()
	if err != nil {
		d.log.Error("journal damaged, put aside", "err", err.Error())
	}
	return open
}

// turnPage is one round of it.
func (d *Daemon) turnPage(ctx context.Context, s State) error {
	if !d.openBook() || s.Slots == nil {
		return nil
	}
	if err := d.explainLast(ctx, s); err != nil {
		return err
	}
	if !s.onTrial() {
		return nil
	}
	lines, err := d.kernelLog(ctx)
	if err != nil {
		lines = []string{"the kernel's log could not be read: " + errs.Text(err)}
	}
	spec, generation := d.loop.Spec()
	var steps []Step
	if generation > 0 {
		steps, _ = plan(spec, s)
	} else {
		steps, _ = planBare(s)
	}
	r := s.running()
	return d.book.change(func(j *journal) {
		late := j.Trial.late(r)
		if !j.Trial.of(r) || j.Trial.Try != r.GetTriesDone() {
			j.say(event{Time: time.Now(), What: "started", Version: r.GetVersion(), Detail: fmt.Sprintf("try %d", r.GetTriesDone())})
		} else if j.Trial.End != "" {
			return // the last word is said
		}
		j.Trial = &trial{Version: r.GetVersion(), Root: r.GetRootHash(), Sequence: r.GetSequence(), Try: r.GetTriesDone(), Time: time.Now(),
			Uptime: s.Uptime, Missing: cut(missing(steps)), Lines: tail(lines), Late: late}
	})
}

// bootsLimit is how long after its start a node waits for machined to know how the boot before ended; then the reason is said without that.
const bootsLimit = 5 * time.Minute

// explainLast looks for a version that was left, and says why.
func (d *Daemon) explainLast(ctx context.Context, s State) error {
	v := left(s, d.book.get())
	if v == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	e, err := d.lastEnding(ctx)
	if err != nil && s.Uptime < bootsLimit {
		return fmt.Errorf("ask machined how the boot before ended: %w", err)
	}
	var f failure
	if err := d.book.change(func(j *journal) {
		f = explain(v, *j, e, time.Now())
		j.Failure, j.Trial = &f, nil
		j.say(event{Time: time.Now(), What: "failed", Version: f.Version, Detail: f.Reason})
	}); err != nil {
		return err
	}
	d.tell(ctx, fmt.Sprintf("%s was left after %d tries: %s", f.Version, f.Tries, f.Reason))
	return nil
}

// lastEnding asks machined how the boot before this one ended.
func (d *Daemon) lastEnding(ctx context.Context) (ending, error) {
	r, err := d.cfg.Machine.ListBoots(ctx, &machinev1.ListBootsRequest{})
	if err != nil || len(r.GetBoots()) < 2 {
		return ending{}, err
	}
	e := ending{boot: r.GetBoots()[1]} // the newest first
	if e.boot.GetEnd() != machinev1.Boot_PANIC {
		return e, nil
	}
	stream, err := d.cfg.Machine.StreamBootLog(ctx, &machinev1.StreamBootLogRequest{Boot: int64(e.boot.GetNumber()), Source: "panic", Tail: maxLines})
	if err != nil {
		return e, err
	}
	return e, receive(stream.Recv, func(l *machinev1.BootLogLine) { e.lines = append(e.lines, l.GetText()) })
}

// receive calls f with each message of a stream until it ends.
func receive[T any](recv func() (T, error), f func(T)) error {
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		f(m)
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
