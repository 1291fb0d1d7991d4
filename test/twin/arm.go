//go:build twin

package twin

import (
	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Arm makes this process the evil twin of a daemon. Nothing is served yet.
func Arm(name string) {
	t := New(name)
	peer.Heard = func(_ string, request, response any) {
		switch r := request.(type) {
		case *controlv1.SetSpecRequest:
			t.Generation(r.GetSpec().GetGeneration())
		case *configv1.ApplyRequest: // machined itself gets it from no one
			if a, ok := response.(*configv1.ApplyResponse); ok && !r.GetDryRun() {
				t.Order(a.GetGeneration())
			}
		}
	}
}
