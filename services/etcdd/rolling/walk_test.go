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
	// Two die, one right after the other: one control plane is left, and carries out its own restart too.
	t.Run("two die", func(t *testing.T) {
		for k := 1; k <= total && !t.Failed(); k++ {
			run(t, func(n int) accident {
				switch n {
				case k:
					return diesAfter
				case k + 1:
					return diesBefore
				}
				return none
			})
		}
	})
	t.Logf("%d writes", total)
}

// TestCrash has a control plane restart by itself, at each second of the change at which no other node is away: no node is taken while it is, and all have their turn in the end.
func TestCrash(t *testing.T) {
	store := startEtcd(t)
	for second := 0; ; second++ {
		w := newWorld(t, store)
		w.order(&clusterv1.StartRequest{Kind: reboot})
		crashed := false
		for range 600 {
			r := w.record()
			if r.Phase == halted { // it restarted while it was drained: a person looks
				if _, err := w.server().Resume(t.Context(), nil); err != nil {
					t.Fatal(err)
				}
			}
			if r.Phase == done {
				break
			}
			if !crashed && int(w.now.Unix()-1e9) >= second && w.away() == 0 {
				m := w.node("n3")
				m.boot, m.away, m.coordinator, crashed = m.boot+1, 6, nil, true
			}
			w.round(nil)
		}
		if !crashed { // it was done before
			if second < 20 {
				t.Errorf("the change took %d s: there was no time for a crash", second)
			}
			return
		}
		if r := w.record(); r.Phase != done || w.reboots() != "n1:1 n2:1 n3:1 w1:1" || w.most != 1 || len(w.kube.cordoned) > 0 {
			t.Fatalf("crash after %d s: %s %s, restarts %s, %d down at once, cordoned %v", second, r.Phase, r.Why, w.reboots(), w.most, w.kube.cordoned)
		}
	}
}

// away is how many nodes are down.
func (w *world) away() int {
	n := 0
	for _, m := range w.nodes {
		if m.away > 0 {
			n++
		}
	}
	return n
}
