// Package boots remembers the node's boots: how each ended, and its last lines.
//
// A History lives on STATE, so that it is there after a fallback to another slot. A boot that ends before STATE is open leaves nothing
// there; only what the firmware kept of a kernel panic, or the hardware watchdog's word, tells of it to the next boot. Judging is pure;
// nothing here knows what the lines mean.
package boots

import (
	"strings"
	"time"
)

// An End is how a boot ended.
type End string

// The ends of a boot.
const (
	Running End = ""        // it has not
	Clean   End = "clean"   // somebody ordered it
	Panic   End = "panic"   // the kernel panicked and left a record
	Reset   End = "reset"   // the hardware watchdog did it
	Unknown End = "unknown" // without a trace
)

// A Boot is what is stored of one.
type Boot struct {
	Number  uint64    `json:"number"`            // from 1
	ID      string    `json:"id,omitempty"`      // the kernel's; "" if it never opened STATE
	Version string    `json:"version,omitempty"` // of Bulkhead; the same
	Started time.Time `json:"started,omitzero"`  // the same
	Order   string    `json:"order,omitempty"`   // who ordered its end, and what: "reboot ordered by alice"
	End     End       `json:"end,omitempty"`
	Detail  string    `json:"detail,omitempty"`   // of the end, for a person
	Seen    time.Time `json:"last_seen,omitzero"` // newest line that was stored; set when its end is known
}

// Evidence is what a boot finds of the one before it.
type Evidence struct {
	Panic    string // the kernel's last lines, oldest first; "" if it left none
	Watchdog bool   // the hardware watchdog reset the machine
}

// settle says how the newest boot that is stored ended, and, if the evidence must be of a later one, what to store of that one: it did not get
// as far as STATE, or it is the stored one on its way down.
func settle(b Boot, e Evidence) (ended Boot, later *Boot) {
	end, detail := e.judge()
	if b.End == Running && b.Order == "" {
		b.End, b.Detail = end, detail
		return b, nil
	}
	if b.End == Running { // else the power was cut while the next boot stored what it knew
		b.End, b.Detail = Clean, b.Order
	}
	if end != Unknown {
		later = &Boot{Number: b.Number + 1, End: end, Detail: detail}
	}
	return b, later
}

// judge is how a boot ended that nobody ordered to.
func (e Evidence) judge() (End, string) {
	switch {
	case e.Panic != "":
		return Panic, reason(e.Panic)
	case e.Watchdog:
		return Reset, "the hardware watchdog reset the machine: the kernel or PID 1 hung"
	}
	return Unknown, "no trace: the power or a reset button, or a hang where there is no watchdog"
}

// reason is the line of a kernel's last ones that says most. PID 1 panics on purpose when it gives up, and says why before.
func reason(text string) string {
	var fault, panicked, gaveUp string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if _, said, ok := strings.Cut(line, "init: bulkhead: "); ok {
			if strings.HasPrefix(said, "cannot ") || strings.HasPrefix(said, "PID 1 is broken") {
				gaveUp = said
			}
			continue
		}
		if _, after, ok := strings.Cut(line, "Kernel panic - not syncing: "); ok && panicked == "" {
			panicked = after
		}
		for _, mark := range []string{"BUG: ", "Oops: ", "kernel BUG at "} {
			if i := strings.Index(line, mark); i >= 0 && fault == "" {
				fault = line[i:]
			}
		}
	}
	switch {
	case gaveUp != "" && strings.Contains(panicked, "Attempted to kill init"):
		return "PID 1 gave up: " + gaveUp
	case fault != "" && panicked != "":
		return fault + "; " + panicked
	case panicked != "":
		return panicked
	case fault != "":
		return fault
	}
	return "the kernel left lines that do not say why"
}
