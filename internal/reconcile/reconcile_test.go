package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// step adds a letter to the model's state.
type step struct{ letter string }

func (s step) String() string { return "add " + s.letter }

// model is a world that is a set of letters; those in broken cannot be added.
type model struct {
	mu     sync.Mutex
	have   string
	broken string
	rounds int
}

func (m *model) system() System[string, string, step] {
	return System[string, string, step]{
		Parse: func(doc []byte) (string, error) {
			if strings.Contains(string(doc), "!") {
				return "", errors.New("no exclamation marks")
			}
			return string(doc), nil
		},
		Observe: func(context.Context) (string, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.rounds++
			return m.have, nil
		},
		Plan: func(want, have string) (steps []step, err error) {
			for _, r := range want {
				if !strings.ContainsRune(have, r) {
					steps = append(steps, step{string(r)})
				}
			}
			return steps, nil
		},
		Apply: func(_ context.Context, s step) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if strings.Contains(m.broken, s.letter) {
				return fmt.Errorf("letter %s is broken", s.letter)
			}
			m.have += s.letter
			return nil
		},
	}
}

func (m *model) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func (m *model) world() (have string) { m.set(func() { have = m.have }); return have }

// run starts a loop in a bubble of virtual time.
func run(t *testing.T, m *model) *Loop[string, string, step] {
	t.Helper()
	l := New(m.system(), slog.New(slog.DiscardHandler), time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v, want context.Canceled", err)
		}
	})
	return l
}

func TestConverges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{}
		l := run(t, m)
		synctest.Wait()
		if s := l.State(); s.Generation != 0 || s.Converged {
			t.Errorf("without a spec: %v, want generation 0, not converged", s)
		}
		if err := l.Set(1, "ab"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := l.State(); s.Generation != 1 || !s.Converged || m.world() != "ab" {
			t.Errorf("state %v, world %q; want generation 1 converged, \"ab\"", s, m.world())
		}
	})
}

func TestOlderGenerationIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := run(t, &model{})
		for _, c := range []struct {
			generation uint64
			conflict   bool
		}{{5, false}, {5, false}, {4, true}, {6, false}} {
			if err := l.Set(c.generation, "a"); errs.Is(err, errs.Conflict) != c.conflict {
				t.Errorf("Set(%d) = %v, want conflict %v", c.generation, err, c.conflict)
			}
		}
		synctest.Wait()
	})
}

// A step that fails is said, does not stop the others, and is tried again with growing pauses until it works.
func TestFailedStepIsRetried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{broken: "b"}
		l := run(t, m)
		if err := l.Set(1, "abc"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := l.State()
		if s.Converged || len(s.Pending) != 1 || s.Pending[0] != "add b" || !strings.Contains(s.Error, "letter b is broken") || m.world() != "ac" {
			t.Fatalf("state %v, world %q; want b pending with its reason, a and c done", s, m.world())
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		m.set(func() {
			if m.rounds > 20 {
				t.Errorf("%d looks in 10 s: pauses do not grow", m.rounds)
			}
		})
		m.set(func() { m.broken = "" })
		time.Sleep(maxPause)
		synctest.Wait()
		if s := l.State(); !s.Converged || s.Error != "" {
			t.Errorf("after the repair: %v, want converged", s)
		}
	})
}

// What changes behind the daemon's back is found without any event, and at once with one.
func TestDriftIsRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{}
		l := run(t, m)
		if err := l.Set(1, "a"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		m.set(func() { m.have = "" })
		time.Sleep(time.Minute + time.Second)
		synctest.Wait()
		if m.world() != "a" {
			t.Errorf("world %q a minute later, want \"a\"", m.world())
		}
		m.set(func() { m.have = "" })
		l.Wake()
		l.Wake()
		synctest.Wait()
		if m.world() != "a" {
			t.Errorf("world %q after a wake, want \"a\"", m.world())
		}
	})
}

func TestControl(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &model{have: "a"}
		l := run(t, m)
		c := &Control[string, string, step]{Loop: l, Metrics: metrics.New("test")}
		spec := func(generation uint64, doc string) *controlv1.Spec {
			return &controlv1.Spec{Generation: generation, Documents: []byte(doc)}
		}
		p, err := c.PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: spec(1, "abc")})
		if err != nil || strings.Join(p.Steps, ",") != "add b,add c" || m.world() != "a" {
			t.Errorf("PlanSpec = %v, %v, world %q; want two steps and nothing done", p, err, m.world())
		}
		for _, bad := range []*controlv1.Spec{nil, spec(0, "a"), spec(1, "a!")} {
			if _, err := c.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: bad}); !errs.Is(err, errs.Invalid) {
				t.Errorf("SetSpec(%v) = %v, want invalid", bad, err)
			}
		}
		if _, err := c.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: spec(1, "abc")}); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if m.world() != "abc" {
			t.Errorf("world %q, want abc", m.world())
		}
	})
}
