package slots

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// This file is the whole of what decides about slots and boot entries. It is pure: State in, Steps out. Every step is one durable change,
// and after each of them, and before the first, the machine boots into a version that was found good, or into one on trial that gives way
// to such a one. walk_test.go goes through all histories.

// An Entry is a kernel of ours in EFI/Linux.
type Entry struct {
	File string
	Name Name
	// Root and Epoch are what the kernel itself says. Root is zero if it cannot be read.
	Root  bundle.Digest
	Epoch int
}

// A State is what one look found.
type State struct {
	Entries []Entry
	Slots   [2]bundle.Digest // the root hashes that the partitions' GUIDs spell; A, B
	Running bundle.Digest    // by the kernel's command line
}

// Label names a slot: "A" or "B".
func Label(slot int) string { return string(rune('A' + slot)) }

// running returns the entry of the running system, and its slot.
func (s State) running() (Entry, int, error) {
	slot := slices.Index(s.Slots[:], s.Running)
	if slot < 0 {
		return Entry{}, 0, errs.New(errs.Precondition, "the running system (root hash %s) is in neither slot", s.Running)
	}
	e, ok := s.entry(s.Running)
	if !ok {
		return Entry{}, 0, errs.New(errs.Precondition, "no kernel in %s starts the running system (root hash %s): was the machine started without its EFI partition?", kernelDir, s.Running)
	}
	return e, slot, nil
}

// entry returns the entry that starts a root. If there are two, which only a power cut in a foreign rename can bring about, it is the one that
// systemd-boot prefers.
func (s State) entry(root bundle.Digest) (Entry, bool) {
	var found []Entry
	for _, e := range s.Entries {
		if e.Root == root && root != (bundle.Digest{}) {
			found = append(found, e)
		}
	}
	if len(found) == 0 {
		return Entry{}, false
	}
	return slices.MinFunc(found, before), true
}

// before orders entries as systemd-boot does.
func before(a, b Entry) int {
	if a.File == b.File {
		return 0
	}
	pair := []string{a.File, b.File}
	if Order(pair); pair[0] == a.File {
		return -1
	}
	return 1
}

// next is a sequence that no entry has.
func (s State) next() int {
	n := 0
	for _, e := range s.Entries {
		n = max(n, e.Name.Sequence)
	}
	return n + 1
}

// Op is what a step does.
type Op string

// The steps there are. Each is whole or not there after a power cut, but for opWrite, of which any part may be there.
const (
	opRemove Op = "remove" // takes a kernel away
	opWrite  Op = "write"  // fills the idle slot, and the new kernel's file, which nobody starts yet
	opLabel  Op = "label"  // gives the slot's partitions the GUIDs that spell the root hash
	opRename Op = "rename" // gives a kernel another name
)

// A Step is one change.
type Step struct {
	Op       Op
	File, To string
	Slot     int
	Root     bundle.Digest
}

// String is the form for people.
func (s Step) String() string {
	switch s.Op {
	case opRemove:
		return "remove " + s.File
	case opRename:
		return "rename " + s.File + " to " + s.To
	case opLabel:
		return fmt.Sprintf("label slot %s %.16s…", Label(s.Slot), s.Root)
	}
	return fmt.Sprintf("write slot %s", Label(s.Slot))
}

// planBegin returns the steps that make the idle slot free to be written: its kernel goes first. Nothing is given up that the
// running version may still need to fall back to.
func planBegin(s State) ([]Step, int, error) {
	e, slot, err := s.running()
	if err != nil {
		return nil, 0, err
	}
	if e.Name.Counted {
		return nil, 0, errs.New(errs.Precondition, "%s is on trial: what it would fall back to is not overwritten before it is found good; bhctl get slots says what is missing, bhctl rollback goes back", e.Name.Version)
	}
	var steps []Step
	for _, o := range s.Entries {
		if o.Root != s.Running {
			steps = append(steps, Step{Op: opRemove, File: o.File})
		}
	}
	// First those that systemd-boot would not start: so it never starts one whose sibling is half gone.
	slices.SortStableFunc(steps, func(a, b Step) int { return before(Entry{File: b.File}, Entry{File: a.File}) })
	return steps, 1 - slot, nil
}

