package slots

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

// A world is a machine with a disk, as far as slots go. Everything in it but running and plan survives a power cut.
type world struct {
	entries []Entry
	temp    string    // version of the kernel under its other name, "" for none, "?" for a part of one
	content [2]string // version of what is in the slots; "?" for a part of something
	labels  [2]string // version that the GUIDs name
	running string    // version; "" while the machine is off
	plan    []Step    // what storaged is about to do
	writing string    // the version that it installs
}

// What images there are: what becomes of a boot, and whether health can be proved.
var images = map[string]struct{ boots, healthy bool }{
	"0.1.0": {true, true}, "0.2.0": {true, true}, "0.3.0": {false, false}, "0.4.0": {true, false},
}

func (w world) state() State {
	s := State{Entries: w.entries}
	if w.running != "" {
		s.Running = rootOf(w.running)
	}
	for i, l := range w.labels {
		if l != "" {
			s.Slots[i] = rootOf(l)
		}
	}
	return s
}

func (w world) clone() world {
	w.entries, w.plan = slices.Clone(w.entries), slices.Clone(w.plan)
	return w
}

// key is equal for worlds in which the same can happen: only the order of the sequences counts.
func (w world) key() string {
	var b strings.Builder
	all := slices.Clone(w.entries)
	slices.SortFunc(all, func(a, b Entry) int { return a.Name.Sequence - b.Name.Sequence })
	for _, e := range all {
		n := e.Name
		n.Sequence = 1
		fmt.Fprint(&b, n, " ")
	}
	base := 0
	if len(all) > 0 {
		base = all[0].Name.Sequence
	}
	fmt.Fprint(&b, w.temp, w.content, w.labels, w.running, w.writing)
	for _, s := range w.plan {
		from, _ := ParseName(s.File)
		to, _ := ParseName(s.To)
		from.Sequence, to.Sequence = from.Sequence-base, to.Sequence-base
		fmt.Fprint(&b, s.Op, s.Slot, from, to)
	}
	return b.String()
}

// boot is one power-on: systemd-boot counts and starts the first entry.
func (w world) boot() world {
	w = w.clone()
	w.running, w.plan, w.writing = "", nil, ""
	if len(w.entries) == 0 {
		return w
	}
	slices.SortFunc(w.entries, before)
	e := &w.entries[0]
	if e.Name.Counted {
		e.Name.Left, e.Name.Done = max(0, e.Name.Left-1), e.Name.Done+1
		e.File = e.Name.String()
	}
	for i, l := range w.labels {
		if v := e.Name.Version; l == v && w.content[i] == v && images[v].boots {
			w.running = v
		}
	}
	return w
}

// lands says where the machine ends up if nobody does anything any more: it is started until it runs a version that proves its health.
func (w world) lands() string {
	for range 2*firstTries + 2 {
		if w = w.boot(); images[w.running].healthy {
			return w.running
		}
	}
	return ""
}

// do carries out one step.
func (w world) do(s Step) world {
	w = w.clone()
	w.plan = w.plan[1:]
	switch s.Op {
	case opRemove:
		w.entries = slices.DeleteFunc(w.entries, func(e Entry) bool { return e.File == s.File })
	case opWrite:
		w.temp, w.content[s.Slot] = w.writing, w.writing
	case opLabel:
		w.labels[s.Slot] = w.writing
	case opRename:
		to, ok := ParseName(s.To)
		if !ok {
			panic(s.To)
		}
		if s.File == tempName {
			w.entries = append(w.entries, Entry{File: s.To, Name: to, Root: rootOf(w.temp), Epoch: 1})
			w.temp = ""
			break
		}
		for i, e := range w.entries {
			if e.File == s.File {
				w.entries[i].File, w.entries[i].Name = s.To, to
			}
		}
	}
	if len(w.plan) == 0 && w.writing != "" {
		w = w.goOn()
	}
	return w
}

// goOn is what storaged does when the steps of planBegin, or the writing, are done.
func (w world) goOn() world {
	slot := 1 - slices.Index(w.labels[:], w.running)
	if w.content[slot] != w.writing || w.temp != w.writing {
		w.plan = []Step{{Op: opWrite, Slot: slot}}
	} else if w.labels[slot] != w.writing || !slices.ContainsFunc(w.entries, func(e Entry) bool { return e.Name.Version == w.writing }) {
		w.plan, _ = planCommit(w.state(), slot, bundle.Manifest{Version: w.writing, RootHash: rootOf(w.writing)})
	} else {
		w.writing = ""
	}
	return w
}

