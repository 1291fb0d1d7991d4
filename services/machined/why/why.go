// Package why finds what failed first.
//
// It gets what is known of the node at one moment: units, what each daemon says of itself, and what waits for what. Whatever is not well is a node of a
// graph, with an edge to all that it needs and that is not well either; where no edge leads on, something failed by itself. It is pure: no clock, no I/O. It
// must not know what a daemon does: what waits for what, the daemons say.
package why

import (
	"cmp"
	"slices"
	"time"
)

// Mark is since when something is as it is. The zero value: not known.
type Mark struct {
	At time.Time
	// OrEarlier: nobody looked before At.
	OrEarlier bool
}

// Snapshot is the node at one moment. Nothing in it is changed.
type Snapshot struct {
	Units   []Unit
	Daemons []Daemon
	// Ended are units that are well, and were not a short while ago: Trouble and Since say what was.
	Ended []Unit
	// What is wrong with the node as a whole; "" where nothing is. Unconfigured is for a node without a document, Init for a PID 1 that does not answer.
	Unconfigured, Clock, Security, Init string
}

// Unit is a unit as PID 1 has it.
type Unit struct {
	Name    string
	Trouble string // "" if it is well
	Since   Mark
	// Final says that PID 1 does not start it again by itself.
	Final bool
	// Words are the last that it wrote before it ended, oldest first.
	Words []string
	// Needs are references, as in Condition.
	Needs []string
}

// Daemon is what is known of a daemon besides its unit, which has the same name.
type Daemon struct {
	Name string
	// Area is what its checks are called in health; it may be its name.
	Area string
	// Silent is why it does not answer; "" if it does. What follows is its last word then, and not counted on.
	Silent  string
	Silence Mark

	// Behind is why it has not converged; "" if it has. Left is the same without what its conditions say better; it may be "".
	Behind, Left string
	Since        Mark
	// Refused says that it did not take the document.
	Refused    bool
	Conditions []Condition
}

// Condition is control.v1.Condition, with since when.
type Condition struct {
	Name, Trouble    string
	Needs            []string
	Help             string
	Explains, Remark bool
	Since            Mark
}

// Step is one thing that is not well, because of the step after it.
type Step struct {
	Subject string // the check's name in health, where there is one
	Since   Mark
	Text    string
	Command string // that helps
	Words   []string
}

// Cause is something that failed by itself: the last of its steps.
type Cause struct {
	Steps []Step
	Also  []string // other checks that fail because of it, sorted
}

// Answer is empty for a node that is well.
type Answer struct {
	Causes  []Cause // the one that explains most first
	Remarks []Step
}

// Explain finds the first causes of all that is not well, and the longest way to each. Equal snapshots give equal answers. Things that need each other are one
// cause together, named by one of them.
func Explain(s Snapshot) Answer {
	g := newGraph(s)
	var out Answer
	for _, id := range g.ids {
		if n := g.nodes[id]; n.remark {
			out.Remarks = append(out.Remarks, n.step())
		}
	}
	for _, u := range s.Ended {
		out.Remarks = append(out.Remarks, Step{Subject: u.Name + ".up", Since: u.Since, Text: u.Trouble, Command: "bhctl logs " + u.Name})
	}
	type found struct {
		Cause
		root  *node
		count int // of symptoms that it explains
	}
	var all []found
	for _, root := range g.roots() {
		length := g.lengths(root)
		f := found{root: g.nodes[root]}
		best := ""
		for _, id := range g.ids {
			if l, ok := length[id]; ok && g.nodes[id].check != "" {
				f.count++
				if best == "" || l > length[best] {
					best = id
				}
			}
		}
		if best == "" { // nothing that anybody would notice needs it
			continue
		}
		on := map[string]bool{}
		for _, id := range g.path(best, length) {
			f.Steps = append(f.Steps, g.nodes[id].step())
			on[id] = true
		}
		for id := range length {
			if c := g.nodes[id].check; c != "" && !on[id] {
				f.Also = append(f.Also, c)
			}
		}
		slices.Sort(f.Also)
		all = append(all, f)
	}
	slices.SortStableFunc(all, func(a, b found) int {
		return cmp.Or(cmp.Compare(b.count, a.count), a.root.since.At.Compare(b.root.since.At), cmp.Compare(a.root.id, b.root.id))
	})
	for _, f := range all {
		out.Causes = append(out.Causes, f.Cause)
	}
	return out
}
