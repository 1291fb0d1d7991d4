package why

import (
	"maps"
	"slices"
	"strings"
)

// What a reference can name besides conditions.
const (
	answers   = "/answers"
	converged = "/converged"
	unitOf    = "unit/"

	configID = "machined/config"
	clockID  = "machined/clock"
)

// node is one thing that is not well.
type node struct {
	id, subject string
	check       string // what health calls it; "" if health does not count it
	text        string
	since       Mark
	command     string
	words       []string
	needs       []string // references; after link, ids of nodes
	remark      bool
}

func (n *node) step() Step {
	return Step{Subject: n.subject, Since: n.since, Text: n.text, Command: n.command, Words: n.words}
}

type graph struct {
	nodes  map[string]*node
	ids    []string            // sorted
	silent map[string]bool     // daemons that do not answer
	all    map[string][]string // edges before cycles were opened
}

func newGraph(s Snapshot) *graph {
	g := &graph{nodes: map[string]*node{}, silent: map[string]bool{}}
	g.addNode(s)
	for _, u := range s.Units {
		g.addUnit(u)
	}
	for _, d := range s.Daemons {
		g.silent[d.Name] = d.Silent != ""
		g.addDaemon(d)
	}
	g.ids = slices.Sorted(maps.Keys(g.nodes))
	g.link(s.Daemons)
	g.open()
	g.shorten(s.Daemons)
	return g
}

func (g *graph) add(n *node) { g.nodes[n.id] = n }

// addNode is for what concerns the node as a whole.
func (g *graph) addNode(s Snapshot) {
	if s.Init != "" {
		g.add(&node{id: "init/answers", subject: "init.answers", check: "init.answers", text: "PID 1 does not answer: " + s.Init, command: "bhctl reboot"})
	}
	if s.Clock != "" {
		g.add(&node{id: clockID, subject: "clock", check: "clock", text: s.Clock, command: "bhctl reboot"})
	}
	if s.Security != "" {
		g.add(&node{id: "machined/security", subject: "security", check: "security", text: s.Security, command: "bhctl get security"})
	}
	if s.Unconfigured != "" {
		// A node that has one reads it from STATE.
		g.add(&node{id: configID, subject: "config.applied", check: "config.applied", text: s.Unconfigured, command: "bhctl apply -f FILE",
			needs: []string{"storaged/STATE.unlocks", "storaged/STATE.unlocked", "storaged/STATE.mounted", "storaged/answers"}})
	}
}

func (g *graph) addUnit(u Unit) {
	if u.Trouble == "" {
		return
	}
	n := &node{id: unitOf + u.Name, subject: u.Name + ".up", check: u.Name + ".up", text: u.Trouble, since: u.Since, command: "bhctl logs " + u.Name, words: u.Words, needs: u.Needs}
	if u.Final {
		n.text += "; it will not be started again by itself"
		n.command = "bhctl service restart " + u.Name
	}
	g.add(n)
}

func (g *graph) addDaemon(d Daemon) {
	if d.Silent != "" {
		if g.nodes[unitOf+d.Name] == nil { // else that says why
			g.add(&node{id: d.Name + answers, subject: d.Name + ".answers", check: d.Name + ".answers", text: d.Silent, since: d.Silence, command: "bhctl service restart " + d.Name})
		}
		if d.Behind != "" {
			g.add(&node{id: d.Name + converged, subject: d.Area + ".converged", check: d.Area + ".converged", text: d.Behind, since: d.Since,
				command: "bhctl service restart " + d.Name, needs: []string{d.Name + answers}})
		}
		return
	}
	for _, c := range d.Conditions {
		if c.Trouble != "" {
			g.addCondition(d, c)
		}
	}
	if d.Behind == "" {
		return
	}
	n := &node{id: d.Name + converged, subject: d.Area + ".converged", check: d.Area + ".converged", text: d.Behind, since: d.Since, command: "bhctl logs " + d.Name, needs: []string{configID}}
	if d.Refused {
		n.command = "bhctl apply -f FILE"
	}
	g.add(n)
}

func (g *graph) addCondition(d Daemon, c Condition) {
	if u := g.nodes[unitOf+c.Name]; u != nil { // one thing, of which PID 1 knows more
		u.needs = append(slices.Clone(u.needs), c.Needs...)
		return
	}
	n := &node{id: d.Name + "/" + c.Name, subject: d.Area + "." + c.Name, text: c.Trouble, since: c.Since, command: c.Help, needs: c.Needs, remark: c.Remark}
	if !c.Explains && !c.Remark {
		n.check = n.subject
	}
	if n.command == "" {
		n.command = "bhctl logs " + d.Name
	}
	g.add(n)
}

// resolve returns the node that a reference means; "" if that is well. What a daemon that does not answer says is not known: then that it does not is the cause.
func (g *graph) resolve(ref string) string {
	who, what, _ := strings.Cut(ref, "/")
	switch {
	case g.nodes[ref] != nil:
		return ref
	case g.silent[who] && g.nodes[who+answers] != nil:
		return who + answers
	case g.silent[who]:
		ref = unitOf + who
	case what != "":
		ref = unitOf + what // a condition that is about a unit
	}
	if g.nodes[ref] != nil {
		return ref
	}
	return ""
}

