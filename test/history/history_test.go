package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// add and list are operations from one second to another.
func add(item string, from, to int) Op {
	return Op{Node: "n1", Kind: Add, Item: item, Call: time.Duration(from) * time.Second, Return: time.Duration(to) * time.Second}
}

func list(from, to int, items ...string) Op {
	return Op{Node: "n2", Kind: List, Items: items, Call: time.Duration(from) * time.Second, Return: time.Duration(to) * time.Second}
}

func failed(op Op) Op {
	op.Error = "deadline exceeded"
	return op
}

func TestCheck(t *testing.T) {
	denied := failed(add("a/later", 3, 4))
	denied.Stale = true
	for _, c := range []struct {
		name string
		ops  []Op
		want string // in the error; "": none
	}{
		{"one after the other", []Op{add("a", 1, 2), list(3, 4, "a"), add("b", 5, 6), list(7, 8, "a", "b")}, ""},
		{"at the same time, either way", []Op{add("a", 1, 9), list(2, 3), list(4, 5, "a"), list(10, 11, "a")}, ""},
		{"a write of unknown end that was not done", []Op{failed(add("a", 1, 2)), list(3, 4), list(5, 6)}, ""},
		{"one that was done long after", []Op{failed(add("a", 1, 2)), list(3, 4), add("b", 5, 6), list(7, 8, "b"), list(9, 10, "a", "b")}, ""},
		{"a read that failed says nothing", []Op{add("a", 1, 2), failed(list(3, 4)), list(5, 6, "a")}, ""},
		{"a write after the last list", []Op{list(1, 2), add("a", 3, 4)}, ""},

		{"lost for good", []Op{add("a", 1, 2), list(3, 4, "a"), list(5, 6)}, "1 acknowledged writes are lost: a (acknowledged by n1 at 2s)"},
		{"a stale read", []Op{add("a", 1, 2), list(3, 4), list(5, 6, "a")}, "a was acknowledged by n1 at 2s, and n2 does not list it at 3s"},
		{"from the future", []Op{list(1, 2, "a"), add("a", 3, 4), list(5, 6, "a")}, "before it was written"},
		{"seen, and gone", []Op{failed(add("a", 1, 2)), list(3, 4, "a"), list(5, 6), list(7, 8, "a")}, "a is listed by n2 at 4s, and not any more by n2 at 5s"},
		{"two orders", []Op{add("a", 1, 9), add("b", 1, 9), list(2, 8, "a"), list(2, 8, "b"), list(10, 11, "a", "b")}, "the other way round"},
		{"the later without the earlier", []Op{add("a", 2, 3), add("b", 4, 5), list(1, 6, "b"), list(7, 8, "a", "b")}, "not linearizable"},
		{"unknown, without what was before it", []Op{add("a", 2, 3), failed(add("b", 4, 5)), list(1, 6, "b"), list(7, 8, "a", "b")}, "not linearizable"},
		{"twice", []Op{add("a", 1, 2), list(3, 4, "a", "a")}, "lists \"a\" twice"},
		{"nobody's", []Op{add("a", 1, 2), list(3, 4, "a", "b")}, "nobody has added"},
		{"added again", []Op{add("a", 1, 2), add("a", 3, 4), list(5, 6, "a")}, "added twice"},
		{"denied", []Op{add("a", 1, 2), denied, list(5, 6, "a")}, "denies at 3s what was acknowledged before"},
		{"nothing was seen", []Op{add("a", 1, 2), failed(list(3, 4))}, "nothing is known"},
	} {
		switch err := Check(c.ops, time.Minute); {
		case err == nil && c.want != "":
			t.Errorf("%s: found good, want %q", c.name, c.want)
		case err != nil && (c.want == "" || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestSum(t *testing.T) {
	ops := []Op{add("a", 1, 2), failed(add("b", 2, 9)), list(2, 3, "a"), failed(list(3, 4)), add("c", 10, 12), add("d", 3, 4)}
	if got, want := Sum(ops, 15*time.Second), (Figures{Added: 3, Unknown: 1, Listed: 1, Unlisted: 1, Gap: 8 * time.Second, GapAt: 4 * time.Second}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := Sum(nil, 5*time.Second); got.Gap != 5*time.Second {
		t.Errorf("without a write: %s", got.Gap)
	}
}

func TestSaveTellsWhatCameAndWent(t *testing.T) {
	var out bytes.Buffer
	if err := Save(&out, []Op{list(1, 2, "a", "b"), failed(add("c", 1, 2)), list(3, 4, "b", "c")}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], `"came":["a","b"]`) || !strings.Contains(lines[1], `"error":"deadline exceeded"`) || !strings.Contains(lines[2], `"count":2,"came":["c"],"went":["a"]`) {
		t.Errorf("got\n%s", out.String())
	}
}

// shop is a set of three nodes, with a flaw.
type shop struct {
	mu    sync.Mutex
	items []string
	lag   map[string][]string // what a node lists that does not ask the others
	flaw  string
	calls int
}

func (s *shop) Add(ctx context.Context, node, item string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	switch {
	case s.calls%11 == 0:
		return errors.New("not done")
	case s.calls%13 == 0:
		s.items = append(s.items, item)
		return errors.New("done, and the answer lost")
	case s.flaw == "forgets" && s.calls == 100:
		return nil
	}
	s.items = append(s.items, item)
	if s.calls == 60 {
		s.lag = map[string][]string{"n3": append([]string{}, s.items...)}
	}
	return nil
}

func (s *shop) List(ctx context.Context, node string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.lag[node]; s.flaw == "stale" && old != nil && s.calls < 200 {
		return append([]string{}, old...), nil
	}
	return append([]string{}, s.items...), nil
}

// TestClients: what the clients do is enough to find what a shop does wrong, and finds nothing at an honest one whose answers get lost.
func TestClients(t *testing.T) {
	for flaw, want := range map[string]string{"": "", "forgets": "acknowledged writes are lost", "stale": "does not list it"} {
		synctest.Test(t, func(t *testing.T) {
			s, r := &shop{flaw: flaw}, Begin()
			c := Clients{Nodes: []string{"n1", "n2", "n3"}, Writers: 4, Readers: 2, Open: func(int) Set { return s }, Pause: 100 * time.Millisecond, Patience: time.Second, Most: 200, Seed: 1}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c.Run(ctx, r)
			if err := c.Look(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			err := Check(r.Ops(), time.Minute)
			if got := fmt.Sprint(err); err == nil && want != "" || err != nil && (want == "" || !strings.Contains(got, want)) {
				t.Errorf("flaw %q: %s, want %q", flaw, got, want)
			}
			if f := Sum(r.Ops(), r.Now()); f.Added < 200 || f.Unknown < 10 || f.Listed < 500 {
				t.Errorf("the clients did too little: %s", f)
			}
		})
	}
}
