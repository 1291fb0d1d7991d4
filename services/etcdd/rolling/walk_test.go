package rolling

import (
	"testing"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

// TestWalk has the coordinator die before and after each of its writes, and freeze at each until others have done the work. Each node restarts exactly once all the same, never two
// at once, and no pod stays locked out.
func TestWalk(t *testing.T) {
	store := startEtcd(t)
	run := func(t *testing.T, at func(int) accident) int {
		t.Helper()
		w := newWorld(t, store)
		w.order(&clusterv1.StartRequest{Kind: reboot})
		w.commits, w.at = 0, at
		r := w.until(done, nil)
		if got := w.reboots(); got != "n1:1 n2:1 n3:1 w1:1" {
			t.Errorf("restarts: %s, want one of each", got)
		}
		if w.most != 1 || len(w.kube.cordoned) > 0 {
			t.Errorf("%d nodes down at once, cordoned at the end: %v", w.most, w.kube.cordoned)
		}
		for _, n := range r.Nodes {
			if n.Step != finished || n.Why != "" {
				t.Errorf("%+v, want done", n)
			}
		}
		return w.commits
	}
	total := run(t, func(int) accident { return none })
	if total < 4*4+1 {
		t.Errorf("%d writes: the walk is shorter than the change", total)
	}
	for name, what := range map[string]accident{"dies before": diesBefore, "dies after": diesAfter, "freezes": freezes} {
		t.Run(name, func(t *testing.T) {
			for k := 1; k <= total; k++ {
				run(t, func(n int) accident {
					if n == k {
						return what
					}
					return none
				})
				if t.Failed() {
					t.Fatalf("at write %d of %d", k, total)
				}
			}
		})
	}
	// Whoever carries it out dies each few writes, and comes back with its node's restart only: one control plane is left in the end.
	run(t, func(n int) accident {
		if n == 6 || n == 12 {
			return diesAfter
		}
		return none
	})
	t.Logf("%d writes", total)
}
