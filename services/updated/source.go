package updated

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// A source is where an image comes from. Its errors are of kind Unavailable if another try may help.
type source interface {
	// head returns the manifest's bytes and its signature, unverified. It is called first, once.
	head(context.Context) (manifest, signature []byte, err error)
	// open returns a reader of a file from offset on, and how many bytes of it are to be thrown away first. The reader may hold more than
	// length bytes, and may fail at any time.
	open(ctx context.Context, h bundle.Head, file int, offset, length int64) (body io.ReadCloser, skip int64, err error)
	// pieces reports whether a part of a file costs no more than the part; if not, files are read in one go. It is called after head.
	pieces(context.Context) bool
	String() string
}

// limits say how much patience there is with a source. Tests have less.
type limits struct {
	credit int           // tries that may fail before anything was received
	earn   int64         // bytes for which one more is granted, up to credit
	stall  time.Duration // in which least bytes must come, or the connection is given up
	least  int64
	pause  time.Duration // after the first failure; it doubles up to maxPause
}

var patient = limits{credit: 8, earn: 1 << 20, stall: 30 * time.Second, least: 64 << 10, pause: 500 * time.Millisecond}

const maxPause = 8 * time.Second

// A resumer reads one part of a file, and goes on where it was when the source fails: again and again as long as it gets ahead, a few times
// if it does not.
type resumer struct {
	ctx    context.Context
	src    source
	limits limits
	head   bundle.Head
	file   int
	at     int64 // next byte
	end    int64
	note   func(string) // told why it had to try again

	body   io.ReadCloser
	watch  *watch
	credit *int // shared by all parts of an upgrade
	earned *int64
	pause  time.Duration
}

func (r *resumer) Read(p []byte) (int, error) {
	for r.at < r.end {
		if r.body == nil {
			if err := r.connect(); err != nil {
				if err := r.again(err); err != nil {
					return 0, err
				}
				continue
			}
		}
		n, err := r.body.Read(p[:min(int64(len(p)), r.end-r.at)])
		r.watch.moved(n)
		r.at += int64(n)
		if *r.earned += int64(n); *r.earned >= r.limits.earn {
			*r.earned = 0
			*r.credit = min(*r.credit+1, r.limits.credit)
			r.pause = 0
		}
		if n > 0 {
			return n, nil // an error comes again
		}
		if err == nil {
			continue
		}
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the connection ended at byte %d, %d before the end", r.at, r.end-r.at)
		}
		err = r.watch.cause(err)
		r.close()
		if errs.Of(err) == errs.Internal { // nobody said what it is: the line is bad
			err = errs.New(errs.Unavailable, "%w", err)
		}
		if err := r.again(err); err != nil {
			return 0, err
		}
	}
	return 0, io.EOF
}

// connect opens the source at the next byte.
func (r *resumer) connect() error {
	ctx, cancel := context.WithCancelCause(r.ctx)
	w := newWatch(r.limits, cancel)
	body, skip, err := r.src.open(ctx, r.head, r.file, r.at, r.end-r.at)
	if err != nil {
		err = w.cause(err)
		w.stop()
		return err
	}
	r.body, r.watch = body, w
	buf := make([]byte, 32<<10)
	for skip > 0 {
		n, err := body.Read(buf[:min(int64(len(buf)), skip)])
		w.moved(n)
		skip -= int64(n)
		if err != nil && skip > 0 {
			err = w.cause(err)
			r.close()
			return errs.New(errs.Unavailable, "the connection ended before byte %d: %w", r.at, err)
		}
	}
	return nil
}

// again decides whether there is another try after an error, and waits for it.
func (r *resumer) again(err error) error {
	what := fmt.Sprintf("fetch %s from %s", r.head.Manifest.Files[r.file].Name, r.src)
	if r.ctx.Err() != nil {
		return r.ctx.Err()
	}
	if !errs.Is(err, errs.Unavailable) {
		return errs.New(errs.Of(err), "%s: %w", what, err)
	}
	if *r.credit--; *r.credit < 0 {
		return errs.New(errs.Unavailable, "%s: given up after %d failures in a row, at byte %d of %d; the last: %w",
			what, r.limits.credit+1, r.at, r.head.Manifest.Files[r.file].Size, err)
	}
	r.note(errs.Text(err))
	r.pause = min(max(2*r.pause, r.limits.pause), maxPause)
	return sleep(r.ctx, r.pause)
}

func (r *resumer) close() {
	if r.body != nil {
		_ = r.body.Close() // only read
		r.watch.stop()
		r.body = nil
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// A watch ends a connection over which too little comes.
type watch struct {
	limits limits
	bytes  atomic.Int64
	timer  *time.Timer
	cancel context.CancelCauseFunc
	late   atomic.Bool
}

func newWatch(l limits, cancel context.CancelCauseFunc) *watch {
	w := &watch{limits: l, cancel: cancel}
	w.timer = time.AfterFunc(l.stall, w.look)
	return w
}

// look is called once in a while.
func (w *watch) look() {
	if w.bytes.Swap(0) < w.limits.least {
		w.late.Store(true)
		w.cancel(errStalled)
		return
	}
	w.timer.Reset(w.limits.stall)
}

var errStalled = errors.New("the source stalls")

func (w *watch) moved(n int) { w.bytes.Add(int64(n)) }

// cause is the watch's own word if it ended the connection, else err.
func (w *watch) cause(err error) error {
	if w.late.Load() {
		return errs.New(errs.Unavailable, "%w: less than %d bytes in %s", errStalled, w.limits.least, w.limits.stall)
	}
	return err
}

func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}