// planCommit returns the steps that let the next boot try what was written to a slot, and the kernel's name then. Entries must be those
// that planBegin left.
func planCommit(s State, slot int, m bundle.Manifest) ([]Step, Name) {
	name := Name{Version: m.Version}.trial(s.next())
	return []Step{
		{Op: opLabel, Slot: slot, Root: m.RootHash},
		{Op: opRename, File: tempName, To: name.String()},
	}, name
}

// planMarkGood returns the steps that end the trial of the running version. override is a person's word, against an earlier rollback.
func planMarkGood(s State, override bool) ([]Step, error) {
	e, _, err := s.running()
	if err != nil || !e.Name.Counted {
		return nil, err
	}
	if e.Name.GivenUp() && !override {
		return nil, errs.New(errs.Precondition, "%s was given up by a rollback; restart the machine, or mark it good by hand", e.Name.Version)
	}
	return []Step{{Op: opRename, File: e.File, To: e.Name.good().String()}}, nil
}

// planRollback returns the steps that make the next boot start the other version, or that cancel an upgrade that was not started yet.
// floor is the lowest epoch that still gets the disk's keys.
func planRollback(s State, floor int) (steps []Step, to Name, err error) {
	r, slot, err := s.running()
	if err != nil {
		return nil, Name{}, err
	}
	o, ok := s.entry(s.Slots[1-slot])
	switch {
	case !ok:
		return nil, Name{}, errs.New(errs.NotFound, "there is no other version: slot %s is empty", Label(1-slot))
	case r.Name.GivenUp() && !o.Name.Counted:
		return nil, o.Name, nil // done
	case !r.Name.Counted && o.Name.Counted && o.Name.Left > 0:
		return []Step{{Op: opRename, File: o.File, To: o.Name.givenUp().String()}}, r.Name, nil
	case o.Name.Counted:
		return nil, Name{}, errs.New(errs.Precondition, "%s in slot %s was not found good: it used up its tries or was given up; install it again to try again", o.Name.Version, Label(1-slot))
	case o.Epoch < floor:
		return nil, Name{}, errs.New(errs.Precondition, "%s in slot %s is of epoch %d, this node starts only %d and later", o.Name.Version, Label(1-slot), o.Epoch, floor)
	case r.Name.Counted:
		return []Step{{Op: opRename, File: r.File, To: r.Name.givenUp().String()}}, o.Name, nil
	}
	// Both are good: the running one stays as what the other falls back to.
	to = o.Name.trial(s.next())
	return []Step{{Op: opRename, File: o.File, To: to.String()}}, to, nil
}

// Status says how things stand with a slot.
type Status string

// What a slot can be.
const (
	Empty   Status = "empty"    // nothing starts it
	Good    Status = "good"     // was found good
	Trial   Status = "on trial" // has tries left, or runs its last one
	Failed  Status = "failed"   // used up its tries without being found good
	GivenUp Status = "given up" // by a rollback
)

// A View is a slot as people see it.
type View struct {
	Label   string
	Root    bundle.Digest
	Running bool
	Next    bool // systemd-boot starts it next
	Status  Status
	Entry   Entry // zero if Status is Empty
}

// View returns both slots.
func (s State) View() (out [2]View) {
	first, any := Entry{}, len(s.Entries) > 0
	if any {
		first = slices.MinFunc(s.Entries, before)
	}
	for i := range out {
		v := View{Label: Label(i), Root: s.Slots[i], Running: s.Slots[i] == s.Running, Status: Empty}
		if e, ok := s.entry(s.Slots[i]); ok {
			v.Entry, v.Next = e, any && first.Root == e.Root
			switch {
			case !e.Name.Counted:
				v.Status = Good
			case e.Name.GivenUp():
				v.Status = GivenUp
			case e.Name.Left > 0 || v.Running:
				v.Status = Trial
			default:
				v.Status = Failed
			}
		}
		out[i] = v
	}
	return out
}

// preferred is for fat.Volume.Reclaim: which of two names of one kernel stays. It is the one that says more of it: good, then fewer tries left.
func preferred(a, b string) string {
	x, okX := ParseName(a)
	y, okY := ParseName(b)
	switch {
	case okX != okY:
		if okX {
			return a
		}
		return b
	case cmp.Or(cmp.Compare(x.Sequence, y.Sequence), -cmp.Compare(yes(x.Counted), yes(y.Counted)), -cmp.Compare(x.Left, y.Left)) >= 0:
		return a
	}
	return b
}
