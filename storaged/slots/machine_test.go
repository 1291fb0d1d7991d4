package slots

import (
	"fmt"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// rootOf is the root hash of a test's version: "0.2.0" has its middle digit in it.
func rootOf(version string) bundle.Digest { return bundle.Sum([]byte(version)) }

// state makes a State of names; running and slots are versions, "" for none.
func state(running string, slots [2]string, files ...string) State {
	s := State{Running: rootOf(running)}
	for i, v := range slots {
		if v != "" {
			s.Slots[i] = rootOf(v)
		}
	}
	for _, f := range files {
		n, ok := ParseName(f)
		if !ok {
			panic(f)
		}
		s.Entries = append(s.Entries, Entry{File: f, Name: n, Root: rootOf(n.Version), Epoch: 1})
	}
	return s
}

func text(steps []Step) string {
	var out []string
	for _, s := range steps {
		out = append(out, s.String())
	}
	return strings.Join(out, "; ")
}

func TestPlans(t *testing.T) {
	const one, two = "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0"
	ab := [2]string{"0.1.0", "0.2.0"}
	for _, c := range []struct {
		what  string
		state State
		do    func(State) ([]Step, error)
		want  string
		kind  errs.Kind // with want as a part of the text, if not Internal
	}{
		{"begin on a new disk", state("0.1.0", [2]string{"0.1.0", ""}, one), begin, "", 0},
		{"begin with an old version", state("0.2.0", ab, one, two+".efi"), begin, "remove " + one, 0},
		{"begin with a failed version", state("0.1.0", ab, one, two+"+0-3.efi"), begin, "remove " + two + "+0-3.efi", 0},
		{"begin with an upgrade not started", state("0.1.0", ab, one, two+"+3.efi"), begin, "remove " + two + "+3.efi", 0},
		{"begin with remains", state("0.1.0", ab, one, two+".efi", "bulkhead_0003_0.3.0+3.efi"), begin, "remove bulkhead_0002_0.2.0.efi; remove bulkhead_0003_0.3.0+3.efi", 0},
		{"begin on trial", state("0.2.0", ab, one, two+"+2-1.efi"), begin, "is on trial", errs.Precondition},
		{"begin without an entry", state("0.1.0", ab, two+".efi"), begin, "no kernel in EFI/Linux", errs.Precondition},
		{"begin without a slot", state("0.3.0", ab, one), begin, "in neither slot", errs.Precondition},

		{"good on trial", state("0.2.0", ab, one, two+"+2-1.efi"), good, "rename " + two + "+2-1.efi to " + two + ".efi", 0},
		{"good at the last try", state("0.2.0", ab, one, two+"+0-3.efi"), good, "rename " + two + "+0-3.efi to " + two + ".efi", 0},
		{"good already", state("0.2.0", ab, one, two+".efi"), good, "", 0},
		{"good after a rollback", state("0.2.0", ab, one, two+"+0-9.efi"), good, "given up by a rollback", errs.Precondition},
		{"good without an entry", state("0.1.0", ab, two+".efi"), good, "no kernel", errs.Precondition},

		{"back from a trial", state("0.2.0", ab, one, two+"+2-1.efi"), back, "rename " + two + "+2-1.efi to " + two + "+0-9.efi", 0},
		{"back from the last try", state("0.2.0", ab, one, two+"+0-3.efi"), back, "rename " + two + "+0-3.efi to " + two + "+0-9.efi", 0},
		{"back again", state("0.2.0", ab, one, two+"+0-9.efi"), back, "", 0},
		{"back from a good one", state("0.2.0", ab, one, two+".efi"), back, "rename " + one + " to bulkhead_0003_0.1.0+3.efi", 0},
		{"forth again", state("0.1.0", ab, "bulkhead_0003_0.1.0.efi", two+".efi"), back, "rename " + two + ".efi to bulkhead_0004_0.2.0+3.efi", 0},
		{"cancel", state("0.1.0", ab, one, two+"+3.efi"), back, "rename " + two + "+3.efi to " + two + "+0-9.efi", 0},
		{"back to a failed one", state("0.1.0", ab, one, two+"+0-3.efi"), back, "used up its tries", errs.Precondition},
		{"back to nothing", state("0.1.0", [2]string{"0.1.0", ""}, one), back, "slot B is empty", errs.NotFound},
		{"back to an overwritten slot", state("0.1.0", [2]string{"0.1.0", "0.3.0"}, one, two+".efi"), back, "slot B is empty", errs.NotFound},
	} {
		steps, err := c.do(c.state)
		if c.kind != 0 {
			if !errs.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: got %v, want …%s…", c.what, err, c.want)
			}
		} else if err != nil || text(steps) != c.want {
			t.Errorf("%s: got %q, %v; want %q", c.what, text(steps), err, c.want)
		}
	}
	if _, _, err := planRollback(state("0.2.0", ab, one, two+".efi"), 2); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "epoch 1") {
		t.Errorf("back over the epoch: %v", err)
	}
	if s, err := planMarkGood(state("0.2.0", ab, one, two+"+0-9.efi"), true); err != nil || len(s) != 1 {
		t.Errorf("good by a person's word: %v, %v", s, err)
	}
}

