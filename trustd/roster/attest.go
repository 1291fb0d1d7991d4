package roster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Allowance lets a machine join by its TPM, without a token. It has either EK or Authorities.
type Allowance struct {
	ID   string `json:"-"`
	Role string `json:"role"`
	Name string `json:"name,omitempty"` // "": any
	// EK is the fingerprint of the machine's endorsement key. Such a machine may come back as the node that it was.
	EK string `json:"ek,omitempty"`
	// Authorities are certificates of makers of TPMs (PEM): good for one machine, once.
	Authorities string        `json:"authorities,omitempty"`
	Policy      attest.Policy `json:"policy,omitzero"`
	Expires     time.Time     `json:"expires"`
	MadeBy      string        `json:"made_by"`
	State       string        `json:"state"`
	UsedBy      string        `json:"used_by,omitempty"`
	Key         string        `json:"key,omitempty"` // of who used it

	revision uint64
}

// Attested is what a node's TPM showed when it joined.
type Attested struct {
	Allowance string        `json:"allowance"` // id
	EK        string        `json:"ek"`        // fingerprint
	PCRs      attest.Values `json:"pcrs"`
	ImageKey  string        `json:"image_key,omitempty"` // fingerprint, if it was asked for
	Epoch     int           `json:"epoch,omitempty"`
	At        time.Time     `json:"at"`
}

