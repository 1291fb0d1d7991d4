package etcdd

import (
	"testing"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/needs"
)

func TestConditions(t *testing.T) {
	want := spec{Name: "n1", Role: config.ControlPlane}
	for _, c := range []struct {
		name, condition, trouble string
		have                     State
	}{
		{"well", "member", "", State{Running: true, Ready: true}},
		{"not there", "member", "the etcd member does not run", State{}},
		{"without a leader", "member", "the etcd member runs, but has no leader that answers", State{Running: true}},
		{"no quorum", "quorum", "etcd has no quorum: of 3 voters 2 must answer, and 1 do; silent: n2, n3", State{Running: true, Voters: 3, Silent: []string{"n2", "n3"}}},
		{"one away", "quorum", "", State{Running: true, Voters: 3, Silent: []string{"n2"}}},
		{"alone", "quorum", "", State{Running: true, Voters: 1}},
		{"unsigned", "certificates", "trustd has not signed these certificates: etcd-client-bulkhead, etcd-peer, etcd-root, etcd-server", State{Bootstrapped: true}},
		{"nobody could sign", "certificates", "", State{}},
	} {
		found := false
		for _, x := range conditions(want, c.have) {
			if x.GetName() == c.condition {
				if found = true; x.GetTrouble() != c.trouble || !x.GetExplains() {
					t.Errorf("%s: got %v, want %q", c.name, x, c.trouble)
				}
			}
		}
		if !found {
			t.Errorf("%s: no condition %s", c.name, c.condition)
		}
	}
	if got := conditions(spec{Role: config.Worker}, State{}); len(got) != 1 {
		t.Errorf("a worker, which has no member, says %v", got)
	}
}

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	for _, c := range conditions(spec{Role: config.ControlPlane}, State{}) {
		told[c.GetName()] = true
		for _, ref := range c.GetNeeds() {
			if !needs.Known(ref) {
				t.Errorf("%s needs %s, which nobody reports", c.GetName(), ref)
			}
		}
	}
	for _, name := range needs.Of("etcdd") {
		if !told[name] {
			t.Errorf("others refer to %s, which is not reported", name)
		}
	}
}

// TestQuorumGone: a member whose only peer is away says so by name, though the cluster cannot be asked any more.
func TestQuorumGone(t *testing.T) {
	t.Parallel()
	nodes := trio(t)
	n1, n2 := nodes[0], nodes[1]
	n2.start(t)
	n2.until(t, converged)
	n2.stop(t)
	n1.generation++ // the loop looks at once
	if _, err := n1.control.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: n1.generation, Documents: []byte(n1.document())}}); err != nil {
		t.Fatal(err)
	}
	n1.until(t, func(s *controlv1.State) bool {
		for _, c := range s.GetConditions() {
			if c.GetName() == "quorum" && c.GetTrouble() == "etcd has no quorum: of 2 voters 2 must answer, and 1 do; silent: n2" {
				return true
			}
		}
		return false
	})
}
