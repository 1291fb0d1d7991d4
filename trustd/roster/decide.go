package roster

import (
	"fmt"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Applicant is who wants to join; that it knows the token's secret has been checked.
type Applicant struct {
	Token     string // id
	Name      string
	Key       string // digest
	PublicKey []byte
	Address   string // that it calls from; "" if that says nothing
}

// Admit decides whether somebody may join, and returns the node and the token as they then are. changed is false for one who has joined already, and asks again since the
// answer was lost. It is pure.
func Admit(s *State, a Applicant, now time.Time) (n Node, t Token, changed bool, err error) {
	t, ok := s.Tokens[a.Token]
	switch {
	case !ok:
		return n, t, false, errs.New(errs.Unauthenticated, "join token %s: the cluster does not know it any more; make a new one", a.Token)
	case t.State == Revoked:
		return n, t, false, errs.New(errs.Unauthenticated, "join token %s was revoked; make a new one", a.Token)
	case !now.Before(t.Expires):
		return n, t, false, errs.New(errs.Unauthenticated, "join token %s expired at %s; it is %s here. Make a new one", a.Token, t.Expires.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	have, taken := s.Nodes[a.Name]
	if t.State != Unused {
		if t.Key != a.Key || t.UsedBy != a.Name {
			return n, t, false, errs.New(errs.Unauthenticated, "join token %s was used by node %q; each is good for one node: make a new one", a.Token, t.UsedBy)
		}
		if !taken || have.Key != a.Key {
			return n, t, false, errs.New(errs.Unauthenticated, "join token %s was used by node %q, which was removed since; make a new one", a.Token, t.UsedBy)
		}
		return have, t, false, nil
	}
	_, gone := s.Removed[a.Key]
	switch {
	case t.Name != "" && t.Name != a.Name:
		return n, t, false, errs.New(errs.Denied, "join token %s is for a node called %q, not %q", a.Token, t.Name, a.Name)
	case taken:
		return n, t, false, errs.New(errs.Exists, "the cluster has a node called %q, with another key; take another name, or remove that node first", a.Name)
	case gone:
		return n, t, false, errs.New(errs.Denied, "a node with this key was removed from the cluster; reset the machine, so that it makes another one")
	}
	for _, o := range s.Nodes {
		if o.Key == a.Key {
			return n, t, false, errs.New(errs.Exists, "this machine's key is node %q of the cluster already", o.Name)
		}
	}
	t.State, t.UsedBy, t.Key = Used, a.Name, a.Key
	n = Node{Name: a.Name, Role: t.Role, Key: a.Key, PublicKey: a.PublicKey, Joined: now, Token: a.Token}
	n, _ = n.See(a.Address)
	return n, t, true, nil
}

// Own decides what a control plane's own record must become: the record to write, those to delete (its own under an older name), or "" as name if all is well. It is pure.
func Own(s *State, me Node, instance string, addresses []string) (write Node, drop []Node, err error) {
	have, ok := s.Nodes[me.Name]
	_, gone := s.Removed[me.Key]
	switch {
	case ok && have.Key != me.Key:
		return Node{}, nil, fmt.Errorf("the cluster has another node called %q, with another key: remove it, or give this one another name", me.Name)
	case !ok && gone:
		return Node{}, nil, fmt.Errorf("node %q was removed from the cluster; reset the machine before it joins again", me.Name)
	}
	for _, n := range s.Nodes {
		if n.Key == me.Key && n.Name != me.Name {
			drop = append(drop, n)
			me.Joined, me.Token = n.Joined, n.Token
		}
	}
	if ok {
		me = have
	}
	write, changed, err := me.Meet(instance, addresses...)
	if err != nil {
		return Node{}, nil, err
	}
	if ok && !changed && len(drop) == 0 {
		return Node{}, nil, nil
	}
	return write, drop, nil
}
