package trustd

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/needs"
)

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	for _, c := range conditions(&keyring{node: &member{}}, nil, []string{"keys wait"}, "", true) {
		told[c.GetName()] = true
		for _, ref := range c.GetNeeds() {
			if !needs.Known(ref) {
				t.Errorf("%s needs %s, which nobody reports", c.GetName(), ref)
			}
		}
	}
	for _, name := range needs.Of("trustd") {
		if !told[name] {
			t.Errorf("others refer to %s, which is not reported", name)
		}
	}
}

// A control plane that has not heard of the cluster since its start is not well: it would say of a node that came meanwhile that there is none.
func TestNodesAreHeard(t *testing.T) {
	for _, c := range []struct {
		k       *keyring
		heard   bool
		trouble bool
	}{
		{&keyring{cluster: &cluster{}}, false, true},
		{&keyring{cluster: &cluster{}}, true, false},
		{&keyring{node: &member{}}, false, false}, // a worker asks a control plane
		{&keyring{}, false, false},
	} {
		told := false
		for _, cond := range conditions(c.k, nil, nil, "", c.heard) {
			if cond.GetName() != "nodes" {
				continue
			}
			told = true
			if (cond.GetTrouble() != "") != c.trouble {
				t.Errorf("%+v: %q", c, cond.GetTrouble())
			}
		}
		if !told {
			t.Errorf("%+v: nothing is said of the nodes", c)
		}
	}
}
