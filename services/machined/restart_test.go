package machined

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
)

// TestRestartAsked: storaged's word restarts the machine once trustd's keys are where the disk has them, once, and the next boot knows why.
func TestRestartAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		asks := func(generation uint64) *controlv1.State {
			return &controlv1.State{Generation: generation, Converged: true, Restart: "the system was installed on /dev/vda"}
		}
		quiet := func(why string) {
			t.Helper()
			time.Sleep(time.Minute)
			if got := n.init.did(); len(got) > 0 {
				t.Fatalf("%s: %v", why, got)
			}
		}
		n.links["storaged"].state.Set(asks(0))
		quiet("there is no generation")
		if _, err := apply(d, ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		n.links["trustd"].state.Set(&controlv1.State{Generation: 1, Pending: []string{"move keys to STATE"}})
		synctest.Wait()
		n.links["storaged"].state.Set(asks(1))
		quiet("trustd's keys are not on the disk")
		n.links["trustd"].state.Set(&controlv1.State{Generation: 1, Converged: true})
		time.Sleep(restartPause + time.Second)
		if got := n.init.did(); !slices.Equal(got, []string{"reboot"}) {
			t.Errorf("got %v", got)
		}
		n.links["storaged"].state.Set(asks(1))
		time.Sleep(time.Minute)
		if got := n.init.did(); !slices.Equal(got, []string{"reboot"}) {
			t.Errorf("asked again: %v", got)
		}
		if all := strings.Join(eventTexts(t, d), "\n"); !strings.Contains(all, "restart: the system was installed on /dev/vda") {
			t.Errorf("no event says why:\n%s", all)
		}
	})
}
