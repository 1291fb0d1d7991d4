// Package roster is the cluster's list of nodes, join tokens and revocations: what they look like in etcd, and what may become of them.
//
// It talks to store.v1 and knows no key but public ones: tokens' secrets are derived from a key that trustd keeps.
package roster

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Prefix is where all of it is in etcd.
const Prefix = "/bulkhead/trust/"

// Below Prefix. Nodes are named by their name, tokens and what is revoked by their id, those who were removed by the digest of their key.
const (
	nodes   = Prefix + "nodes/"
	tokens  = Prefix + "tokens/"
	revoked = Prefix + "revoked/"
	removed = Prefix + "removed/"
	allowed = Prefix + "attest/" // by their id
)

// Roles that nodes have.
const (
	ControlPlane = "controlplane"
	Worker       = "worker"
)

// States of a token.
const (
	Unused  = "unused"
	Used    = "used"
	Revoked = "revoked"
)

// MaxAddresses is how many addresses of a node are kept, the newest first.
const MaxAddresses = 16

// Node is a member.
type Node struct {
	Name      string    `json:"-"`
	Role      string    `json:"role"`
	Key       string    `json:"key"`       // join.Digest of PublicKey
	PublicKey []byte    `json:"publicKey"` // SubjectPublicKeyInfo
	Addresses []string  `json:"addresses"` // that it has called from, newest first; of a control plane also those that it says of itself
	Joined    time.Time `json:"joined"`
	Token     string    `json:"token,omitempty"` // id; "" for the first node
	// Attested is what its TPM showed, if it joined by that; nil otherwise.
	Attested *Attested `json:"attested,omitempty"`
	// Instance is the run of its trustd that called last; Former are those before it, the newest first.
	Instance string   `json:"instance,omitempty"`
	Former   []string `json:"former,omitempty"`

	revision uint64
}

// Token is a join token, without its secret.
type Token struct {
	ID      string    `json:"-"`
	Role    string    `json:"role"`
	Name    string    `json:"name,omitempty"`
	Expires time.Time `json:"expires"`
	MadeBy  string    `json:"made_by"`
	State   string    `json:"state"`
	UsedBy  string    `json:"used_by,omitempty"`
	Key     string    `json:"key,omitempty"` // of who used it

	revision uint64
}

// note is what is kept of a revocation or removal.
type note struct {
	By   string    `json:"by"`
	At   time.Time `json:"at"`
	Name string    `json:"name,omitempty"`
}

// State is all of it at one moment. It must not be changed.
type State struct {
	Nodes     map[string]Node
	Tokens    map[string]Token
	Allowed   map[string]Allowance
	Revoked   []string                // in order
	Removed   map[string]string       // names of nodes that were removed, by the digest of their key
	Rotation  *Rotation               // the newest one; nil if there never was one
	Confirmed map[string]Confirmation // by the node's name
	Wants     map[string]Want         // by the control plane's name, as Sealed
	Sealed    map[string]Sealed
	// Strange are keys that could not be read; they count as not there.
	Strange []string
}

// parse makes sense of entries. One that makes none does not spoil the others.
func parse(entries map[string]*storev1.Entry) *State {
	s := &State{Nodes: map[string]Node{}, Tokens: map[string]Token{}, Allowed: map[string]Allowance{}, Removed: map[string]string{}, Confirmed: map[string]Confirmation{}, Wants: map[string]Want{}, Sealed: map[string]Sealed{}}
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		e := entries[key]
		var err error
		if name, ok := strings.CutPrefix(key, nodes); ok {
			n := Node{Name: name, revision: e.GetRevision()}
			if err = json.Unmarshal(e.GetValue(), &n); err == nil {
				s.Nodes[name] = n
			}
		} else if id, ok := strings.CutPrefix(key, tokens); ok {
			t := Token{ID: id, revision: e.GetRevision()}
			if err = json.Unmarshal(e.GetValue(), &t); err == nil {
				s.Tokens[id] = t
			}
		} else if id, ok := strings.CutPrefix(key, allowed); ok {
			a := Allowance{ID: id, revision: e.GetRevision()}
			if err = json.Unmarshal(e.GetValue(), &a); err == nil {
				s.Allowed[id] = a
			}
		} else if id, ok := strings.CutPrefix(key, revoked); ok {
			s.Revoked = append(s.Revoked, id)
		} else if digest, ok := strings.CutPrefix(key, removed); ok {
			var was note
			err = json.Unmarshal(e.GetValue(), &was)
			s.Removed[digest] = was.Name // void also if it cannot be read
		} else {
			err = s.parseRotation(key, e)
		}
		if err != nil {
			s.Strange = append(s.Strange, fmt.Sprintf("%s: %v", key, err))
		}
	}
	return s
}

// With returns the state with one more node, or another one of its name.
func (s *State) With(n Node) *State {
	c := *s
	c.Nodes = maps.Clone(s.Nodes)
	c.Nodes[n.Name] = n
	return &c
}

// Cluster returns the nodes as other nodes need to know them, by name. An address that several of them have (of a network that each machine has
// for itself, or behind the same gateway) leads nowhere for sure: it is left out where a node has another one.
func (s *State) Cluster() []*trustv1.ClusterNode {
	count := map[string]int{}
	for _, n := range s.Nodes {
		for _, a := range n.Addresses {
			count[a]++
		}
	}
	var out []*trustv1.ClusterNode
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		n := s.Nodes[name]
		own := slices.DeleteFunc(slices.Clone(n.Addresses), func(a string) bool { return count[a] > 1 })
		if len(own) == 0 {
			own = n.Addresses
		}
		out = append(out, &trustv1.ClusterNode{Name: name, Role: n.Role, Addresses: own, Key: n.Key})
	}
	return out
}

// Address reads an IP address from outside. One that means nothing to other nodes (loopback, link-local) is "", as is none.
func Address(text string) (string, error) {
	a, err := netip.ParseAddr(text)
	if err != nil {
		return "", err
	}
	if a = a.Unmap().WithZone(""); a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.IsMulticast() {
		return "", nil
	}
	return a.String(), nil
}

// maxFormer is how many runs of a node's trustd are kept.
const maxFormer = 8

// Meet returns the node as it is after a run of its trustd called from an address ("": one that says nothing), and whether that changed it. A run that was
// there before the present one is another machine with the same key: Denied.
func (n Node) Meet(instance string, addresses ...string) (Node, bool, error) {
	if slices.Contains(n.Former, instance) {
		return n, false, errs.New(errs.Denied, "another machine runs with the key of node %q (last seen at %s): a copied disk? Switch one of them off; to let this one in again, remove the node, reset the machine and let it join anew", n.Name, strings.Join(n.Addresses, ", "))
	}
	met := n.Instance != instance
	if met {
		if n.Instance != "" {
			n.Former = slices.Concat([]string{n.Instance}, n.Former)
			n.Former = n.Former[:min(len(n.Former), maxFormer)]
		}
		n.Instance = instance
	}
	n, seen := n.See(addresses...)
	return n, met || seen, nil
}

// See returns the node with addresses added that it has, and whether that changed it. Those that are there stay where they are; new ones go before them; the oldest go away.
func (n Node) See(addresses ...string) (Node, bool) {
	var fresh []string
	for _, a := range addresses {
		if a != "" && !slices.Contains(n.Addresses, a) && !slices.Contains(fresh, a) {
			fresh = append(fresh, a)
		}
	}
	if len(fresh) == 0 {
		return n, false
	}
	n.Addresses = slices.Concat(fresh, n.Addresses)
	n.Addresses = n.Addresses[:min(len(n.Addresses), MaxAddresses)]
	return n, true
}