// link replaces references by nodes.
func (g *graph) link(daemons []Daemon) {
	for _, id := range g.ids {
		n := g.nodes[id]
		if skewed(n.text) {
			n.needs = append(slices.Clone(n.needs), clockID)
		}
		n.needs = g.resolveAll(n, n.needs)
	}
	for _, d := range daemons {
		n := g.nodes[d.Name+converged]
		if n == nil || d.Silent != "" {
			continue
		}
		n.needs = g.resolveAll(n, append(slices.Clone(n.needs), g.tops(d)...))
	}
}

// shorten leaves out what the next step says better.
func (g *graph) shorten(daemons []Daemon) {
	for _, d := range daemons {
		if n := g.nodes[d.Name+converged]; n != nil && len(n.needs) > 0 && d.Left != "" && d.Silent == "" {
			n.text = d.Left
		}
	}
}

// skewed recognizes what a wrong clock does to certificates.
func skewed(text string) bool {
	return strings.Contains(text, "not yet valid") || strings.Contains(text, "has expired") || strings.Contains(text, "clock")
}

func (g *graph) resolveAll(n *node, refs []string) []string {
	var out []string
	for _, ref := range refs {
		if id := g.resolve(ref); id != "" && id != n.id && !g.nodes[id].remark {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// tops are those of a daemon's conditions that explain why it has not converged, without those that only explain others of them.
func (g *graph) tops(d Daemon) []string {
	own := map[string]bool{}
	for _, c := range d.Conditions {
		if id := g.resolve(d.Name + "/" + c.Name); c.Trouble != "" && c.Explains && id != "" {
			own[id] = true
		}
	}
	below := map[string]bool{}
	for id := range own {
		for _, n := range g.nodes[id].needs {
			below[n] = true
		}
	}
	var out []string
	for id := range own {
		if !below[id] {
			out = append(out, id)
		}
	}
	if len(out) == 0 { // they need each other
		out = slices.Collect(maps.Keys(own))
	}
	slices.Sort(out)
	return out
}

// open takes edges away until no way leads back to where it came from.
func (g *graph) open() {
	g.all = map[string][]string{}
	for _, id := range g.ids {
		g.all[id] = slices.Clone(g.nodes[id].needs)
	}
	const on, done = 1, 2
	color := map[string]int{}
	var walk func(string)
	walk = func(id string) {
		color[id] = on
		n := g.nodes[id]
		n.needs = slices.DeleteFunc(n.needs, func(next string) bool {
			if color[next] == 0 {
				walk(next)
			}
			return color[next] == on
		})
		color[id] = done
	}
	for _, id := range g.ids {
		if color[id] == 0 {
			walk(id)
		}
	}
	// In a circle one has lost its way out. What lies outside does not lead back, so these edges make no new circle.
	for _, id := range g.ids {
		n := g.nodes[id]
		if len(n.needs) > 0 {
			continue
		}
		for other := range g.reach(id) {
			if !g.reach(other)[id] {
				n.needs = append(n.needs, other)
			}
		}
		slices.Sort(n.needs)
	}
}

// roots are what failed by itself, sorted.
func (g *graph) roots() []string {
	var out []string
	for _, id := range g.ids {
		if n := g.nodes[id]; len(n.needs) == 0 && !n.remark {
			out = append(out, id)
		}
	}
	return out
}

// reach is all that a node needs, directly or not.
func (g *graph) reach(id string) map[string]bool {
	out := map[string]bool{}
	var walk func(string)
	walk = func(id string) {
		for _, next := range g.all[id] {
			if !out[next] {
				out[next] = true
				walk(next)
			}
		}
	}
	walk(id)
	return out
}

// lengths returns, for each node that leads to root, the length of the longest way.
func (g *graph) lengths(root string) map[string]int {
	out := map[string]int{root: 0}
	seen := map[string]bool{root: true}
	var walk func(string)
	walk = func(id string) {
		if seen[id] {
			return
		}
		seen[id] = true
		for _, next := range g.nodes[id].needs {
			walk(next)
			if l, ok := out[next]; ok && out[id] < l+1 {
				out[id] = l + 1
			}
		}
	}
	for _, id := range g.ids {
		walk(id)
	}
	return out
}

// path is the longest way; of two that are equally long, the one that began earlier.
func (g *graph) path(id string, length map[string]int) []string {
	out := []string{id}
	for length[id] > 0 {
		best := ""
		for _, next := range g.nodes[id].needs {
			if l, ok := length[next]; ok && l == length[id]-1 && (best == "" || g.nodes[next].since.At.Before(g.nodes[best].since.At)) {
				best = next
			}
		}
		id = best
		out = append(out, id)
	}
	return out
}
