package auditchain

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// A Fault is how a log differs from what was written.
type Fault string

// The faults.
const (
	Changed   Fault = "changed"   // a line is not what was written
	Removed   Fault = "removed"   // records are missing
	Inserted  Fault = "inserted"  // there are more records than were written
	Reordered Fault = "reordered" // a record stands elsewhere
	Cut       Fault = "cut"       // the end is missing: a later record was anchored
	Rewritten Fault = "rewritten" // the log is whole, but it is not the one that was anchored
)

// Problem is one place at which a log breaks.
type Problem struct {
	Line     int // from 1; 0: the end of the log
	Sequence uint64
	Fault    Fault
	Text     string // a sentence
}

func (p Problem) String() string {
	if p.Line == 0 {
		return fmt.Sprintf("at the end: %s: %s", p.Fault, p.Text)
	}
	return fmt.Sprintf("line %d: %s: %s", p.Line, p.Fault, p.Text)
}

// Anchor is a head that was kept elsewhere.
type Anchor struct {
	Head
	At time.Time // zero: not known
}

func (a Anchor) String() string {
	text := fmt.Sprintf("record %d", a.Sequence)
	if !a.At.IsZero() {
		text += ", kept at " + a.At.UTC().Format(time.RFC3339)
	}
	return text
}

// maxProblems bounds how many are told: after so many the log is no log.
const maxProblems = 100

// Verifier checks a log line by line. The zero value is ready for the first line. It is not safe for concurrent use.
type Verifier struct {
	// Anchors are heads that were kept elsewhere, in any order.
	Anchors []Anchor

	lines    int
	records  int
	first    uint64
	last     Head   // of the newest record that could be read; its Hash is "" behind a line that could not
	kept     uint64 // that older records were deleted says a record
	missing  map[uint64]int
	hashes   map[uint64]string // of every record of the last chain
	problems []Problem
}

// Add checks the next line, without its newline.
func (v *Verifier) Add(line []byte) {
	v.lines++
	r, err := Parse(line)
	if err != nil {
		v.damaged(line, err)
		return
	}
	v.records++
	if r.Kind == Rotated {
		v.kept = max(v.kept, r.First)
	}
	switch {
	case v.hashes == nil:
		v.begin(r)
	case r.Chain != v.last.Chain:
		v.say(r.Sequence, Inserted, "record %d is of another log, %s: this one is %s", r.Sequence, r.Chain, v.last.Chain)
		v.begin(r)
	case r.Sequence == v.last.Sequence+1:
		if v.last.Hash != "" && r.Prev != v.last.Hash {
			v.say(r.Sequence, Changed, "record %d does not follow record %d that stands before it: one of the two was replaced", r.Sequence, v.last.Sequence)
		}
		v.accept(r)
	case r.Sequence > v.last.Sequence:
		for n := v.last.Sequence + 1; n < r.Sequence && len(v.missing) < maxProblems; n++ {
			v.missing[n] = v.lines
		}
		v.say(r.Sequence, Removed, "%s missing before record %d", span(v.last.Sequence+1, r.Sequence-1), r.Sequence)
		v.accept(r)
	default:
		v.late(r)
	}
}

// Torn takes what stands behind the last newline of a log: a line of which the end is missing.
func (v *Verifier) Torn(part []byte) {
	v.lines++
	v.say(v.last.Sequence+1, Cut, "the line breaks off after %d bytes: the end of the log is missing", len(part))
}

func span(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("record %d is", from)
	}
	return fmt.Sprintf("records %d to %d are", from, to)
}

func (v *Verifier) begin(r *Record) {
	v.first, v.kept = r.Sequence, 0
	if r.Kind == Rotated {
		v.kept = r.First
	}
	if r.Sequence == 1 && r.Prev != "" {
		v.say(1, Changed, "record 1 names one before it")
	}
	v.missing, v.hashes = map[uint64]int{}, map[uint64]string{}
	v.accept(r)
}

func (v *Verifier) accept(r *Record) {
	v.last = r.Head()
	v.hashes[r.Sequence] = r.Hash
}

// late is for a record that has a smaller number than one before it.
func (v *Verifier) late(r *Record) {
	line, gone := v.missing[r.Sequence]
	switch {
	case gone:
		delete(v.missing, r.Sequence)
		v.hashes[r.Sequence] = r.Hash
		v.say(r.Sequence, Reordered, "record %d belongs before line %d", r.Sequence, line)
	case v.hashes[r.Sequence] == r.Hash:
		v.say(r.Sequence, Inserted, "record %d stands here a second time", r.Sequence)
	default:
		v.say(r.Sequence, Inserted, "another record %d", r.Sequence)
	}
}

