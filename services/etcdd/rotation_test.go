package etcdd

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// The record of a replacement of authorities on real etcd: every control plane goes on with it as soon as it may, and each stage is entered once, and by no one too early.
func TestRotationRecord(t *testing.T) {
	t.Parallel()
	n := newNode(t, testca.New(t), "n1", "127.0.0.1")
	n.volume(t)
	n.start(t)
	n.until(t, converged)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	r, now := roster.Roster{Store: n.store(t)}, time.Now()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	nodes := []roster.Node{{Name: "n1", Role: roster.ControlPlane, Key: "k1"}, {Name: "n2", Role: roster.ControlPlane, Key: "k2"}, {Name: "w1", Role: roster.Worker, Key: "k3"}}
	for _, n := range nodes {
		must(r.Keep(ctx, n, "run", nil))
	}
	must(r.Start(ctx, roster.Rotation{ID: "a", Which: []string{"os"}, Stage: roster.Prepare, Entered: now}))
	if err := r.Start(ctx, roster.Rotation{ID: "b"}); !errs.Is(err, errs.Exists) {
		t.Errorf("a second one at the same time: %v", err)
	}
	for _, stage := range []string{roster.Prepare, roster.Issue, roster.Finish, roster.Done} {
		s, err := r.Read(ctx)
		must(err)
		if s.Rotation.Stage != stage {
			t.Fatalf("stage %q, want %q", s.Rotation.Stage, stage)
		}
		var wait sync.WaitGroup
		for _, n := range nodes {
			wait.Go(func() { // each confirms, and each that sees that all have goes on
				if err := r.Confirm(ctx, n, "a", stage); err != nil && stage != roster.Done {
					t.Errorf("%s confirms %s: %v", n.Name, stage, err)
				}
				for range 3 {
					if err := r.Enter(ctx, now); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wait.Wait()
	}
	if err := r.Confirm(ctx, nodes[0], "a", roster.Issue); !errs.Is(err, errs.Precondition) {
		t.Errorf("confirmed late: %v", err)
	}
	if err := r.Confirm(ctx, roster.Node{Name: "n1", Key: "other"}, "a", roster.Done); !errs.Is(err, errs.Unauthenticated) {
		t.Errorf("confirmed by another: %v", err)
	}
}