func begin(s State) ([]Step, error) { steps, _, err := planBegin(s); return steps, err }
func good(s State) ([]Step, error)  { return planMarkGood(s, false) }
func back(s State) ([]Step, error)  { steps, _, err := planRollback(s, 1); return steps, err }

func TestView(t *testing.T) {
	ab := [2]string{"0.1.0", "0.2.0"}
	for want, s := range map[string]State{
		"A good running next, B empty":        state("0.1.0", [2]string{"0.1.0", ""}, "bulkhead_0001_0.1.0.efi"),
		"A good running, B on trial next":     state("0.1.0", ab, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0+3.efi"),
		"A good, B on trial running next":     state("0.2.0", ab, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0+1-2.efi"),
		"A good next, B on trial running":     state("0.2.0", ab, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0+0-3.efi"),
		"A good running next, B failed":       state("0.1.0", ab, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0+0-3.efi"),
		"A good next, B given up running":     state("0.2.0", ab, "bulkhead_0001_0.1.0.efi", "bulkhead_0002_0.2.0+0-9.efi"),
		"A on trial next, B good running":     state("0.2.0", ab, "bulkhead_0003_0.1.0+3.efi", "bulkhead_0002_0.2.0.efi"),
		"A good running next, B good":         state("0.1.0", ab, "bulkhead_0003_0.1.0.efi", "bulkhead_0002_0.2.0.efi"),
		"A empty running, B good next":        state("0.1.0", ab, "bulkhead_0002_0.2.0.efi"),
		"A empty running, B empty":            state("0.1.0", ab),
		"A on trial running next, B given up": state("0.1.0", ab, "bulkhead_0003_0.1.0+2-1.efi", "bulkhead_0002_0.2.0+0-9.efi"),
	} {
		var parts []string
		for _, v := range s.View() {
			p := v.Label + " " + string(v.Status)
			if v.Running {
				p += " running"
			}
			if v.Next {
				p += " next"
			}
			parts = append(parts, p)
		}
		if got := strings.Join(parts, ", "); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestPreferred(t *testing.T) {
	for _, c := range []struct{ a, b string }{ // a stays
		{"bulkhead_0002_0.2.0.efi", "bulkhead_0002_0.2.0+2-1.efi"},
		{"bulkhead_0002_0.2.0+1-2.efi", "bulkhead_0002_0.2.0+2-1.efi"},
		{"bulkhead_0003_0.1.0+3.efi", "bulkhead_0001_0.1.0.efi"},
		{"bulkhead_0002_0.2.0+3.efi", tempName},
		{"bulkhead_0002_0.2.0+0-9.efi", "bulkhead_0002_0.2.0+2-1.efi"},
	} {
		if x, y := preferred(c.a, c.b), preferred(c.b, c.a); x != c.a || y != c.a {
			t.Errorf("of %s and %s: %s, %s", c.a, c.b, x, y)
		}
	}
}

func ExampleStep_String() {
	_, name := planCommit(state("0.1.0", [2]string{"0.1.0", ""}, "bulkhead_0001_0.1.0.efi"), 1, bundle.Manifest{Version: "0.2.0"})
	fmt.Println(name)
	// Output: bulkhead_0002_0.2.0+3.efi
}
