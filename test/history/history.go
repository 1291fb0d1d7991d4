// Package history records what clients did to a cluster while things went wrong, and judges whether it kept its word.
//
// The object is a set that only grows: clients add items, each once in the whole history, and list all items. What a client did not hear the end of may have been done or not.
// It knows nothing of how a cluster is asked, or of what goes wrong.
package history

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// Kind is what an operation does.
type Kind string

// The kinds of operations.
const (
	Add  Kind = "add"
	List Kind = "list"
)

// Op is one call of a client.
type Op struct {
	Client int    `json:"client"`
	Node   string `json:"node"` // that was asked
	Kind   Kind   `json:"kind"`
	Item   string `json:"item,omitempty"` // of Add
	// Items is the answer to List, in order.
	Items []string `json:"-"`
	// Call and Return are since the beginning of the history, by one clock.
	Call   time.Duration `json:"call_ns"`
	Return time.Duration `json:"return_ns"`
	// Error is "" if it was acknowledged. A List with an error says nothing; an Add with one may have been done, or may still be done later.
	Error string `json:"error,omitempty"`
	// Stale says that the answer denied what had been acknowledged before it was asked for.
	Stale bool `json:"stale,omitempty"`
}

// Record is a history in the making. It is safe for concurrent use; the zero value is none: see Begin.
type Record struct {
	start time.Time

	mu    sync.Mutex
	ops   []Op              // guarded by mu
	names map[string]string // guarded by mu; each item once, since every answer brings all of them
}

// Begin returns an empty history that begins now.
func Begin() *Record { return &Record{start: time.Now(), names: map[string]string{}} }

// Now is how old the history is.
func (r *Record) Now() time.Duration { return time.Since(r.start) }

// Put adds an operation that has ended. Its items are put in order.
func (r *Record) Put(op Op) {
	slices.Sort(op.Items)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, name := range op.Items {
		if _, ok := r.names[name]; !ok {
			r.names[name] = name
		}
		op.Items[i] = r.names[name]
	}
	r.ops = append(r.ops, op)
}

// Ops returns the operations that have ended, in the order of their ends.
func (r *Record) Ops() []Op {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.ops)
}

// Figures sum a history up.
type Figures struct {
	Added, Unknown   int // writes that were acknowledged, and those whose end nobody knows
	Listed, Unlisted int // reads that were answered, and those that were not
	// Gap is the longest time in which no write was acknowledged, and GapAt when it began.
	Gap, GapAt time.Duration
}

func (f Figures) String() string {
	return fmt.Sprintf("%d operations: %d writes acknowledged, %d of unknown end, %d reads answered, %d not; longest time without an acknowledged write %s (from %s on)",
		f.Added+f.Unknown+f.Listed+f.Unlisted, f.Added, f.Unknown, f.Listed, f.Unlisted, f.Gap.Round(100*time.Millisecond), f.GapAt.Round(time.Second))
}

// Sum returns the figures of a history that lasted until end.
func Sum(ops []Op, end time.Duration) Figures {
	var f Figures
	acknowledged := []time.Duration{0}
	for _, op := range ops {
		switch {
		case op.Kind == Add && op.Error == "":
			f.Added++
			acknowledged = append(acknowledged, op.Return)
		case op.Kind == Add:
			f.Unknown++
		case op.Error == "":
			f.Listed++
		default:
			f.Unlisted++
		}
	}
	slices.Sort(acknowledged)
	for i, at := range acknowledged {
		next := max(end, at)
		if i+1 < len(acknowledged) {
			next = acknowledged[i+1]
		}
		if gap := next - at; gap > f.Gap {
			f.Gap, f.GapAt = gap, at
		}
	}
	return f
}

// Save writes a history, one operation a line. Of what was listed a line says what came and went since the line of the list before.
func Save(w io.Writer, ops []Op) error {
	type line struct {
		Op
		Count int      `json:"count,omitempty"`
		Came  []string `json:"came,omitempty"`
		Went  []string `json:"went,omitempty"`
	}
	enc := json.NewEncoder(w)
	var before []string
	for _, op := range ops {
		l := line{Op: op}
		if op.Kind == List && op.Error == "" {
			l.Count, l.Came, l.Went = len(op.Items), without(op.Items, before), without(before, op.Items)
			before = op.Items
		}
		if err := enc.Encode(l); err != nil {
			return err
		}
	}
	return nil
}

// without returns what is in a and not in b; both are in order.
func without(a, b []string) []string {
	var out []string
	for _, x := range a {
		if _, there := slices.BinarySearch(b, x); !there {
			out = append(out, x)
		}
	}
	return out
}
