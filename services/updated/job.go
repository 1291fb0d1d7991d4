package updated

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/proto"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// beginnings is how often an upgrade begins again because storaged was started anew meanwhile.
const beginnings = 3

// A job is one upgrade, from source to the moment when the next boot will try it.
type job struct {
	slots  slotv1.SlotsClient
	keys   func() (bundle.Keys, error)
	limits limits
	now    func() time.Time
	tell   func(*updatev1.UpgradeProgress) // gets a copy; must not block

	start, step time.Time
	progress    updatev1.UpgradeProgress
}

// run returns the version that the next boot tries.
func (j *job) run(ctx context.Context, src source) (string, error) {
	j.start = j.now()
	j.enter("look", 0)
	raw, sig, err := src.head(ctx)
	if err != nil {
		return "", err
	}
	keys, err := j.keys()
	if err != nil {
		return "", fmt.Errorf("release keys of this image: %w", err)
	}
	// storaged will verify it again: it believes nobody. Here it keeps us from fetching in vain.
	m, err := keys.Verify(raw, sig)
	if err != nil {
		return "", errs.New(errs.Invalid, "%s: %w", src, err)
	}
	h := bundle.Head{Manifest: m, Raw: raw, Signature: sig}
	j.progress.Version, j.progress.ImageBytes = m.Version, uint64(m.Size())
	for try := 1; ; try++ {
		version, err := j.once(ctx, src, h)
		if !errs.Is(err, errs.Conflict) && !errs.Is(err, errs.Unavailable) || ctx.Err() != nil || try == beginnings || errors.As(err, new(sourceError)) {
			return version, err
		}
		j.note("storaged was started anew; going on")
	}
}

// A sourceError is the source's, which had its tries: beginning again would not help.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// once is one session with storaged.
func (j *job) once(ctx context.Context, src source, h bundle.Head) (string, error) {
	last, err := j.begin(ctx, h)
	if err != nil {
		return "", err
	}
	defer func() {
		// Even if ctx is done: storaged then closes what it has open.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_, _ = j.slots.Abort(ctx, &slotv1.AbortRequest{Session: last.GetSession()}) // a session that is over is fine too
	}()
	if err := checkMissing(h.Manifest, last.GetMissing()); err != nil {
		return "", err
	}
	total := bytesOf(h.Manifest, last.GetMissing())
	j.progress.FetchBytes = uint64(total)
	j.enter("fetch", total)
	f := &fetcher{src: src, head: h, slots: j.slots, session: last.GetSession(), limits: j.limits, note: j.note, done: func(n int64) {
		j.progress.Note = ""
		j.update(int64(j.progress.DoneBytes)+n, total)
	}}
	if err := f.fetch(ctx, last.GetMissing()); err != nil {
		return "", err
	}
	j.enter("verify", h.Manifest.Files[bundle.Root].Size)
	stream, err := j.slots.Commit(ctx, &slotv1.CommitRequest{Session: last.GetSession()})
	if err != nil {
		return "", err
	}
	version := ""
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
		if version = r.GetVersion(); version == "" {
			j.update(int64(r.GetProgress().GetDoneBytes()), int64(r.GetProgress().GetTotalBytes()))
		}
	}
	j.enter("done", 0)
	return version, nil
}

func (j *job) begin(ctx context.Context, h bundle.Head) (*slotv1.BeginResponse, error) {
	j.enter("compare", 2*h.Manifest.Size())
	stream, err := j.slots.Begin(ctx, &slotv1.BeginRequest{Manifest: h.Raw, Signature: h.Signature})
	if err != nil {
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errs.New(errs.Unavailable, "storaged began nothing")
		}
		if err != nil || r.GetSession() != 0 {
			return r, err
		}
		j.update(int64(r.GetProgress().GetDoneBytes()), int64(r.GetProgress().GetTotalBytes()))
	}
}

func (j *job) enter(step string, total int64) {
	j.step = j.now()
	j.progress.Step = step
	j.update(0, total)
}

func (j *job) note(text string) {
	j.progress.Note = text
	j.update(int64(j.progress.DoneBytes), int64(j.progress.TotalBytes))
}

// update tells how far the step is. What the step still takes follows from how fast it was; of the steps behind it only that is known which
// is as long as one before.
func (j *job) update(done, total int64) {
	now := j.now()
	j.progress.DoneBytes, j.progress.TotalBytes = uint64(done), uint64(total)
	elapsed, here := now.Sub(j.start).Seconds(), now.Sub(j.step).Seconds()
	j.progress.ElapsedSeconds, j.progress.ExpectedSeconds = elapsed, 0
	if j.progress.Step == "done" {
		j.progress.ExpectedSeconds = elapsed
	} else if total > 0 && here > 0.5 && float64(done) > 0.01*float64(total) && j.progress.Step != "compare" {
		j.progress.ExpectedSeconds = elapsed + here*float64(total-done)/float64(done)
		if j.progress.Step == "fetch" { // reading it all back takes about half as long as comparing two versions did
			j.progress.ExpectedSeconds += j.step.Sub(j.start).Seconds() / 2
		}
	}
	j.tell(proto.Clone(&j.progress).(*updatev1.UpgradeProgress))
}
