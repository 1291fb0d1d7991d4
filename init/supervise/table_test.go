package supervise

import (
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Over every history of seven events: there is one process at most, the states with a process have one, and the last Start or
// Stop wins, except that a process that ends for good ends a wish for it.
func TestTable(t *testing.T) {
	const length = 7
	for n := range pow(6, length) {
		state, process, wanted := Down, false, false
		var history []Event
		apply := func(e Event) {
			if !process && (e == Exit || e == Done || e == Ready) {
				return // cannot happen
			}
			history = append(history, e)
			switch {
			case e == Start:
				wanted = true
			case e == Stop, e == Done && (state == Starting || state == Up):
				wanted = false
			}
			if e == Exit || e == Done {
				process = false
			}
			c, ok := table[state][e]
			if !ok {
				c = cell{next: state}
			}
			state = c.next
			if c.do == Spawn {
				if process {
					t.Fatalf("%v: a second process", history)
				}
				process = true
			}
			if has := state == Starting || state == Up || state == Stopping || state == Cycling; has != process {
				t.Fatalf("%v: state %d, process %v", history, state, process)
			}
		}
		for i, rest := 0, n; i < length; i, rest = i+1, rest/6 {
			apply(Event(rest % 6))
		}
		if state == Stopping || state == Cycling {
			apply(Exit)
		}
		if state == Waiting {
			apply(Timer)
		}
		if process != wanted {
			t.Fatalf("%v: ends in state %d with process %v, wanted %v", history, state, process, wanted)
		}
	}
}

func pow(base, n int) int {
	if n == 0 {
		return 1
	}
	return base * pow(base, n-1)
}

func TestPause(t *testing.T) {
	failures := 0
	var got []time.Duration
	for _, life := range []time.Duration{healthy, 0, 0, time.Second, 9 * time.Second, healthy, 0, time.Hour} {
		var p time.Duration
		p, failures = pause(life, failures)
		got = append(got, p)
	}
	const ms = time.Millisecond
	for i, want := range []time.Duration{0, 100 * ms, 200 * ms, 400 * ms, 800 * ms, 0, 100 * ms, 0} {
		if got[i] != want {
			t.Errorf("pause %d is %v, want %v", i, got[i], want)
		}
	}
	for failures := range 1000 {
		if p, _ := pause(0, failures); p < firstPause || p > lastPause {
			t.Errorf("after %d failures: %v", failures, p)
		}
	}
}

func TestEnded(t *testing.T) {
	for _, c := range []struct {
		policy     string
		how, value uint8
		want       Event
	}{
		{"always", initctl.Exited, 0, Exit}, {"always", initctl.Exited, 125, Done}, {"always", initctl.Killed, 125, Exit},
		{"on-failure", initctl.Exited, 0, Done}, {"on-failure", initctl.Exited, 1, Exit}, {"on-failure", initctl.Killed, 9, Exit},
		{"on-failure", initctl.NotStarted, 0, Exit}, {"never", initctl.Killed, 9, Done}, {"never", initctl.NotStarted, 2, Done},
	} {
		if got := ended(c.policy, c.how, c.value); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}

func TestAllowed(t *testing.T) {
	u := &unit.Unit{Owners: []uint32{110}}
	const root, machined, kubeletd, updated, other = 0, 101, 110, 108, 107
	for _, c := range []struct {
		user uint32
		verb initctl.Verb
		u    *unit.Unit
		want initctl.Code
	}{
		{other, initctl.List, nil, initctl.OK}, {other, initctl.Follow, nil, initctl.OK},
		{other, initctl.Start, u, initctl.Denied}, {kubeletd, initctl.Start, u, initctl.OK}, {root, initctl.Stop, u, initctl.Denied}, // root is the workload side
		{machined, initctl.Restart, u, initctl.OK}, {machined, initctl.Start, nil, initctl.NotFound},
		{kubeletd, initctl.Logs, u, initctl.Denied}, {root, initctl.Logs, u, initctl.Denied}, {machined, initctl.Logs, u, initctl.OK},
		{root, initctl.Reboot, nil, initctl.Denied}, {machined, initctl.Reboot, nil, initctl.OK}, {kubeletd, initctl.PowerOff, nil, initctl.Denied},
		{updated, initctl.Reboot, nil, initctl.OK}, {updated, initctl.PowerOff, nil, initctl.Denied}, {kubeletd, initctl.Reboot, nil, initctl.Denied},
		{machined, initctl.PowerOff, nil, initctl.OK}, {machined, initctl.Logs, nil, initctl.NotFound}, {other, 99, nil, initctl.Denied},
	} {
		if got := allowed(c.user, c.verb, c.u); got != c.want {
			t.Errorf("user %d, verb %d: got %v, want %v", c.user, c.verb, got, c.want)
		}
	}
}