// damaged takes a line that cannot be a record, in place of the one that belongs there.
func (v *Verifier) damaged(line []byte, err error) {
	next := v.last.Sequence + 1
	if v.hashes == nil { // the first line: what it says of itself is all that is known
		var said Record
		_ = json.Unmarshal(line, &said) // if it says nothing, it is taken for the first record
		next = max(said.Sequence, 1)
		v.first, v.missing, v.hashes = next, map[uint64]int{}, map[uint64]string{}
		v.last.Chain = said.Chain
	}
	v.say(next, Changed, "where record %d belongs: %s", next, err)
	v.last.Sequence, v.last.Hash = next, ""
}

func (v *Verifier) say(sequence uint64, f Fault, format string, args ...any) {
	if len(v.problems) < maxProblems {
		v.problems = append(v.problems, Problem{v.lines, sequence, f, fmt.Sprintf(format, args...)})
	}
}

// Report is what is known of a log when its last line was added.
type Report struct {
	Records     int
	First, Last uint64 // their numbers; 0: there is none
	Head        Head
	// Anchored is the newest anchor that the log agrees with; Sequence 0: none.
	Anchored Anchor
	// Kept is the record before which the log says that it was deleted; 0: it says nothing of that kind.
	Kept     uint64
	Problems []Problem // in the order of lines; nil: none
	// Earlier are the newest anchors of each other log that the node had, in the order of time: it began anew, as after a reset, or because somebody deleted it.
	Earlier []Anchor
}

// Report says what was found. whole says that the lines are all that a node has, so that missing older ones must have been deleted by the node itself: a part of
// a log, as one that was shipped, begins anywhere.
func (v *Verifier) Report(whole bool) Report {
	out := Report{Records: v.records, First: v.first, Last: v.last.Sequence, Head: v.last, Kept: v.kept, Problems: slices.Clone(v.problems)}
	if whole && v.first > max(v.kept, 1) {
		out.Problems = slices.Insert(out.Problems, 0, Problem{1, v.first, Removed, fmt.Sprintf("%s missing at the beginning, and no record says that the node deleted them", span(max(v.kept, 1), v.first-1))})
	}
	// A number that was found later is missing no more.
	out.Problems = slices.DeleteFunc(out.Problems, func(p Problem) bool { return p.Fault == Removed && p.Line > 1 && v.found(p) })
	anchors := slices.Clone(v.Anchors)
	slices.SortStableFunc(anchors, func(a, b Anchor) int { return a.At.Compare(b.At) })
	for _, a := range anchors {
		if a.Chain != v.last.Chain && a.Sequence > 0 {
			out.Earlier = append(slices.DeleteFunc(out.Earlier, func(b Anchor) bool { return b.Chain == a.Chain }), a)
		}
		if p, ok := v.judge(a, whole); !ok {
			out.Problems = append(out.Problems, p)
		} else if v.last.Chain == a.Chain && v.hashes[a.Sequence] == a.Hash && a.Sequence >= out.Anchored.Sequence {
			out.Anchored = a
		}
	}
	return out
}

// found reports whether all records that a problem calls missing stand elsewhere.
func (v *Verifier) found(p Problem) bool {
	for _, line := range v.missing {
		if line == p.Line {
			return false
		}
	}
	return true
}

// judge compares the log with one anchor. Older logs' anchors say nothing of this one: that there was an older log is a problem only if it is the newest
// anchor, for then the log began anew without the cluster hearing of it.
func (v *Verifier) judge(a Anchor, whole bool) (Problem, bool) {
	have, ok := v.hashes[a.Sequence]
	newest := !slices.ContainsFunc(v.Anchors, func(b Anchor) bool { return b.At.After(a.At) })
	switch {
	case a.Sequence == 0:
		return Problem{}, true
	case a.Chain != v.last.Chain && newest:
		return Problem{0, a.Sequence, Cut, fmt.Sprintf("the log is %q from its record %d on, and the anchor (%s) is of log %q: that one is missing", v.last.Chain, v.first, a, a.Chain)}, false
	case a.Chain != v.last.Chain || !ok && a.Sequence < v.first:
		return Problem{}, true
	case a.Sequence > v.last.Sequence && (whole || newest):
		return Problem{0, a.Sequence, Cut, fmt.Sprintf("the log ends with record %d, and the anchor is of %s", v.last.Sequence, a)}, false
	case ok && have != a.Hash:
		return Problem{0, a.Sequence, Rewritten, fmt.Sprintf("record %d is not the one that was anchored (%s)", a.Sequence, a)}, false
	}
	return Problem{}, true
}
