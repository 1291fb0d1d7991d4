// Package rolling changes a cluster's nodes one after the other: it empties one, has it restart, and waits until it is as it should be.
//
// All that is known of a change is one record in etcd, and each of its changes is fenced by the record's revision; so any control plane can carry it out, and another
// one goes on when that one goes away. The nodes are not called: in answer to its report (cluster.v1.Registry) a node hears what the record says at that moment, and which of
// its boots is meant. A word that comes late, or twice, restarts nothing.
//
// plan.go decides and is pure; coordinator.go acts; server.go takes orders. The package may use etcd below its prefix. It must not know how a node restarts, nor what a drained
// node had on it.
package rolling

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

// Where it is in etcd.
const (
	prefix = "/bulkhead/rolling/"
	// Current is the key of the record.
	Current  = prefix + "current"
	leaseKey = prefix + "lease"
)

// What a change is.
const (
	reboot  = "reboot"
	upgrade = "upgrade"
)

// phase is where the whole change is.
type phase string

const (
	running  phase = "running"
	halted   phase = "halted"   // a person must act
	aborting phase = "aborting" // a node restarts still
	aborted  phase = "aborted"
	done     phase = "done"
)

// step is where one node is.
type step string

const (
	pending    step = "pending"
	draining   step = "draining"
	restarting step = "restarting" // it is told to
	settling   step = "settling"   // another boot of it has reported
	finished   step = "done"
	failed     step = "failed"
	skipped    step = "skipped" // it is not in the cluster any more, or needs nothing
)

// record is the change, as JSON. Times are by clocks of control planes and for people: nothing is decided by them.
type record struct {
	ID           string        `json:"id"`
	Kind         string        `json:"kind"`
	Version      string        `json:"version,omitempty"`
	By           string        `json:"by"`
	DrainTimeout time.Duration `json:"drain_timeout"`
	NodeTimeout  time.Duration `json:"node_timeout"`
	Force        bool          `json:"force,omitempty"`
	Phase        phase         `json:"phase"`
	Why          string        `json:"why,omitempty"`
	Resumed      int           `json:"resumed,omitempty"` // how often
	Began        time.Time     `json:"began"`
	Ended        time.Time     `json:"ended,omitzero"`
	Nodes        []turn        `json:"nodes"`
}

// turn is one node's part of it.
type turn struct {
	Name       string    `json:"name"`
	Role       string    `json:"role"`
	Step       step      `json:"step"`
	Why        string    `json:"why,omitempty"`
	Boot       string    `json:"boot,omitempty"` // that is to end
	Draining   time.Time `json:"draining,omitzero"`
	Restarting time.Time `json:"restarting,omitzero"`
	Settling   time.Time `json:"settling,omitzero"`
	Ended      time.Time `json:"ended,omitzero"`
}

func decode(value []byte) (record, error) {
	var r record
	if len(value) == 0 {
		return r, nil
	}
	if err := json.Unmarshal(value, &r); err != nil {
		return r, fmt.Errorf("record of the rolling change: %w", err)
	}
	return r, nil
}

func (r record) clone() record {
	r.Nodes = slices.Clone(r.Nodes)
	return r
}

// active reports whether something is to be done for it.
func (r record) active() bool { return r.Phase == running || r.Phase == aborting }

// over reports whether another one may begin.
func (r record) over() bool { return !r.active() && r.Phase != halted }

// current is the index of the node whose turn it is; -1 if all had theirs.
func (r record) current() int {
	return slices.IndexFunc(r.Nodes, func(t turn) bool { return t.Step != finished && t.Step != skipped })
}

// left is how many nodes are not done.
func (r record) left() int {
	n := 0
	for _, t := range r.Nodes {
		if t.Step != finished && t.Step != skipped {
			n++
		}
	}
	return n
}

// String names the change for people.
func (r record) String() string {
	what := "rolling " + r.Kind
	if r.Version != "" {
		what += " to " + r.Version
	}
	return fmt.Sprintf("%s %s, ordered by %s", what, r.ID, r.By)
}

// OrderFor returns what the record in value tells a node that reports: nil if nothing, and whether it should ask again soon: those whose turn it is, and comes next; all would be many
// writes in a large cluster. value may be empty; a record that cannot be
// read, which is of a later version, orders nothing.
func OrderFor(value []byte, n *clusterv1.Node) (order *clusterv1.Order, soon bool) {
	r, err := decode(value)
	if err != nil || !r.active() {
		return nil, false
	}
	i := r.current()
	if i < 0 {
		return nil, false
	}
	if t := r.Nodes[i]; t.Name == n.GetName() && t.Step == restarting && t.Boot != "" && t.Boot == n.GetBootId() {
		order = &clusterv1.Order{Id: r.ID, BootId: t.Boot, Text: "restart: " + r.String()}
	}
	return order, slices.ContainsFunc(r.Nodes[i:min(i+2, len(r.Nodes))], func(t turn) bool { return t.Name == n.GetName() })
}

// begin makes the record of a new change. nodes are those of the registry that it is about. Control planes come first: no kubelet may be newer than an API server
// (Kubernetes' version skew policy), and no node may tell the registry what its etcdd does not know yet. Of them leader, if it is one, comes last: it is asked most, and
// leadership moves once instead of with each.
func begin(r record, nodes []*clusterv1.Node, leader string, now time.Time) record {
	r.ID, r.Phase, r.Began = strings.ToLower(rand.Text()[:8]), running, now
	rank := func(n *clusterv1.Node) int {
		switch {
		case n.GetRole() != "controlplane":
			return 2
		case n.GetName() == leader:
			return 1
		}
		return 0
	}
	nodes = slices.Clone(nodes)
	slices.SortFunc(nodes, func(a, b *clusterv1.Node) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	for _, n := range nodes {
		r.Nodes = append(r.Nodes, turn{Name: n.GetName(), Role: n.GetRole(), Step: pending})
	}
	return r
}
