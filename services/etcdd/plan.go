package etcdd

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// spec is what of the document matters here.
type spec struct {
	Name string // of the member, and of the node
	Role config.Role
	// Endpoint is the address in the cluster's endpoint; the zero value if that is a name, or none.
	Endpoint  netip.Addr
	Snapshots schedule
}

// State is what was read.
type State struct {
	Bootstrapped bool // the cluster's authority for etcd exists
	Volume       bool // the data folder is there
	// Want and Have are digests of what the files in the runtime folder should hold, and hold. A Want of "" means
	// that it is not there yet: trustd has not signed.
	Want, Have map[string]string

	Phase phase
	Data  bool // the folder holds a member, from an earlier start
	Nodes map[string]place
	Own   []netip.Prefix // the node's addresses
	Port  string         // on which members are listened for
	// Certified are the addresses in the certificate that other members get to see.
	Certified []netip.Addr

	Running bool // the member was started
	// Loaded is the digest of the authorities that it was started with; Turn is set when it was started anew for others, and the next member waits for this one.
	Loaded  string
	Turn    bool
	Held    bool // it was started anew on purpose a moment ago: calls wait until it answers
	ID      string
	Listed  []string // its URLs, as etcd has them; nil while they are not known
	Learner bool     // it has no vote yet, and answers nobody
	Ready   bool     // it answers, and so has a leader
	Auth    auth     // zero unless Ready
	Member  figures

	Snapshots string // what is wrong with them; "" if nothing is. No step mends it

	// While the member is not ready: how many members vote, as far as it knows, and which of the others do not answer.
	Voters int
	Silent []string
}

// place is what the cluster knows of a node.
type place struct {
	ControlPlane bool
	Seen         []netip.Addr // newest first
}

// auth is who may do what inside etcd.
type auth struct {
	Enabled bool
	Users   map[string][]string // user: its roles
	Roles   map[string][]grant  // role: its grants
}

// grant allows reading and writing one key, or all keys that begin with it.
type grant struct {
	Key    string
	Prefix bool
}

func (g grant) String() string {
	if g.Prefix {
		return g.Key + "*"
	}
	return g.Key
}

// A user of etcd is the common name of a client certificate; none has a password.
type user struct {
	name   string
	grants []grant // none: root, who may do everything
}

// users is the whole table. Kubernetes' and Bulkhead's keys are kept apart by it.
var users = []user{
	{name: "root"}, // etcdd itself: these steps, status and snapshots
	{name: "kube-apiserver", grants: []grant{{"/registry/", true}, {compactKey, false}}},
	{name: "bulkhead", grants: []grant{{"/bulkhead/", true}}},
}

// files are the files in the runtime folder and the profile of the certificate in each; the authority's has none.
var files = []struct{ name, profile string }{
	{caFile, ""}, {serverFile, "etcd-server"}, {peerFile, "etcd-peer"},
}

const (
	caFile     = "ca.pem"
	serverFile = "server.pem" // certificate and key in one file, so that a new pair replaces the old one whole
	peerFile   = "peer.pem"

	peerProfile = "etcd-peer"
	rootClient  = "etcd-root"            // these two stay in memory
	ownClient   = "etcd-client-bulkhead" // for the store and the registry: etcd itself keeps them from Kubernetes' keys
)

// clients are the profiles of certificates that etcdd itself shows to the member.
var clients = []string{rootClient, ownClient}

// Step is one change.
type Step struct {
	Op   string // "wait for", "write", "certify", "member …", "role …", "user …", "auth enable"
	Name string // file, address, member, its id, role, user, or what is waited for
	Arg  string // URL, key or role
}

func (s Step) String() string {
	out := s.Op
	for _, a := range []string{s.Name, s.Arg} {
		if a != "" {
			out += " " + a
		}
	}
	return out
}

// plan returns the steps that lead from have to want. Equal inputs give equal steps. What cannot be done yet is a step "wait for".
func plan(want spec, have State) ([]Step, error) {
	if want.Role != config.ControlPlane && !have.Running {
		return nil, nil // a worker has no member
	}
	if want.Role != config.ControlPlane {
		return nil, fmt.Errorf("machine.role: this node has an etcd member, and cannot become a %q yet", want.Role)
	}
	var steps []Step
	if !have.Bootstrapped {
		steps = append(steps, Step{Op: "wait for", Name: "bootstrap"})
	}
	if !have.Volume {
		steps = append(steps, Step{Op: "wait for", Name: "volume VAR"})
	}
	if len(steps) > 0 {
		return steps, nil
	}
	if s, gone := planGone(want, have); gone {
		return []Step{s}, nil
	}
	steps, waiting := planFiles(have)
	addr := nodeaddr.Choose(have.Own, have.Nodes[want.Name].Seen, listed(have), want.Endpoint)
	if addr.IsValid() && !slices.Contains(have.Certified, addr) {
		steps = append(steps, Step{Op: "certify", Name: addr.String(), Arg: want.Name})
		waiting = true
	}
	switch {
	case !have.Running && !waiting:
		steps = append(steps, planStart(want, have, addr))
	case !have.Running:
	case have.Learner && have.Phase == inCluster:
		steps = append(steps, Step{Op: "member promote", Name: have.ID})
	case !have.Ready && have.Held: // it is on its way back, and calls wait for it
	case !have.Ready:
		steps = append(steps, Step{Op: "wait for", Name: "member"})
	case have.Phase == leaving:
		steps = append(steps, Step{Op: "member leave"})
	case !waiting && have.Loaded != have.Want[caFile] && have.Turn: // it has others again: this turn is over, and another one begins
		steps = append(steps, Step{Op: "member reloaded"})
	case !waiting && have.Loaded != have.Want[caFile]:
		steps = append(steps, Step{Op: "member reload", Name: want.Name})
	default:
		if have.Turn {
			steps = append(steps, Step{Op: "member reloaded"})
		}
		if u := peerURL(addr, have.Port); addr.IsValid() && !waiting && !slices.Equal(have.Listed, []string{u}) {
			steps = append(steps, Step{Op: "member update", Name: u})
		}
		steps = append(steps, planAuth(have.Auth)...)
	}
	return steps, nil
}

