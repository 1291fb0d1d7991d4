package machine

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu/lan"
)

// A fault is one thing that goes wrong with a cluster of three.
type fault struct {
	kind string
	node int           // whom it happens to
	hold time.Duration // how long
	step time.Duration // of the clock
	// rules are what the Ethernet between the machines does meanwhile.
	rules []lan.Rule
}

func (f fault) String() string {
	switch f.kind {
	case "split", "weather":
		return fmt.Sprintf("%s for %s", f.kind, f.hold)
	case "clock":
		return fmt.Sprintf("clock of %d steps by %s for %s", f.node+1, f.step, f.hold)
	}
	return fmt.Sprintf("%s %d for %s", f.kind, f.node+1, f.hold)
}

// faultKinds: the machine is killed; it stands still; its cable is out; it hears nobody, or nobody hears it; nobody hears anybody; frames are lost and late; its
// clock is wrong at a start.
var faultKinds = []string{"kill", "freeze", "cut", "deaf", "mute", "split", "weather", "clock"}

// clockSteps: less than certificates are made earlier for, more, more than they live, and so far that no authority is valid.
var clockSteps = []time.Duration{2 * time.Minute, time.Hour, 25 * time.Hour, 10 * 365 * 24 * time.Hour}

// A deck deals faults: each kind once, in any order, before any comes again. Equal seeds deal the same.
type deck struct {
	random *rand.Rand
	left   []string
	names  []string // of the machines
}

func newDeck(seed uint64, names []string) *deck {
	return &deck{random: rand.New(rand.NewPCG(seed, 0)), names: names}
}

func (d *deck) deal() fault {
	if len(d.left) == 0 {
		d.left = slices.Clone(faultKinds)
		d.random.Shuffle(len(d.left), func(i, j int) { d.left[i], d.left[j] = d.left[j], d.left[i] })
	}
	f := fault{kind: d.left[0], node: d.random.IntN(len(d.names))}
	d.left = d.left[1:]
	between := func(from, to int) time.Duration { return time.Duration(from+d.random.IntN(to-from+1)) * time.Second }
	own := d.names[f.node : f.node+1]
	others := slices.DeleteFunc(slices.Clone(d.names), func(n string) bool { return n == own[0] })
	switch f.kind {
	case "kill":
		f.hold = between(1, 10)
	case "freeze":
		f.hold = between(2, 15)
	case "cut":
		f.hold, f.rules = between(5, 20), []lan.Rule{lan.Cut(own, others)}
	case "deaf":
		f.hold, f.rules = between(5, 20), []lan.Rule{{From: others, To: own, Loss: 1}}
	case "mute":
		f.hold, f.rules = between(5, 20), []lan.Rule{{From: own, To: others, Loss: 1}}
	case "split":
		f.hold, f.rules = between(5, 15), []lan.Rule{{Loss: 1}}
	case "weather":
		f.hold = between(10, 20)
		f.rules = []lan.Rule{{Loss: 0.05 + 0.2*d.random.Float64(), Delay: time.Duration(20+d.random.IntN(150)) * time.Millisecond}}
	case "clock":
		f.hold, f.step = between(5, 15), clockSteps[d.random.IntN(len(clockSteps))]
		if d.random.IntN(2) == 0 {
			f.step = -f.step
		}
	}
	return f
}

func TestFaultDeck(t *testing.T) {
	names := []string{"a", "b", "c"}
	one, again, other := newDeck(1, names), newDeck(1, names), newDeck(2, names)
	var all, second, third []string
	for range 4 * len(faultKinds) {
		all, second, third = append(all, one.deal().String()), append(second, again.deal().String()), append(third, other.deal().String())
	}
	if !slices.Equal(all, second) {
		t.Errorf("one seed deals\n%s\nand\n%s", strings.Join(all, "\n"), strings.Join(second, "\n"))
	}
	if slices.Equal(all, third) {
		t.Error("two seeds deal the same")
	}
	kinds, hit := map[string]int{}, map[int]bool{}
	for d := newDeck(3, names); len(kinds) < len(faultKinds); {
		f := d.deal()
		if kinds[f.kind]++; kinds[f.kind] > 1 {
			t.Errorf("%s comes twice before all others came", f.kind)
		}
		if f.hold <= 0 {
			t.Errorf("%s takes no time", f)
		}
		hit[f.node] = true
	}
	if len(hit) < 2 {
		t.Errorf("all happens to one machine: %v", hit)
	}
}
