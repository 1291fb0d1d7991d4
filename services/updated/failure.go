package updated

import (
	"fmt"
	"slices"
	"strings"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
)

// left returns the slot whose version was tried and left, and is not explained yet; nil if there is none.
func left(s State, j journal) *slotv1.Slot {
	for _, v := range s.Slots.GetSlots() {
		explained := j.Failure != nil && j.Failure.Root == v.GetRootHash() && j.Failure.Sequence == v.GetSequence()
		if v.GetStatus() == "failed" && !v.GetRunning() && !explained {
			return v
		}
	}
	return nil
}

// An ending is what machined found out about the boot before the running one. The zero value is that nothing is known.
type ending struct {
	boot  *machinev1.Boot
	lines []string // of its panic, oldest first
}

// keeps is how PID 1 begins its last words if it leaves a version by itself.
const keeps = "PID 1 gave up: cannot keep this version: "

// explain says why a version was left, from all that it has left behind: its last entry in the journal, and how the boot before this one
// ended. It is pure; now is only noted, and compared with the version's own clock.
func explain(v *slotv1.Slot, j journal, e ending, now time.Time) failure {
	f := failure{Version: v.GetVersion(), Root: v.GetRootHash(), Sequence: v.GetSequence(), Tries: v.GetTriesDone(), Time: now}
	t := j.Trial
	if !t.of(v) {
		t = nil
	} else {
		f.Lines = t.Lines
	}
	end, detail := e.boot.GetEnd(), e.boot.GetDetail()
	switch {
	case t != nil && t.End != "" && t.Try == v.GetTriesDone(): // the last try's own word
		f.Reason = t.End
	case end == machinev1.Boot_PANIC:
		f.Lines = tail(e.lines)
		if why, ok := strings.CutPrefix(detail, keeps); ok {
			f.Reason = why
		} else if strings.HasPrefix(detail, "PID 1 ") {
			f.Reason = detail
		} else {
			f.Reason = "the kernel panicked: " + detail
		}
	case end == machinev1.Boot_RESET && t != nil:
		f.Reason = fmt.Sprintf("its last try hung, and the hardware watchdog reset the machine; its last sign of life was %s after its start", t.Uptime.Round(time.Second)) + stillMissing(t)
	case end == machinev1.Boot_RESET:
		f.Reason = "it hung before it could write to STATE, and the hardware watchdog reset the machine"
	case t != nil && t.End != "":
		f.Reason = t.End
	case t != nil:
		f.Reason = fmt.Sprintf("its last try stopped without a word %s after its start, by a hang or a reset", t.Uptime.Round(time.Second)) + stillMissing(t)
	default:
		f.Reason = "no try got as far as STATE: it was refused by the firmware, or hung or was reset before"
	}
	if t != nil {
		f.Reason += wrongClock(t, installed(j, v.GetVersion()), now)
	}
	f.Reason = cut(oneLine(f.Reason)) // checks may say several things, one a line
	return f
}

func stillMissing(t *trial) string {
	if t.Missing == "" {
		return ""
	}
	return "; missing then: " + t.Missing
}

// clockSlack is by how much two versions' clocks may differ that have no other fault.
const clockSlack = time.Hour

// wrongClock says so if a version on trial was before the moment when it was installed, or after the one at which it was left already: with such a clock,
// certificates seem not yet valid, or expired.
func wrongClock(t *trial, installed, now time.Time) string {
	if t.Time.After(now.Add(clockSlack)) || !installed.IsZero() && t.Time.Before(installed.Add(-clockSlack)) {
		return fmt.Sprintf("; its clock was wrong: it said %s", t.Time.UTC().Format(time.DateTime))
	}
	return ""
}

// installed is when a version was installed last, by the clock of the one that did it; zero if that is not known any more.
func installed(j journal, version string) time.Time {
	for _, e := range slices.Backward(j.History) {
		if e.What == "installed" && e.Version == version {
			return e.Time
		}
	}
	return time.Time{}
}
