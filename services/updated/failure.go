package updated

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

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

// explain says why a version was left, from all that it has left behind: the kernel's last words in the firmware's memory, and its last
// entry in the journal. It is pure; now is only noted.
func explain(v *slotv1.Slot, t *trial, crashes []*slotv1.Crash, now time.Time) failure {
	f := failure{Version: v.GetVersion(), Root: v.GetRootHash(), Sequence: v.GetSequence(), Tries: v.GetTriesDone(), Time: now}
	if t != nil && (t.Root != f.Root || t.Sequence != f.Sequence) {
		t = nil
	}
	lines := crashLines(crashes)
	words := panicWords(lines)
	switch {
	case words != "":
		f.Reason, f.Lines = "the kernel panicked: "+words, tail(lines)
	case t == nil && len(lines) > 0:
		f.Reason, f.Lines = "it crashed before it could write to STATE", tail(lines)
	case t == nil:
		f.Reason = "no try got as far as STATE: it was refused by the firmware, hung or was reset before, or its disk did not open"
	case t.End != "":
		f.Reason, f.Lines = t.End, t.Lines
	default:
		f.Reason, f.Lines = fmt.Sprintf("its last try stopped without a word %s after its start, by a hang or a reset", t.Uptime.Round(time.Second)), t.Lines
		if t.Missing != "" {
			f.Reason += "; missing then: " + t.Missing
		}
	}
	f.Reason = cut(f.Reason)
	return f
}

// A record of pstore starts with a line like "Panic#1 Part3"; part 1 is the end of the log.
var partLine = regexp.MustCompile(`^[A-Za-z]+#\d+ Part(\d+)$`)

// crashLines joins the parts of the kernel's last words, oldest line first.
func crashLines(crashes []*slotv1.Crash) (out []string) {
	type part struct {
		time   time.Time
		number int
		lines  []string
	}
	var parts []part
	for _, c := range crashes {
		lines := strings.Split(strings.TrimRight(c.GetText(), "\n"), "\n")
		p := part{time: c.GetTime().AsTime(), lines: lines}
		if m := partLine.FindStringSubmatch(lines[0]); m != nil {
			p.number, _ = strconv.Atoi(m[1]) // digits
			p.lines = lines[1:]
		}
		parts = append(parts, p)
	}
	slices.SortStableFunc(parts, func(a, b part) int { return cmp.Compare(b.number, a.number) })
	for _, p := range parts {
		for _, l := range p.lines {
			out = append(out, level.ReplaceAllString(l, ""))
		}
	}
	return out
}

// level is how the kernel marks a line's importance in pstore: "<0>".
var level = regexp.MustCompile(`^<\d+>`)

// stamp is a line's time in the kernel's log.
var stamp = regexp.MustCompile(`^\[ *\d+\.\d+\] `)

// panicWords returns what the kernel said when it panicked, without its time; "" if it did not.
func panicWords(lines []string) string {
	for _, l := range lines {
		if _, words, ok := strings.Cut(l, "Kernel panic - not syncing: "); ok {
			return words
		}
	}
	for _, l := range lines {
		for _, mark := range []string{"BUG: ", "Oops: ", "general protection fault"} {
			if strings.Contains(l, mark) {
				return stamp.ReplaceAllString(l, "")
			}
		}
	}
	return ""
}
