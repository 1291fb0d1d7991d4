package trustd

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/needs"
)

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	for _, c := range conditions(&keyring{node: &member{}}, nil, []string{"keys wait"}, "") {
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
