package supervise

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

var stateNames = []string{"Down", "Starting", "Up", "Stopping", "Cycling", "Waiting"}

// The whole table, written once more: every state with every event. A change of policy is made twice, on purpose. "-" is ignored.
const wantTable = `
          Start           Stop           Ready  Exit           Done           Timer
Down      Starting/spawn  -              -      -              -              -
Starting  -               Stopping/term  Up     Waiting/pause  Down           Starting/kill
Up        -               Stopping/term  -      Waiting/pause  Down           -
Stopping  Cycling         -              -      Down           Down           Stopping/kill
Cycling   -               Stopping       -      Waiting/pause  Waiting/pause  Cycling/kill
Waiting   -               Down           -      -              -              Starting/spawn
`

func TestWholeTable(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(wantTable), "\n")
	events, cells := strings.Fields(lines[0]), 0
	for state, line := range lines[1:] {
		f := strings.Fields(line)
		if f[0] != stateNames[state] || len(f) != len(events)+1 {
			t.Fatalf("line %d of the test: %q", state, line)
		}
		for e, want := range f[1:] {
			got := "-"
			if c, ok := table[State(state)][Event(e)]; ok {
				cells++
				got = stateNames[c.next] + [...]string{None: "", Spawn: "/spawn", Term: "/term", Kill: "/kill", Pause: "/pause"}[c.do]
			}
			if got != want {
				t.Errorf("%s at %s: %s, want %s", f[0], events[e], got, want)
			}
		}
	}
	all := 0
	for _, row := range table {
		all += len(row)
	}
	if all != cells || len(lines)-1 != len(stateNames) {
		t.Errorf("the table has %d cells, the test knows %d", all, cells)
	}
}

// A recorder is a kernel of one unit that writes down what it is told to do.
type recorder struct {
	t     *testing.T
	pid   int // of the process that runs; 0: none
	last  int
	fails bool // no process can be made
	ready int  // the process's end of the ready pipe, or -1
	sent  []unix.Signal
}

func (k *recorder) spawn(_ *service, ready int) (int, error) {
	if k.fails {
		return 0, unix.EAGAIN
	}
	if k.pid != 0 {
		k.t.Error("a second process")
	}
	k.last++
	k.pid = k.last
	k.ready, _ = unix.Dup(ready)
	return k.pid, nil
}

func (k *recorder) kill(v *service, s unix.Signal) {
	if v.pid != k.pid || k.pid == 0 {
		k.t.Errorf("signal %d to process %d, the unit's is %d", s, v.pid, k.pid)
	}
	k.sent = append(k.sent, s)
}
func (k *recorder) sweep(*service)               {}
func (k *recorder) wait() (int, unix.WaitStatus) { return 0, 0 }

// A walk is a supervisor of one unit, at the end of a history. Its steps are all that can happen to a unit.
type walk struct {
	*recorder
	s      *Supervisor
	v      *service
	wanted bool // the last order was to run, and it has not ended for good since
}

var steps = []string{"start", "stop", "ready", "mute", "crash", "leave", "timer", "broken", "halt"}

// do lets happen what is named, through the code that the loop calls, and returns false if it cannot happen now.
func (w *walk) do(step string) bool {
	switch step {
	case "start":
		w.s.happen(w.v, Start)
		w.wanted = w.wanted || !w.s.halting || w.v.state == Cycling
	case "stop":
		w.s.happen(w.v, Stop)
		w.wanted = false
	case "ready", "mute": // what the process does with its descriptor 3
		if w.pid == 0 || w.v.ready < 0 {
			return false
		}
		if step == "ready" {
			unix.Write(w.ready, []byte("\n"))
		}
		w.hangUp()
		w.s.hear(w.v)
	case "crash", "leave":
		if w.pid == 0 {
			return false
		}
		w.hangUp()
		w.pid = 0
		if step == "leave" {
			w.wanted = w.wanted && w.v.state == Cycling
			w.s.ended(w.v, initctl.Exited, unit.DoNotRestart)
		} else {
			w.s.ended(w.v, initctl.Killed, uint8(unix.SIGKILL))
		}
	case "timer":
		if w.v.timer.IsZero() {
			return false
		}
		w.v.timer = time.Now().Add(-time.Second)
		w.s.timers(time.Now())
	case "broken":
		w.fails = !w.fails
	case "halt":
		w.s.halting = true
	}
	return true
}

func (w *walk) hangUp() {
	if w.ready >= 0 {
		unix.Close(w.ready)
		w.ready = -1
	}
}