// events are all worlds that can come next, by what happens.
func (w world) events() map[string]world {
	out := map[string]world{}
	if w.running == "" {
		out["boot"] = w.boot()
		return out
	}
	off := w.clone()
	off.running, off.plan, off.writing = "", nil, ""
	out["cut"] = off
	if len(w.plan) > 0 {
		s := w.plan[0]
		out[s.String()] = w.do(s)
		if s.Op == opWrite { // a cut in the middle
			half := off.clone()
			half.temp, half.content[s.Slot] = "?", "?"
			out["cut in "+s.String()] = half
		}
		return out
	}
	for _, v := range w.state().View() {
		if i := int(v.Label[0] - 'A'); v.Running && v.Status == Good && w.content[1-i] != "" {
			rot := w.clone()
			rot.content[1-i] = "?"
			out["slot "+Label(1-i)+" rots"] = rot // or its version cannot read any more what the newer one wrote to STATE
		}
	}
	if steps, err := planMarkGood(w.state(), false); err == nil && len(steps) > 0 && images[w.running].healthy {
		n := w.clone()
		n.plan = steps
		out["mark good"] = n
	}
	if steps, _, err := planRollback(w.state(), 1); err == nil && len(steps) > 0 {
		n := w.clone()
		n.plan = steps
		out["rollback"] = n
	}
	for v := range images {
		steps, slot, err := planBegin(w.state())
		if err != nil || v == w.running { // CheckUpgrade refuses what runs
			continue
		}
		n := w.clone()
		n.plan, n.writing = steps, v
		if n.content[slot] == v { // read again, and found to be there
			n.temp = "?"
		}
		if len(steps) == 0 {
			n = n.goOn()
		}
		out["begin "+v] = n
	}
	return out
}

// check is the law: whatever happened, the machine comes up by itself, with a version that proves its health; and if the version that
// systemd-boot prefers was found good, then with that one.
func (w world) check() error {
	land := w.lands()
	if land == "" {
		return fmt.Errorf("no boot leads to a healthy version")
	}
	for _, v := range w.state().View() {
		if v.Next && v.Status == Good && rootOf(land) != v.Root {
			return fmt.Errorf("it falls back to %s from a version that was found good", land)
		}
	}
	if len(w.entries) > 2 {
		return fmt.Errorf("%d kernels", len(w.entries))
	}
	for _, e := range w.entries {
		if !slices.Contains(w.labels[:], e.Name.Version) && w.temp != e.Name.Version {
			return fmt.Errorf("%s starts no slot", e.File)
		}
	}
	return nil
}

// TestAllHistories goes through every world that can be reached from a fresh installation: upgrades to good and bad images, trials,
// rollbacks, and power cuts before, after and in the middle of every durable change.
func TestAllHistories(t *testing.T) {
	type node struct {
		world
		depth int
		story []string
	}
	start := world{running: "0.1.0", content: [2]string{"0.1.0", ""}, labels: [2]string{"0.1.0", ""},
		entries: []Entry{{File: "bulkhead_0001_0.1.0.efi", Name: Name{Sequence: 1, Version: "0.1.0"}, Root: rootOf("0.1.0"), Epoch: 1}}}
	queue, seen, deepest, edges := []node{{world: start}}, map[string]bool{start.key(): true}, 0, 0
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		deepest = max(deepest, n.depth)
		if err := n.check(); err != nil {
			t.Fatalf("after %s:\n  %v\n  %+v", strings.Join(n.story, ", "), err, n.world)
		}
		for what, next := range n.events() {
			edges++
			if k := next.key(); !seen[k] {
				seen[k] = true
				queue = append(queue, node{next, n.depth + 1, append(slices.Clone(n.story), what)})
			}
		}
	}
	t.Logf("%d worlds, %d events, the longest shortest history has %d", len(seen), edges, deepest)
	if len(seen) < 500 {
		t.Errorf("only %d worlds: the walk does not reach what it should", len(seen))
	}
}

// A version that never proves its health uses up its tries, and the old one comes back, to stay; a good one is never left.
func TestTrials(t *testing.T) {
	w := world{running: "0.1.0", content: [2]string{"0.1.0", "0.4.0"}, labels: [2]string{"0.1.0", "0.4.0"}, entries: state("0.1.0", [2]string{}, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.4.0+3.efi").Entries}
	var got []string
	for range 5 {
		w = w.boot()
		got = append(got, w.running)
	}
	if want := "0.4.0 0.4.0 0.4.0 0.1.0 0.1.0"; strings.Join(got, " ") != want {
		t.Errorf("boots: %v, want %s", got, want)
	}
	if v := w.state().View(); v[1].Status != Failed || v[1].Entry.File != "bulkhead_0002_0.4.0+0-3.efi" {
		t.Errorf("afterwards: %+v", v[1])
	}
}
