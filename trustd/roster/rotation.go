package roster

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Below Prefix: the newest replacement of authorities; what nodes have confirmed, by their name; what control planes ask for and get to take part in it.
const (
	rotation  = Prefix + "rotation"
	confirmed = Prefix + "confirmed/"
	wants     = Prefix + "wants/"
	sealed    = Prefix + "sealed/"
)

// Stages of a replacement of authorities.
const (
	Prepare = "prepare" // the new ones are trusted, too
	Issue   = "issue"   // they sign
	Finish  = "finish"  // the old ones are removed
	Done    = "done"
	Abort   = "abort"   // the old ones sign again
	Aborted = "aborted" // the new ones are removed
)

// handover is how long what control planes ask for and get stays, if they never take it.
const handover = time.Hour

// Rotation is a replacement of authorities, without any key.
type Rotation struct {
	ID      string    `json:"id"`
	Which   []string  `json:"which"`
	Stage   string    `json:"stage"`
	By      string    `json:"by"`
	Started time.Time `json:"started"`
	Entered time.Time `json:"entered"` // the stage
	// Wait is how many seconds Issue lasts at least, or Abort.
	Wait uint64 `json:"wait"`

	revision uint64
}

// parseRotation makes sense of what belongs to a replacement of authorities.
func (s *State) parseRotation(key string, e *storev1.Entry) error {
	if key == rotation {
		r := &Rotation{revision: e.GetRevision()}
		if err := json.Unmarshal(e.GetValue(), r); err != nil {
			return err
		}
		s.Rotation = r
	} else if name, ok := strings.CutPrefix(key, confirmed); ok {
		c := Confirmation{revision: e.GetRevision()}
		if err := json.Unmarshal(e.GetValue(), &c); err != nil {
			return err
		}
		s.Confirmed[name] = c
	} else if name, ok := strings.CutPrefix(key, wants); ok {
		w := Want{revision: e.GetRevision()}
		if err := json.Unmarshal(e.GetValue(), &w); err != nil {
			return err
		}
		s.Wants[name] = w
	} else if name, ok := strings.CutPrefix(key, sealed); ok {
		g := Sealed{revision: e.GetRevision()}
		if err := json.Unmarshal(e.GetValue(), &g); err != nil {
			return err
		}
		s.Sealed[name] = g
	}
	return nil
}

// Over reports whether nothing is left to do. So it is for none.
func (r *Rotation) Over() bool { return r == nil || r.Stage == Done || r.Stage == Aborted }

// FinishAt is when Finish may be entered at the earliest; zero in other stages than Issue.
func (r *Rotation) FinishAt() time.Time {
	if r == nil || r.Stage != Issue {
		return time.Time{}
	}
	return r.Entered.Add(time.Duration(r.Wait) * time.Second)
}

// Confirmation is what a node has done.
type Confirmation struct {
	Rotation string `json:"rotation"`
	Stage    string `json:"stage"`
	Key      string `json:"key"` // digest of the node's

	revision uint64
}

// Want is a control plane's request for the new keys.
type Want struct {
	Rotation  string `json:"rotation"`
	Seal      []byte `json:"seal"`      // HPKE public key, made for this
	Signature []byte `json:"signature"` // of the node's own key
	Proof     []byte `json:"proof"`     // that it has the cluster's keys

	revision uint64
}

// Sealed is the answer to a Want.
type Sealed struct {
	Rotation  string `json:"rotation"`
	Seal      []byte `json:"seal"` // of the Want
	Text      []byte `json:"text"`
	Signature []byte `json:"signature"` // of the old authority

	revision uint64
}

// Waiting returns the nodes that have not confirmed the stage, in order.
func (s *State) Waiting() []string {
	var out []string
	if s.Rotation.Over() {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if !s.HasConfirmed(name) {
			out = append(out, name)
		}
	}
	return out
}

// HasConfirmed reports whether a node has confirmed the present stage.
func (s *State) HasConfirmed(name string) bool {
	c := s.Confirmed[name]
	return s.Rotation != nil && c.Rotation == s.Rotation.ID && c.Stage == s.Rotation.Stage && c.Key == s.Nodes[name].Key
}

