package etcdd

import (
	"fmt"
	"maps"
	"slices"

	"github.com/bulkhead-os/bulkhead/config"
)

// spec is what of the document matters here.
type spec struct {
	Name string // of the member, and of the node
	Role config.Role
}

// State is what was read.
type State struct {
	Bootstrapped bool // the cluster's authority for etcd exists
	Volume       bool // the data folder is there
	// Want and Have are digests of what the files in the runtime folder should hold, and hold. A Want of "" means
	// that it is not there yet: trustd has not signed.
	Want, Have map[string]string
	Running    bool // the member was started
	Ready      bool // it answers, and so has a leader
	Auth       auth // zero unless Ready
	Member     figures
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
	rootClient = "etcd-root" // profile of the certificate that stays in memory
)

// Step is one change.
type Step struct {
	Op   string // "wait for", "write", "member start", "role add", "role grant", "role revoke", "user add", "user grant", "user revoke", "auth enable"
	Name string // file, role, user, or what is waited for
	Arg  string // key or role
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
	waiting := false
	for _, f := range files {
		switch {
		case have.Want[f.name] == "":
			steps = append(steps, Step{Op: "wait for", Name: "certificate " + f.profile})
			waiting = true
		case have.Want[f.name] != have.Have[f.name]:
			steps = append(steps, Step{Op: "write", Name: f.name})
		}
	}
	if have.Want[rootClient] == "" {
		steps = append(steps, Step{Op: "wait for", Name: "certificate " + rootClient})
		waiting = true
	}
	switch {
	case !have.Running && !waiting:
		steps = append(steps, Step{Op: "member start", Name: want.Name})
	case have.Running && !have.Ready:
		steps = append(steps, Step{Op: "wait for", Name: "member"})
	case have.Ready:
		steps = append(steps, planAuth(have.Auth)...)
	}
	return steps, nil
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
