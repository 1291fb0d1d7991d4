package history

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// named is how many items an error names.
const named = 5

// Check says what is wrong with a history, whose last List must have been asked for when all was well again: an acknowledged item that is not there any more, one that is there
// twice or that nobody added, or answers that no order of the operations explains in which each happens at one moment between its call and its end. nil: nothing is. limit
// bounds the search for such an order, and one that was not found within it is an error too.
func Check(ops []Op, limit time.Duration) error {
	last := lastList(ops)
	if last < 0 {
		return errors.New("history: no list was answered, so nothing is known")
	}
	if err := errors.Join(strange(ops), stale(ops), lost(ops, ops[last])); err != nil {
		return err
	}
	switch porcupine.CheckOperationsTimeout(model, operations(ops), limit) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("history: whether it is linearizable was not found out within %s", limit)
	}
	return fmt.Errorf("history: it is not linearizable: %s", reason(ops))
}

func lastList(ops []Op) int {
	last := -1
	for i, op := range ops {
		if op.Kind == List && op.Error == "" && (last < 0 || op.Call > ops[last].Call) {
			last = i
		}
	}
	return last
}

// strange finds what nobody has written, or has been written twice.
func strange(ops []Op) error {
	begun := map[string]bool{}
	for _, op := range ops {
		if op.Kind == Add && begun[op.Item] {
			return fmt.Errorf("history: %q is added twice: each item may be added once", op.Item)
		}
		begun[op.Item] = begun[op.Item] || op.Kind == Add
	}
	for _, op := range ops {
		for i, item := range op.Items {
			if !begun[item] {
				return fmt.Errorf("history: %s lists %q at %s, which nobody has added", op.Node, item, op.Return)
			}
			if i > 0 && op.Items[i-1] == item {
				return fmt.Errorf("history: %s lists %q twice at %s: one write was done two times", op.Node, item, op.Return)
			}
		}
	}
	return nil
}

// stale finds answers that deny what was acknowledged.
func stale(ops []Op) error {
	for _, op := range ops {
		if op.Stale {
			return fmt.Errorf("history: %s denies at %s what was acknowledged before (%s %s): %s", op.Node, op.Call, op.Kind, op.Item, op.Error)
		}
	}
	return nil
}

// lost finds acknowledged items that are not on the last list.
func lost(ops []Op, last Op) error {
	var gone []string
	for _, op := range ops {
		if op.Kind != Add || op.Error != "" || op.Return >= last.Call {
			continue
		}
		if _, there := slices.BinarySearch(last.Items, op.Item); !there {
			gone = append(gone, fmt.Sprintf("%s (acknowledged by %s at %s)", op.Item, op.Node, op.Return))
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return fmt.Errorf("history: %d acknowledged writes are lost: %s", len(gone), strings.Join(gone[:min(len(gone), named)], ", "))
}

// digest stands for a set: the number of its items and the sum of their hashes. That two sets have the same one by chance is out of the question, and comparing them
// is what takes the time of a search over thousands of operations.
type digest struct {
	items int
	a, b  uint64
}

func (d digest) with(item string) digest {
	h := sha256.Sum256([]byte(item))
	return digest{d.items + 1, d.a + binary.BigEndian.Uint64(h[:]), d.b + binary.BigEndian.Uint64(h[8:])}
}

// model is the set: an item is added, or all are listed. An input is the digest of the one item, or nil.
var model = porcupine.Model{
	Init: func() any { return digest{} },
	Step: func(state, input, output any) (bool, any) {
		have := state.(digest)
		if item, ok := input.(digest); ok {
			return true, digest{have.items + item.items, have.a + item.a, have.b + item.b}
		}
		return have == output.(digest), have
	},
}

// operations translates a history. Lists without an answer say nothing. A write of unknown end that was never seen may be left out: it may be that it was not done yet. One that was seen
// was done before the first list with it ended.
func operations(ops []Op) []porcupine.Operation {
	seen := map[string]time.Duration{} // an end of a list with the item, the earliest
	for _, op := range ops {
		for _, item := range op.Items {
			if at, ok := seen[item]; !ok || op.Return < at {
				seen[item] = op.Return
			}
		}
	}
	var out []porcupine.Operation
	for _, op := range ops {
		o := porcupine.Operation{ClientId: op.Client, Call: int64(op.Call), Return: int64(op.Return)}
		switch at, ok := seen[op.Item]; {
		case op.Kind == List && op.Error != "", op.Kind == Add && op.Error != "" && !ok:
			continue
		case op.Kind == Add:
			if op.Error != "" {
				o.Return = int64(max(at, op.Call))
			}
			o.Input = digest{}.with(op.Item)
		default:
			d := digest{}
			for _, item := range op.Items {
				d = d.with(item)
			}
			o.Output = d
		}
		out = append(out, o)
	}
	return out
}

// reason looks for something that a person can follow: porcupine only says that there is no order.
func reason(ops []Op) string {
	lists := slices.DeleteFunc(slices.Clone(ops), func(op Op) bool { return op.Kind != List || op.Error != "" })
	slices.SortFunc(lists, func(a, b Op) int { return int(a.Call - b.Call) })
	for _, l := range lists {
		for _, op := range ops {
			_, there := slices.BinarySearch(l.Items, op.Item)
			switch {
			case op.Kind != Add:
			case !there && op.Error == "" && op.Return < l.Call:
				return fmt.Sprintf("%s was acknowledged by %s at %s, and %s does not list it at %s", op.Item, op.Node, op.Return, l.Node, l.Call)
			case there && op.Call > l.Return:
				return fmt.Sprintf("%s is listed by %s at %s, before it was written at %s", op.Item, l.Node, l.Return, op.Call)
			}
		}
	}
	for i, a := range lists {
		for _, b := range lists[i+1:] {
			ab, ba := without(a.Items, b.Items), without(b.Items, a.Items)
			switch {
			case len(ab) > 0 && a.Return < b.Call:
				return fmt.Sprintf("%s is listed by %s at %s, and not any more by %s at %s", ab[0], a.Node, a.Return, b.Node, b.Call)
			case len(ab) > 0 && len(ba) > 0:
				return fmt.Sprintf("%s lists %s and not %s at %s, and %s the other way round at %s", a.Node, ab[0], ba[0], a.Return, b.Node, b.Return)
			}
		}
	}
	return "no order of the operations explains all answers"
}
