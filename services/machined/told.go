package machined

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
)

// Bounds of what one daemon tells. Strangers cause such events at any rate, and the last maxEvents events are all that is kept of all daemons.
const (
	toldAgain = time.Hour   // until what happens again is told again
	toldEvery = time.Minute // one event, and toldBurst at once
	toldBurst = 20
	toldMost  = 64 // different events that are remembered
)

// tellers are the daemons whose lines are events too; what pods and programs of others write is none.
var tellers = []string{"apid", "trustd", "etcdd"}

// A told is what one daemon has told lately. The zero value has told nothing. It is safe for concurrent use.
type told struct {
	mu   sync.Mutex
	by   map[string]*repeat // guarded by mu; by type and what it is about
	left float64            // guarded by mu; events that may be told at the time at
	at   time.Time          // guarded by mu
	lost int                // guarded by mu; that were more than may be
}

type repeat struct {
	first time.Time // when it was told
	more  int       // times that it came since
}

// take returns the text under which an event is kept; "" if it is one of too many, or a repeat.
func (t *told) take(at time.Time, e daemon.Told) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := e.Type + " " + e.About
	r := t.by[key]
	if r != nil && at.Sub(r.first).Abs() < toldAgain {
		r.more++
		return ""
	}
	if t.at.IsZero() {
		t.left = toldBurst
	}
	t.left = min(toldBurst, t.left+max(0, at.Sub(t.at).Minutes())*float64(time.Minute)/float64(toldEvery))
	t.at = at
	if t.left < 1 {
		t.lost++
		return ""
	}
	t.left--
	text := e.Text
	if r != nil && r.more > 0 {
		text += fmt.Sprintf(" (and %d times since %s)", r.more, r.first.UTC().Format(time.TimeOnly))
	}
	if t.lost > 0 {
		text += fmt.Sprintf(" (%d other events were too many to be kept; the log has them)", t.lost)
		t.lost = 0
	}
	if t.by == nil {
		t.by = map[string]*repeat{}
	}
	if len(t.by) >= toldMost && r == nil {
		delete(t.by, t.oldest())
	}
	t.by[key] = &repeat{first: at}
	return text
}

// oldest is the key of what was told longest ago. The caller holds mu.
func (t *told) oldest() (key string) {
	var first time.Time
	for k, r := range t.by {
		if key == "" || r.first.Before(first) {
			key, first = k, r.first
		}
	}
	return key
}

// teller returns what keeps the events among the lines of a unit's log; nil if the unit tells none.
func (d *Daemon) teller(unit string) func(time.Time, string) {
	if !slices.Contains(tellers, unit) {
		return nil
	}
	var t told
	return func(at time.Time, line string) {
		e, ok := daemon.ReadTold(line)
		if !ok {
			return
		}
		if text := t.take(at, e); text != "" {
			d.events.say(unit, e.Type, text)
		}
	}
}
