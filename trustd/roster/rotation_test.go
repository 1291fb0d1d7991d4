package roster

import (
	"slices"
	"testing"
	"time"
)

func TestAdvance(t *testing.T) {
	now := time.Unix(1e9, 0)
	at := func(stage string, wait uint64, done ...string) *State {
		s := &State{Nodes: map[string]Node{"a": {Name: "a", Key: "ka"}, "b": {Name: "b", Key: "kb"}}, Confirmed: map[string]Confirmation{},
			Rotation: &Rotation{ID: "x", Stage: stage, Entered: now, Wait: wait}}
		for _, n := range done {
			s.Confirmed[n] = Confirmation{Rotation: "x", Stage: stage, Key: "k" + n}
		}
		return s
	}
	other, replaced, gone := at(Prepare, 0, "a", "b"), at(Prepare, 0, "a", "b"), at(Issue, 0, "a")
	other.Confirmed["b"] = Confirmation{Rotation: "older", Stage: Prepare, Key: "kb"}
	replaced.Nodes["b"] = Node{Name: "b", Key: "new"}
	delete(gone.Nodes, "b")
	for _, c := range []struct {
		name, next string
		s          *State
		at         time.Time
		waiting    []string
	}{
		{name: "none", s: &State{Nodes: map[string]Node{"a": {}}}},
		{name: "somebody has not", s: at(Prepare, 0, "a"), waiting: []string{"b"}},
		{name: "all have", s: at(Prepare, 0, "a", "b"), next: Issue},
		{name: "of another replacement", s: other, waiting: []string{"b"}},
		{name: "another node of that name", s: replaced, waiting: []string{"b"}},
		{name: "a lost node was removed", s: gone, next: Finish},
		{name: "overlap", s: at(Issue, 60, "a", "b"), at: now.Add(time.Minute)},
		{name: "overlap is over", s: at(Issue, 0, "a", "b"), next: Finish},
		{name: "finish", s: at(Finish, 60, "a", "b"), next: Done},
		{name: "done", s: at(Done, 0)},
		{name: "going back", s: at(Abort, 5, "a", "b"), at: now.Add(5 * time.Second)},
		{name: "back", s: at(Abort, 0, "a", "b"), next: Aborted},
		{name: "aborted", s: at(Aborted, 0)},
	} {
		next, at := Advance(c.s, now)
		if got := c.s.Waiting(); next != c.next || !at.Equal(c.at) || !slices.Equal(got, c.waiting) {
			t.Errorf("%s: %q at %v, waiting for %q; want %q at %v, %q", c.name, next, at, got, c.next, c.at, c.waiting)
		}
	}
}
