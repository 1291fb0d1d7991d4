package roster

import (
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Who may join by which attestation, and what becomes of it and of the node that was there.
func TestAdmitAttested(t *testing.T) {
	named := Allowance{ID: "A", Role: Worker, EK: "E", Expires: now.Add(time.Minute), State: Unused}
	maker := Allowance{ID: "A", Role: Worker, Authorities: "PEM", Expires: now.Add(time.Minute), State: Unused}
	with := func(a Allowance, f func(*Allowance)) Allowance { f(&a); return a }
	use := func(a *Allowance) { a.State, a.UsedBy, a.Key = Used, "n2", "K2" }
	n2 := Node{Name: "n2", Role: Worker, Key: "K2", Attested: &Attested{EK: "E"}}
	token := Node{Name: "n2", Role: Worker, Key: "K2", Token: "T"}
	me := Applicant{Token: "A", Name: "n2", Key: "K2", Address: "10.5.0.2"}
	anew := Applicant{Token: "A", Name: "n2", Key: "K3"}
	for _, c := range []struct {
		name     string
		a        Allowance
		nodes    []Node
		removed  string
		by       Applicant
		ek       string
		now      time.Time
		changed  bool
		replaces bool
		err      string
		kind     errs.Kind
	}{
		{name: "new, named", a: named, by: me, ek: "E", changed: true},
		{name: "new, of that maker", a: maker, by: me, ek: "X", changed: true},
		{name: "again, the answer was lost", a: with(named, use), nodes: []Node{n2}, by: me, ek: "E"},
		{name: "again, of that maker", a: with(maker, use), nodes: []Node{n2}, by: me, ek: "E"},
		{name: "it comes back", a: with(named, use), nodes: []Node{n2}, by: anew, ek: "E", changed: true, replaces: true},
		{name: "it comes back after it was removed", a: with(named, use), removed: "K2", by: anew, ek: "E", changed: true},
		{name: "it comes back by another attestation", a: named, nodes: []Node{n2}, by: anew, ek: "E", changed: true, replaces: true},
		{name: "one of that maker comes back", a: with(maker, use), nodes: []Node{n2}, by: anew, ek: "E", err: `was used by node "n2"`, kind: errs.Denied},
		{name: "another one of that maker", a: with(maker, use), nodes: []Node{n2}, by: Applicant{Token: "A", Name: "n3", Key: "K3"}, ek: "X", err: `was used by node "n2"`, kind: errs.Denied},
		{name: "under another name", a: with(named, use), nodes: []Node{n2}, by: Applicant{Token: "A", Name: "n3", Key: "K3"}, ek: "E", err: "under that name only", kind: errs.Denied},
		{name: "another TPM", a: named, by: me, ek: "X", err: "is for the TPM E, not X", kind: errs.Denied},
		{name: "another TPM in the node's place", a: maker, nodes: []Node{n2}, by: anew, ek: "X", err: `has a node called "n2", with another key`, kind: errs.Exists},
		{name: "in place of a node that had a token", a: named, nodes: []Node{token}, by: anew, ek: "E", err: `has a node called "n2", with another key`, kind: errs.Exists},
		{name: "one machine as two nodes", a: maker, nodes: []Node{n2}, by: Applicant{Token: "A", Name: "n3", Key: "K3"}, ek: "E", err: `TPM is node "n2"`, kind: errs.Exists},
		{name: "one key as two nodes", a: named, nodes: []Node{token}, by: Applicant{Token: "A", Name: "n3", Key: "K2"}, ek: "E", err: `key is node "n2"`, kind: errs.Exists},
		{name: "a key that was removed", a: named, removed: "K2", by: me, ek: "E", err: "removed from the cluster", kind: errs.Denied},
		{name: "revoked", a: with(named, func(a *Allowance) { a.State = Revoked }), by: me, ek: "E", err: "was revoked", kind: errs.Denied},
		{name: "expired", a: named, by: me, ek: "E", now: now.Add(time.Minute), err: "expired at 2026-11-26T12:01:00Z", kind: errs.Denied},
		{name: "for another name", a: with(named, func(a *Allowance) { a.Name = "n9" }), by: me, ek: "E", err: `called "n9", not "n2"`, kind: errs.Denied},
		{name: "unknown", a: named, by: Applicant{Token: "B", Name: "n2", Key: "K2"}, ek: "E", err: "does not know it any more", kind: errs.Denied},
	} {
		s := &State{Allowed: map[string]Allowance{"A": c.a}, Nodes: map[string]Node{}, Removed: map[string]string{c.removed: "n2"}}
		for _, n := range c.nodes {
			s.Nodes[n.Name] = n
		}
		if c.now.IsZero() {
			c.now = now
		}
		n, used, old, changed, err := AdmitAttested(s, c.by, Attested{EK: c.ek}, c.now)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || errs.Of(err) != c.kind {
				t.Errorf("%s: %v (kind %d), want kind %d with %q", c.name, err, errs.Of(err), c.kind, c.err)
			}
			continue
		}
		if err != nil || changed != c.changed || (old != nil) != c.replaces || n.Key != c.by.Key || n.Attested == nil || n.Attested.EK != c.ek || used.State != Used || used.UsedBy != "n2" {
			t.Errorf("%s: %+v, %+v, %v, %v, %v", c.name, n, used, old, changed, err)
		}
	}
}

// A machine finds what allows it; what names its key counts before what names none.
func TestFind(t *testing.T) {
	d := attest.Device{EK: []byte("ek")}
	ek := attest.Fingerprint(d.EK)
	good := Allowance{EK: ek, Expires: now.Add(time.Hour), State: Unused}
	revoked := good
	revoked.State = Revoked
	maker := Allowance{Authorities: "PEM", Expires: now.Add(time.Hour), State: Unused}
	for name, c := range map[string]struct {
		all map[string]Allowance
		id  string
		err string
	}{
		"nothing":           {nil, "", "bhctl attest allow --ek " + ek},
		"named":             {map[string]Allowance{"B": good}, "B", ""},
		"revoked and anew":  {map[string]Allowance{"A": revoked, "B": good}, "B", ""},
		"revoked":           {map[string]Allowance{"A": revoked, "B": maker}, "", "A was revoked"},
		"no word of makers": {map[string]Allowance{"B": maker}, "", "its TPM has no certificate of its maker. To allow it"},
	} {
		for id, a := range c.all {
			a.ID = id
			c.all[id] = a
		}
		a, err := (&State{Allowed: c.all}).Find(d, "n2", now)
		if a.ID != c.id || (err == nil) != (c.err == "") || err != nil && (!strings.Contains(err.Error(), c.err) || !errs.Is(err, errs.Denied)) {
			t.Errorf("%s: %q, %v", name, a.ID, err)
		}
	}
}