// planGone is for a member that is on its way out and does not run, or that a snapshot replaces.
func planGone(want spec, have State) (Step, bool) {
	switch {
	case have.Running && (have.Phase == restoring || have.Phase == abandoning):
		return Step{Op: "member stop"}, true
	case have.Phase == abandoning:
		return Step{Op: "member forget"}, true
	case have.Phase == restoring:
		// Its address is none of the snapshot's. On loopback nobody else finds it before it says where it is.
		return Step{Op: "member restore", Name: want.Name, Arg: peerURL(loopback, have.Port)}, true
	case have.Running:
	case have.Phase == leaving && !have.Data:
		return Step{Op: "member forget"}, true
	case have.Phase == left:
		return Step{Op: "wait for", Name: "order to rejoin, since it left"}, true
	case have.Phase == removed:
		return Step{Op: "wait for", Name: "order to rejoin, since it was removed"}, true
	}
	return Step{}, false
}

// planFiles writes the certificates, and says whether one is missing.
func planFiles(have State) (steps []Step, waiting bool) {
	for _, f := range files {
		switch {
		case have.Want[f.name] == "":
			steps = append(steps, Step{Op: "wait for", Name: "certificate " + f.profile})
			waiting = true
		case have.Want[f.name] != have.Have[f.name]:
			steps = append(steps, Step{Op: "write", Name: f.name})
		}
	}
	for _, c := range clients {
		if have.Want[c] == "" {
			steps = append(steps, Step{Op: "wait for", Name: "certificate " + c})
			waiting = true
		}
	}
	return steps, waiting
}

// planStart: a folder with a member in it is started as it is, whatever the cluster looks like by now. One without is a new member of the
// cluster that others have; only a node that knows of no other control plane makes one of its own.
func planStart(want spec, have State, addr netip.Addr) Step {
	others := false
	for name, p := range have.Nodes {
		others = others || p.ControlPlane && name != want.Name
	}
	switch {
	case have.Data:
		return Step{Op: "member start", Name: want.Name}
	case others && !addr.IsValid():
		return Step{Op: "wait for", Name: "address"}
	case others:
		return Step{Op: "member join", Name: want.Name, Arg: peerURL(addr, have.Port)}
	case addr.IsValid():
		return Step{Op: "member found", Name: want.Name, Arg: peerURL(addr, have.Port)}
	}
	// Nobody could join it; as soon as there is an address it gets that.
	return Step{Op: "member found", Name: want.Name, Arg: peerURL(loopback, have.Port)}
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// listed is the address that etcd has of this member.
func listed(have State) netip.Addr {
	if hosts := hostsOf(have.Listed); len(hosts) > 0 {
		return hosts[0]
	}
	return netip.Addr{}
}

func peerURL(a netip.Addr, port string) string {
	return "https://" + net.JoinHostPort(a.String(), port)
}

// planAuth makes the users and roles those of the table, and no others, and turns the checks on last.
func planAuth(have auth) []Step {
	var steps []Step
	known := map[string]bool{}
	for _, u := range users {
		known[u.name] = true
		has, there := have.Users[u.name]
		if len(u.grants) > 0 {
			steps = append(steps, planRole(u, have)...)
		}
		if !there {
			steps = append(steps, Step{Op: "user add", Name: u.name})
		}
		if !slices.Contains(has, u.name) {
			steps = append(steps, Step{Op: "user grant", Name: u.name, Arg: u.name})
		}
		for _, r := range has {
			if r != u.name {
				steps = append(steps, Step{Op: "user revoke", Name: u.name, Arg: r})
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.Users)) {
		if !known[name] {
			steps = append(steps, Step{Op: "user delete", Name: name})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have.Roles)) {
		if !known[name] {
			steps = append(steps, Step{Op: "role delete", Name: name})
		}
	}
	if !have.Enabled {
		steps = append(steps, Step{Op: "auth enable"})
	}
	return steps
}

func planRole(u user, have auth) []Step {
	var steps []Step
	has, there := have.Roles[u.name]
	if !there {
		steps = append(steps, Step{Op: "role add", Name: u.name})
	}
	for _, g := range u.grants {
		if !slices.Contains(has, g) {
			steps = append(steps, Step{Op: "role grant", Name: u.name, Arg: g.String()})
		}
	}
	for _, g := range has {
		if !slices.Contains(u.grants, g) {
			steps = append(steps, Step{Op: "role revoke", Name: u.name, Arg: g.String()})
		}
	}
	return steps
}

// grantOf is the inverse of grant.String.
func grantOf(arg string) grant {
	if n := len(arg) - 1; n >= 0 && arg[n] == '*' {
		return grant{arg[:n], true}
	}
	return grant{arg, false}
}
