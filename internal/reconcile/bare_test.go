package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

type word string

func (w word) String() string { return string(w) }

// A loop with Bare works before there is a spec, and says generation 0 all the while.
func TestBare(t *testing.T) {
	var done []string
	l := New(System[string, int, word]{
		Observe: func(context.Context) (int, error) { return len(done), nil },
		Plan:    func(spec string, have int) ([]word, error) { return nil, errors.New("planned with " + spec) },
		Bare: func(have int) ([]word, error) {
			return []word{"a", "b", "c"}[min(have, 3):], nil
		},
		Apply: func(_ context.Context, w word) error { done = append(done, string(w)); return nil },
	}, slog.New(slog.DiscardHandler), 0)
	if !l.round(t.Context()) {
		t.Errorf("round did not converge: %v", l.State())
	}
	if got := strings.Join(done, ""); got != "abc" {
		t.Errorf("did %q, want abc", got)
	}
	if s := l.State(); s.Generation != 0 || s.Converged || s.Error != "" {
		t.Errorf("state without a spec: %v", s)
	}
	if err := l.Set(1, "spec"); err != nil {
		t.Fatal(err)
	}
	l.round(t.Context())
	if s := l.State(); s.Error != "planned with spec" {
		t.Errorf("state with a spec: %v", s)
	}
}

// Only the failure is reported, not the steps that it made impossible.
func TestSkipped(t *testing.T) {
	l := New(System[string, int, word]{
		Observe: func(context.Context) (int, error) { return 0, nil },
		Plan:    func(string, int) ([]word, error) { return []word{"format", "mount"}, nil },
		Apply: func(_ context.Context, w word) error {
			if w == "format" {
				return errors.New("broken")
			}
			return ErrSkipped
		},
	}, slog.New(slog.DiscardHandler), 0)
	if err := l.Set(1, ""); err != nil {
		t.Fatal(err)
	}
	l.round(t.Context())
	if s := l.State(); s.Error != "format: broken" || len(s.Pending) != 2 {
		t.Errorf("got %v", s)
	}
}