// open says why an allowance lets nobody in under a name.
func (a Allowance) open(name string, now time.Time) error {
	switch {
	case a.State == Revoked:
		return errs.New(errs.Denied, "attestation %s was revoked; an administrator can allow it anew", a.ID)
	case !now.Before(a.Expires):
		return errs.New(errs.Denied, "attestation %s expired at %s; it is %s here. An administrator can allow it anew", a.ID, a.Expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	case a.Name != "" && a.Name != name:
		return errs.New(errs.Denied, "attestation %s is for a node called %q, not %.64q", a.ID, a.Name, name)
	case a.State == Used && a.UsedBy != name && a.EK != "":
		return errs.New(errs.Denied, "attestation %s was used by node %q; a TPM may come back under that name only, not as %.64q", a.ID, a.UsedBy, name)
	case a.State == Used && a.UsedBy != name:
		return errs.New(errs.Denied, "attestation %s was used by node %q; it is good for one machine: an administrator can allow another one", a.ID, a.UsedBy)
	}
	return nil
}

// Find returns what lets the machine with a TPM join under a name. One that names its endorsement key goes first, and if such a one was revoked, none that names no
// key lets it in. It is pure.
func (s *State) Find(d attest.Device, name string, now time.Time) (Allowance, error) {
	ek := attest.Fingerprint(d.EK)
	var why error
	all := slices.Sorted(maps.Keys(s.Allowed))
	for _, id := range all {
		if a := s.Allowed[id]; a.EK == ek {
			err := a.open(name, now)
			if err == nil {
				return a, nil
			}
			if why == nil {
				why = err
			}
		}
	}
	if why != nil {
		return Allowance{}, why
	}
	for _, id := range all {
		a := s.Allowed[id]
		if a.Authorities == "" || a.open(name, now) != nil {
			continue
		}
		if why = attest.Vouched(a.Authorities, d.Certificate, d.EK); why == nil {
			return a, nil
		}
	}
	if why != nil {
		return Allowance{}, errs.New(errs.Denied, "this machine is not allowed to join: %w. To allow it by its endorsement key: bhctl attest allow --ek %s --role ROLE", why, ek)
	}
	return Allowance{}, errs.New(errs.Denied, "this machine is not allowed to join by its TPM; if it is yours: bhctl attest allow --ek %s --role ROLE", ek)
}

// AdmitAttested decides whether a machine may join that has proved what seen says, and returns the node and the allowance as they then are. old is the node's former
// record, if it comes back. changed is false for one who has joined already, and asks again since the answer was lost. It is pure.
func AdmitAttested(s *State, a Applicant, seen Attested, now time.Time) (n Node, used Allowance, old *Node, changed bool, err error) {
	used, ok := s.Allowed[a.Token]
	if !ok {
		return n, used, nil, false, errs.New(errs.Denied, "attestation %.64s: the cluster does not know it any more; an administrator can allow it anew", a.Token)
	}
	if err := used.open(a.Name, now); err != nil {
		return n, used, nil, false, err
	}
	if used.EK != "" && used.EK != seen.EK {
		return n, used, nil, false, errs.New(errs.Denied, "attestation %s is for the TPM %s, not %s", used.ID, used.EK, seen.EK)
	}
	have, taken := s.Nodes[a.Name]
	if taken && have.Key == a.Key && have.Attested != nil && have.Attested.EK == seen.EK {
		return have, used, nil, false, nil
	}
	if used.EK == "" && used.State != Unused {
		return n, used, nil, false, errs.New(errs.Denied, "attestation %s was used by node %q; it is good for one machine, once: an administrator can allow another one", used.ID, used.UsedBy)
	}
	if err := checkOthers(s, a, seen); err != nil {
		return n, used, nil, false, err
	}
	n = Node{Name: a.Name, Role: used.Role, Key: a.Key, PublicKey: a.PublicKey, Joined: now, Attested: &seen}
	if taken {
		if used.EK == "" || have.Attested == nil || have.Attested.EK != seen.EK {
			return n, used, nil, false, errs.New(errs.Exists, "the cluster has a node called %q, with another key; take another name, or remove that node first", a.Name)
		}
		old = &have
	}
	n, _ = n.See(a.Address)
	used.State, used.UsedBy, used.Key = Used, a.Name, a.Key
	return n, used, old, true, nil
}

// checkOthers says whether another node stands in the way: one machine is one node, and a key that was removed is void.
func checkOthers(s *State, a Applicant, seen Attested) error {
	if _, gone := s.Removed[a.Key]; gone {
		return errs.New(errs.Denied, "a node with this key was removed from the cluster; reset the machine, so that it makes another one")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		o := s.Nodes[name]
		if name == a.Name {
			continue
		}
		if o.Key == a.Key {
			return errs.New(errs.Exists, "this machine's key is node %q of the cluster already", name)
		}
		if o.Attested != nil && o.Attested.EK == seen.EK {
			return errs.New(errs.Exists, "this machine's TPM is node %q of the cluster already; remove that node first", name)
		}
	}
	return nil
}

// JoinAttested admits a machine that has proved what seen says, in one transaction with using up what allows it. replace says whether a node may be replaced that comes back.
func (r Roster) JoinAttested(ctx context.Context, a Applicant, seen Attested, now time.Time, replace func(Node) error) (n Node, after *State, err error) {
	err = r.update(ctx, func(s *State) (*change, error) {
		var used Allowance
		var old *Node
		var changed bool
		if n, used, old, changed, err = AdmitAttested(s, a, seen, now); err != nil {
			return nil, err
		}
		after = s.With(n)
		if !changed {
			return nil, nil
		}
		c := &change{}
		c.put(allowed+used.ID, used.revision, used, used.Expires.Sub(now)+keepToken)
		c.when(removed+n.Key, 0)
		if old == nil {
			c.put(nodes+n.Name, 0, n, 0)
			return c, nil
		}
		if err := replace(*old); err != nil {
			return nil, err
		}
		c.put(nodes+n.Name, old.revision, n, 0)
		c.put(removed+old.Key, 0, note{By: "node:" + n.Name, At: now, Name: n.Name}, 0)
		return c, nil
	})
	return n, after, err
}

// maxAllowed bounds what administrators can fill etcd with.
const maxAllowed = 4_096

// Allow keeps a new allowance.
func (r Roster) Allow(ctx context.Context, a Allowance, now time.Time) error {
	return r.update(ctx, func(s *State) (*change, error) {
		if n, ok := s.Nodes[a.Name]; ok && a.Name != "" && (n.Attested == nil || a.EK == "" || n.Attested.EK != a.EK) {
			return nil, errs.New(errs.Exists, "name: the cluster has a node called %q already, with another key; remove it first", a.Name)
		}
		for _, o := range s.Allowed {
			if a.EK != "" && o.EK == a.EK && o.State != Revoked && now.Before(o.Expires) {
				return nil, errs.New(errs.Exists, "endorsement_key: attestation %s allows it already; revoke that one first: bhctl attest revoke %s", o.ID, o.ID)
			}
		}
		if len(s.Allowed) >= maxAllowed {
			return nil, errs.New(errs.Exhausted, "the cluster keeps %d attestations, which is the limit; they go a day after they expired", maxAllowed)
		}
		c := &change{}
		c.put(allowed+a.ID, 0, a, a.Expires.Sub(now)+keepToken)
		return c, nil
	})
}

// Disallow makes an allowance void, also one that was used: its machine does not come back by it.
func (r Roster) Disallow(ctx context.Context, id string, now time.Time) error {
	return r.update(ctx, func(s *State) (*change, error) {
		a, ok := s.Allowed[id]
		if !ok {
			return nil, errs.New(errs.NotFound, "there is no attestation %.64q", id)
		}
		if a.State == Revoked {
			return nil, nil
		}
		a.State = Revoked
		c := &change{}
		c.put(allowed+id, a.revision, a, max(a.Expires.Sub(now), 0)+keepToken)
		return c, nil
	})
}

// Describe is the evidence in words, for the log.
func (a Attested) Describe() string {
	return fmt.Sprintf("TPM %s, PCR 7 %s, PCR 11 %s, PCR 12 %s", a.EK, a.PCRs[0], a.PCRs[1], a.PCRs[2])
}
