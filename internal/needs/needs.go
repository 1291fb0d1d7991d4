// Package needs has the names by which conditions of one daemon speak of another's (Condition.needs in api/control/v1): daemons do not import each other, and a
// name that nobody reports is no error when the node runs, it only leads nowhere. Tests on both sides hold them against this list.
//
// It must know nothing but names.
package needs

import (
	"slices"
	"strings"
)

// names are what others may refer to, by daemon.
var names = map[string][]string{
	"etcdd":    {"certificates", "member", "quorum"},
	"kubeletd": {"api", "certificates", "containerd", "image-load", "kube-apiserver", "kubelet", "members", "workload"},
	"machined": {"clock", "config"},
	"networkd": {"address", "carrier"},
	"storaged": {"STATE.mounted", "STATE.room", "STATE.unlocked", "STATE.unlocks", "VAR.mounted", "VAR.room", "VAR.unlocked", "VAR.unlocks"},
	"trustd":   {"bootstrap", "keys"},
}

// always are what machined finds out about every daemon.
var always = []string{"answers", "certificate", "converged"}

// Of returns the names of a daemon's conditions that others may refer to, sorted. The caller owns the slice.
func Of(daemon string) []string { return slices.Clone(names[daemon]) }

// Known reports whether a reference, "<daemon>/<condition>", leads somewhere.
func Known(ref string) bool {
	daemon, name, ok := strings.Cut(ref, "/")
	list, known := names[daemon]
	return ok && known && (slices.Contains(list, name) || slices.Contains(always, name))
}
