package machined

import (
	"cmp"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/clock"
	"github.com/bulkhead-os/bulkhead/internal/version"
)

// heardClock notes how far the clock of a control plane is from this node's. The report took from before until now: what lies in
// between is no difference.
func (d *Daemon) heardClock(at, before time.Time) {
	now := time.Now()
	var off time.Duration
	switch {
	case at.Before(before):
		off = at.Sub(before)
	case at.After(now):
		off = at.Sub(now)
	}
	d.skew.Store(int64(off))
}

// tellClock makes an event when something is found wrong with the clock, and when it is right again. It returns what is wrong now; was is what was.
func (d *Daemon) tellClock(was string) string {
	is := cmp.Or(d.clockTrouble(), d.clockToldOf())
	switch {
	case is != "" && was == "": // its text has the time, which changes
		d.events.say("machined", typeClock, is)
	case is == "" && was != "":
		d.events.say("machined", typeClock, "the clock is right again, as far as this node can know")
	}
	return is
}

// clockToldOf is what a daemon finds wrong with the clock: trustd knows since when there is an authority.
func (d *Daemon) clockToldOf() string {
	now, _ := d.running.Get()
	for _, h := range d.hands {
		_, st := h.report(now.Number)
		for _, c := range st.GetConditions() {
			if c.GetName() == clockCheck && c.GetTrouble() != "" {
				return c.GetTrouble()
			}
		}
	}
	return ""
}

// clockTrouble is what is wrong with the node's clock; "" if nothing is known to be.
func (d *Daemon) clockTrouble() string {
	now := time.Now()
	if t := clock.Built(now, version.BuildTime()); t != "" {
		return t
	}
	return clock.Cluster(now, time.Duration(d.skew.Load()))
}
