// Package reconcile has the only control loop in the tree, and the Control service on top of it.
//
// A round observes, plans, applies and observes again; events only wake it. The newest spec wins, a failed step does not
// stop the others, and a round that did not converge is tried again, with growing pauses.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/proto"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
)

// System is what a daemon gives the loop. All functions are called from one goroutine, but for Parse and Plan, which must be pure,
// and Observe, which PlanSpec calls too.
type System[Spec, State any, Step fmt.Stringer] struct {
	// Parse reads the documents handed out by machined.
	Parse func(documents []byte) (Spec, error)
	// Observe reads the kernel.
	Observe func(context.Context) (State, error)
	// Plan returns the steps from a state to a spec, or why there is no way. Equal inputs give equal steps.
	Plan func(Spec, State) ([]Step, error)
	// Bare plans as long as there is no spec (storaged: machined's configuration lies on a volume that must be mounted
	// first). It must be pure. It may be nil: then nothing is done without a spec.
	Bare func(State) ([]Step, error)
	// Apply does one step. Doing a done step succeeds. It returns ErrSkipped for a step that an earlier failure made impossible.
	Apply func(context.Context, Step) error
	// Conditions are what a look found well or not that no step mends; the names are always the same. It must be pure. It may be nil.
	Conditions func(State) []*controlv1.Condition
	// Restart says why the machine has to be restarted now; "" if it need not. It must be pure. It may be nil.
	Restart func(State) string
	// Report is called after each round with what was read back; it must not block. It may be nil.
	Report func(State)
}

// ErrSkipped is Apply's answer for a step that could not be tried because an earlier one of the round failed. That one's error
// says what is wrong; this one is not reported.
var ErrSkipped = errors.New("skipped: an earlier step failed")

// Pauses between rounds that did not converge.
const (
	firstPause = 250 * time.Millisecond
	maxPause   = 30 * time.Second
)

// Loop runs one System. Make it with New; Run must be called once.
type Loop[Spec, State any, Step fmt.Stringer] struct {
	sys    System[Spec, State, Step]
	log    *slog.Logger
	resync time.Duration
	wake   chan struct{}

	spec  latest.Cell[versioned[Spec]]
	state latest.Cell[*controlv1.State]
}

type versioned[Spec any] struct {
	generation uint64 // 0: there is no spec yet
	spec       Spec
}

// New returns a loop that looks again after resync even if nothing wakes it; 0 means one minute.
func New[Spec, State any, Step fmt.Stringer](sys System[Spec, State, Step], log *slog.Logger, resync time.Duration) *Loop[Spec, State, Step] {
	if resync == 0 {
		resync = time.Minute
	}
	l := &Loop[Spec, State, Step]{sys: sys, log: log, resync: resync, wake: make(chan struct{}, 1)}
	l.state.Set(&controlv1.State{})
	return l
}

// Wake asks for a round soon. It never blocks; many wakes make one round.
func (l *Loop[Spec, State, Step]) Wake() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Set replaces the spec. An older generation than the present one is a Conflict; the same again is fine.
func (l *Loop[Spec, State, Step]) Set(generation uint64, spec Spec) error {
	if have, _ := l.spec.Get(); generation < have.generation {
		return errs.New(errs.Conflict, "generation %d is older than %d, which runs", generation, have.generation)
	}
	l.spec.Set(versioned[Spec]{generation, spec})
	l.Wake()
	return nil
}

// Spec returns the present spec and its generation; 0 if there is none yet.
func (l *Loop[Spec, State, Step]) Spec() (Spec, uint64) {
	v, _ := l.spec.Get()
	return v.spec, v.generation
}

// State returns what the last round left, for status messages. The result must not be changed.
func (l *Loop[Spec, State, Step]) State() *controlv1.State {
	s, _ := l.state.Get()
	return s
}

// Run works until ctx is done; it returns ctx's error.
func (l *Loop[Spec, State, Step]) Run(ctx context.Context) error {
	pause := firstPause
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.wake:
		case <-timer.C:
		}
		next := l.resync
		if l.round(ctx) {
			pause = firstPause
		} else {
			next = min(pause, l.resync)
			pause = min(2*pause, maxPause)
		}
		timer.Reset(next)
	}
}

// round does one round and reports whether it left nothing to do.
func (l *Loop[Spec, State, Step]) round(ctx context.Context) bool {
	v, _ := l.spec.Get()
	have, err := l.sys.Observe(ctx)
	var steps []Step
	if err == nil {
		steps, err = l.plan(v, have)
	}
	for _, s := range steps {
		start := time.Now()
		if e := l.sys.Apply(ctx, s); e != nil {
			if errors.Is(e, ErrSkipped) && err != nil {
				continue
			}
			err = errors.Join(err, fmt.Errorf("%s: %w", s, e))
			continue
		}
		l.log.Info("step done", "step", s.String(), "generation", v.generation, "dur", time.Since(start).String())
	}
	if len(steps) > 0 {
		var e error
		if have, e = l.sys.Observe(ctx); e != nil {
			err = errors.Join(err, e)
		} else if steps, e = l.plan(v, have); e != nil {
			err = errors.Join(err, e)
		}
	}
	if ctx.Err() != nil {
		return false
	}
	st := &controlv1.State{Generation: v.generation, Converged: err == nil && len(steps) == 0 && v.generation > 0}
	for _, s := range steps {
		st.Pending = append(st.Pending, s.String())
	}
	if l.sys.Conditions != nil {
		st.Conditions = l.sys.Conditions(have)
	}
	if l.sys.Restart != nil {
		st.Restart = l.sys.Restart(have)
	}
	if err != nil {
		st.Error = errs.Text(err)
		if was, _ := l.state.Get(); was.GetError() != st.Error { // repeats are said once
			l.log.Warn("round failed", "generation", v.generation, "err", st.Error)
		}
	}
	if was, _ := l.state.Get(); !proto.Equal(was, st) {
		l.state.Set(st)
	}
	if l.sys.Report != nil {
		l.sys.Report(have)
	}
	return err == nil && len(steps) == 0
}

func (l *Loop[Spec, State, Step]) plan(v versioned[Spec], have State) ([]Step, error) {
	switch {
	case v.generation > 0:
		return l.sys.Plan(v.spec, have)
	case l.sys.Bare != nil:
		return l.sys.Bare(have)
	}
	return nil, nil
}