// place is all that the future depends on.
func (w *walk) place() string {
	v := w.v
	return fmt.Sprint(stateNames[v.state], " process=", w.pid != 0, " pipe=", v.ready >= 0, " timer=", !v.timer.IsZero(), " hangs=", v.hangs,
		" failures=", min(v.failures, 2), " wanted=", w.wanted, " broken=", w.fails, " halting=", w.s.halting)
}

// check is what holds at every place.
func (w *walk) check() (wrong []string) {
	v := w.v
	runs := slices.Contains([]State{Starting, Up, Stopping, Cycling}, v.state)
	if runs != (w.pid != 0) || v.pid != w.pid {
		wrong = append(wrong, "the state and the process do not agree")
	}
	ends := slices.Contains([]State{Starting, Stopping, Cycling}, v.state) || v.state == Waiting && !w.s.halting
	if timer := !v.timer.IsZero(); ends && !timer || timer && (v.state == Up || v.state == Down) {
		wrong = append(wrong, "a wait without an end, or a timer for nothing")
	}
	if watched := len(w.s.on) - 2; watched != 0 && v.ready < 0 || v.ready >= 0 && (watched != 1 || v.state == Up) {
		wrong = append(wrong, "a ready pipe is watched by nobody or is left over")
	}
	return wrong
}

// Everything that can happen to a unit, in every order, through the supervisor's own code: the walk goes to every place there is and
// takes every step from each. From everywhere, a unit that is wanted comes up, one that is not goes down, and while the machine
// goes down nothing is started.
func TestWalk(t *testing.T) {
	s, err := newSupervisor(nil, nil, filepath.Join(t.TempDir(), "init.sock"))
	if err != nil {
		t.Fatal(err)
	}
	at := func(history []string) *walk {
		k := &recorder{t: t, ready: -1}
		v := &service{Unit: &unit.Unit{Name: "walk", Restart: "always", NotifyReady: true, StartTimeout: time.Hour, StopTimeout: time.Hour}, ready: -1}
		s.kernel, s.units, s.halting = k, []*service{v}, false
		w := &walk{recorder: k, s: s, v: v}
		for _, h := range history {
			w.do(h)
		}
		return w
	}
	leave := func(w *walk) {
		if w.hangUp(); w.v.ready >= 0 {
			s.forget(w.v.ready)
		}
	}
	seen, states, edges := map[string]bool{}, map[State]bool{}, 0
	for queue := [][]string{nil}; len(queue) > 0; queue = queue[1:] {
		for _, step := range steps {
			history := append(slices.Clone(queue[0]), step)
			w := at(queue[0])
			before, halted := w.last, s.halting
			if w.do(step) {
				edges++
				if halted && w.last != before {
					t.Errorf("%v: started while the machine goes down", history)
				}
				for _, wrong := range w.check() {
					t.Errorf("%v: %s: %s", history, wrong, w.place())
				}
				states[w.v.state] = true
				if place := w.place(); !seen[place] {
					seen[place] = true
					queue = append(queue, history)
					w.home(history)
				}
			}
			leave(w)
			if t.Failed() {
				return
			}
		}
	}
	if len(states) != len(stateNames) || len(seen) < 50 {
		t.Errorf("the walk saw %d places and %d states only", len(seen), len(states))
	}
	t.Logf("%d places, %d steps", len(seen), edges)
}

// home lets the unit go where it wants to: a process that is told to end does, but only to SIGKILL, and one that starts becomes ready.
func (w *walk) home(history []string) {
	w.fails = false
	for range 10 {
		switch {
		case w.v.state == Stopping, w.v.state == Cycling:
			if w.do("timer"); len(w.sent) == 0 || w.sent[len(w.sent)-1] != unix.SIGKILL {
				w.t.Errorf("%v: it ignores SIGTERM and is not killed", history)
			}
			w.do("crash")
		case w.v.state == Starting && w.v.ready < 0: // it never will be
			w.do("timer")
			w.do("crash")
		case w.v.state == Starting:
			w.do("ready")
		case w.v.state == Waiting:
			w.do("timer")
		}
	}
	want := Down
	if w.wanted {
		want = Up
	}
	if halting := w.s.halting && (w.v.state == Waiting || w.v.state == Down); w.v.state != want && !halting {
		w.t.Errorf("%v: it ends %s, want %s", history, stateNames[w.v.state], stateNames[want])
	}
}