// Advance decides which stage follows: "" while somebody has not confirmed the present one, or its time is not over; then at says when it is, if that is all. It is pure.
func Advance(s *State, now time.Time) (next string, at time.Time) {
	if s.Rotation.Over() || len(s.Nodes) == 0 || len(s.Waiting()) > 0 {
		return "", time.Time{}
	}
	switch s.Rotation.Stage {
	case Prepare:
		return Issue, time.Time{}
	case Issue:
		if at := s.Rotation.FinishAt(); now.Before(at) {
			return "", at
		}
		return Finish, time.Time{}
	case Finish:
		return Done, time.Time{}
	case Abort:
		if at := s.Rotation.Entered.Add(time.Duration(s.Rotation.Wait) * time.Second); now.Before(at) {
			return "", at
		}
		return Aborted, time.Time{}
	}
	return "", time.Time{}
}

// Start makes a replacement known. Exists if there is one that is not over.
func (r Roster) Start(ctx context.Context, rot Rotation) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if !s.Rotation.Over() {
			return nil, errs.New(errs.Exists, "a replacement of authorities runs already, by %q", s.Rotation.By)
		}
		c := &change{}
		c.put(rotation, s.rotationRevision(), rot, 0)
		return c, nil
	})
}

// Restore makes a replacement known again that etcd has forgotten: a snapshot from before it was restored.
func (r Roster) Restore(ctx context.Context, rot Rotation) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if s.Rotation != nil && (s.Rotation.ID == rot.ID || !s.Rotation.Over()) {
			return nil, nil
		}
		c := &change{}
		c.put(rotation, s.rotationRevision(), rot, 0)
		return c, nil
	})
}

func (s *State) rotationRevision() uint64 {
	if s.Rotation == nil {
		return 0
	}
	return s.Rotation.revision
}

// Change has f change the replacement that is there; f says false if there is nothing to change.
func (r Roster) Change(ctx context.Context, f func(*State, *Rotation) (bool, error)) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if s.Rotation == nil {
			return nil, errs.New(errs.NotFound, "no authority is being replaced")
		}
		rot := *s.Rotation
		if changed, err := f(s, &rot); err != nil || !changed {
			return nil, err
		}
		c := &change{}
		c.put(rotation, rot.revision, rot, 0)
		return c, nil
	})
}

// Enter enters the next stage if the list still says so. The record's revision fences it: two control planes cannot both enter it, and none enters one that was left.
func (r Roster) Enter(ctx context.Context, now time.Time) error {
	return r.Change(ctx, func(s *State, rot *Rotation) (bool, error) {
		next, _ := Advance(s, now)
		if next == "" {
			return false, nil
		}
		rot.Stage, rot.Entered = next, now
		return true, nil
	})
}

// Confirm notes what a node has done; the stage must be the present one.
func (r Roster) Confirm(ctx context.Context, n Node, id, stage string) error {
	return r.update(ctx, func(s *State) (*change, error) {
		have, ok := s.Nodes[n.Name]
		if !ok || have.Key != n.Key {
			return nil, errs.New(errs.Unauthenticated, "the cluster has no node called %q with this key", n.Name)
		}
		if s.Rotation == nil || s.Rotation.ID != id || s.Rotation.Stage != stage {
			return nil, errs.New(errs.Precondition, "the cluster is at another stage than %.20q of replacing its authorities", stage)
		}
		if s.HasConfirmed(n.Name) {
			return nil, nil
		}
		c := &change{}
		c.when(rotation, s.Rotation.revision)
		c.put(confirmed+n.Name, s.Confirmed[n.Name].revision, Confirmation{Rotation: id, Stage: stage, Key: n.Key}, 0)
		return c, nil
	})
}

// Ask keeps a control plane's request for the new keys.
func (r Roster) Ask(ctx context.Context, name string, w Want) error {
	return r.update(ctx, func(s *State) (*change, error) {
		c := &change{}
		c.put(wants+name, s.Wants[name].revision, w, handover)
		return c, nil
	})
}

// Give keeps the answer for a control plane, if nobody gave one to the same request.
func (r Roster) Give(ctx context.Context, name string, e Sealed) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if string(s.Sealed[name].Seal) == string(e.Seal) || string(s.Wants[name].Seal) != string(e.Seal) {
			return nil, nil
		}
		c := &change{}
		c.put(sealed+name, s.Sealed[name].revision, e, handover)
		return c, nil
	})
}

// Took removes a request and its answer.
func (r Roster) Took(ctx context.Context, name string) error {
	return r.update(ctx, func(s *State) (*change, error) {
		c := &change{}
		if w, ok := s.Wants[name]; ok {
			c.drop(wants+name, w.revision)
		}
		if e, ok := s.Sealed[name]; ok {
			c.drop(sealed+name, e.revision)
		}
		if len(c.r.Changes) == 0 {
			return nil, nil
		}
		return c, nil
	})
}
