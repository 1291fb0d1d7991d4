package machined

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/services/machined/why"
)

// A link is another daemon's Control service.
type link interface {
	// Watch calls f with the newest state now and after each change, until the daemon goes or ctx is done.
	Watch(ctx context.Context, f func(*controlv1.State)) error
	Set(context.Context, *controlv1.Spec) error
	Plan(context.Context, *controlv1.Spec) ([]string, error)
	Metrics(context.Context) ([]*controlv1.Family, error)
}

// Deadlines and pauses towards daemons.
const (
	setTime      = 10 * time.Second
	planTime     = 5 * time.Second
	metricsTime  = 2 * time.Second
	firstPause   = 100 * time.Millisecond
	maxPause     = 5 * time.Second
	firstRefused = time.Second
	maxRefused   = 30 * time.Second
)

// A handout brings one daemon its sections, whenever there are new ones and whenever the daemon is new.
type handout struct {
	recipient
	link    link
	running *latest.Cell[running]
	say     func(source, kind, text string)
	log     *slog.Logger

	status latest.Cell[status]
}

// status is what is known of one daemon's way to its spec.
type status struct {
	here    bool             // it is connected and has told its state
	state   *controlv1.State // its last word; nil before the first, never changed
	refused string           // why it did not take the newest spec; "" if it did

	since        map[string]why.Mark // by condition that tells of trouble; never changed
	lost, behind why.Mark            // since when it is not here, and has not converged; zero where it is, or has, or nothing is known
}

// report is the status as ListSpecs shows it; generation is the one that was handed out.
func (h *handout) report(generation uint64) (converged bool, st *controlv1.State) {
	s, _ := h.status.Get()
	out := &controlv1.State{Generation: s.state.GetGeneration(), Pending: s.state.GetPending(), Error: s.state.GetError(),
		Conditions: s.state.GetConditions()}
	switch {
	case s.refused != "":
		out.Error = "the spec was refused: " + s.refused
	case !s.here:
		out.Error = "does not answer"
	}
	out.Converged = s.state.GetConverged() && s.here && s.refused == "" && generation != 0 && s.state.GetGeneration() == generation
	return out.Converged, out
}

// run works until ctx is done; it returns ctx's error.
func (h *handout) run(ctx context.Context) error {
	wait := firstPause
	for {
		met, err := h.session(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if met {
			wait = firstPause
		}
		s, _ := h.status.Get()
		if s.here {
			s.here, s.lost = false, why.Mark{At: time.Now()}
		}
		h.status.Set(s)
		h.log.Debug("daemon lost", "service", h.daemon, "err", errs.Text(err))
		if err := pause(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, maxPause)
	}
}

// session lasts as long as one connection. It reports whether the daemon was met at all.
func (h *handout) session(ctx context.Context) (met bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	states := make(chan *controlv1.State)
	done := make(chan error, 1)
	go func() {
		done <- h.link.Watch(ctx, func(st *controlv1.State) {
			select {
			case states <- st:
			case <-ctx.Done():
			}
		})
	}()
	defer func() {
		cancel()
		if err == nil {
			err = <-done
		}
	}()
	var pushed uint64 // the generation that the daemon took on this connection
	wait := firstRefused
	for {
		now, changed := h.running.Get()
		var retry <-chan time.Time
		if met && now.Number != 0 && now.Number != pushed {
			if h.push(ctx, now) {
				pushed, wait = now.Number, firstRefused
			} else {
				t := time.NewTimer(wait)
				defer t.Stop() // at most a few for each connection: the pauses grow
				retry, wait = t.C, min(2*wait, maxRefused)
			}
		}
		select {
		case <-ctx.Done():
			return met, nil
		case err := <-done:
			if err == nil {
				err = errors.New("it ended the stream")
			}
			return met, err
		case st := <-states:
			met = true
			h.observe(st)
		case <-changed:
		case <-retry:
		}
	}
}

// push hands a generation over and says whether it was taken.
func (h *handout) push(ctx context.Context, now running) bool {
	ctx, cancel := context.WithTimeout(ctx, setTime)
	defer cancel()
	err := h.link.Set(ctx, h.spec(now.Number, now.set))
	s, _ := h.status.Get()
	if was := s.refused; errs.Text(err) != was {
		s.refused = errs.Text(err)
		if err != nil {
			s.behind = cmp.Or(s.behind, why.Mark{At: time.Now()})
		}
		h.status.Set(s)
		if err != nil {
			h.log.Warn("spec refused", "service", h.daemon, "generation", now.Number, "err", s.refused)
			h.say(h.daemon, typeConfig, fmt.Sprintf("refused generation %d: %s", now.Number, s.refused))
		}
	}
	return err == nil
}

// observe takes note of a state, and tells of it if a person wants to know.
func (h *handout) observe(st *controlv1.State) {
	was, _ := h.status.Get()
	now := was.marked(st, time.Now())
	now.here, now.state, now.lost = true, st, why.Mark{}
	h.status.Set(now)
	a, b := was.state, st
	switch {
	case b.GetError() != "" && b.GetError() != a.GetError():
		h.say(h.daemon, typeConfig, fmt.Sprintf("generation %d: %s", b.GetGeneration(), b.GetError()))
	case b.GetConverged() && (!a.GetConverged() || a.GetGeneration() != b.GetGeneration() || a.GetError() != ""):
		h.say(h.daemon, typeConfig, fmt.Sprintf("reached generation %d", b.GetGeneration()))
	}
}
