package apid

import (
	"fmt"
	"strings"

	"google.golang.org/grpc/metadata"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// aim says which node answers a call. The zero value is this one.
type aim struct {
	node *trustv1.ClusterNode // another node
	any  bool                 // whichever control plane answers, this node first if it is one
}

// here reports whether a daemon of this node answers, or apid itself.
func (a aim) here() bool { return a.node == nil && !a.any }

// maxNamed bounds how many nodes an error names.
const maxNamed = 16

// aimOf reads from a call's metadata which node is to answer. who may call the method already; own is this node's name, "" while it has none. It is pure.
func aimOf(c *call, md metadata.MD, own string, trust *trustv1.TrustState) (aim, error) {
	named := md.Get(peer.NodeKey)
	if c.local != "" {
		return aimOfDaemon(c, named, own, trust)
	}
	switch {
	case len(named) == 0:
		return aim{}, nil
	case len(named) > 1:
		return aim{}, errs.New(errs.Invalid, "%s is there %d times: a call is for one node; ask several with one call each", peer.NodeKey, len(named))
	}
	name := named[0]
	switch {
	case name == own && own != "":
		return aim{}, nil
	case name == "" || len(name) > 253 || strings.HasPrefix(name, "@"):
		return aim{}, errs.New(errs.Invalid, "%s: %.40q is no name of a node; leave it out to ask the node that you are connected with", peer.NodeKey, name)
	case c.bound:
		return aim{}, errs.New(errs.Invalid, "%s is tied to its connection and cannot be passed on to %q: connect with that node", c.route.name(), name)
	case c.who.name == "":
		return aim{}, errStranger // what anybody may ask of this node is not asked of others for them
	case len(md.Get(peer.HopKey)) > 0:
		return aim{}, errs.New(errs.Precondition, "this is node %q, and the call is for %q: what another node passed on is not passed on again", own, name)
	case c.who.node != "":
		return aim{}, errs.New(errs.Denied, "nothing is passed on for nodes; %q has to connect with %q", c.who.name, name)
	case trust.GetNodeRole() != controlPlane && trust.GetNodeRole() != "":
		return aim{}, errs.New(errs.Denied, "%q is a %s and passes no calls on; ask a control plane: %s", own, trust.GetNodeRole(), controlPlanes(trust))
	}
	return lookup(name, own, trust)
}

func lookup(name, own string, trust *trustv1.TrustState) (aim, error) {
	var names []string
	for _, n := range trust.GetNodes() {
		if n.GetName() != name {
			names = append(names, n.GetName())
			continue
		}
		if len(n.GetAddresses()) == 0 {
			return aim{}, errs.New(errs.Unavailable, "no address of node %q is known yet: it has not called this cluster since it joined", name)
		}
		return aim{node: n}, nil
	}
	if len(names) == 0 && own != "" {
		names = []string{own}
	}
	if len(names) > maxNamed {
		names = append(names[:maxNamed], fmt.Sprintf("and %d more", len(names)-maxNamed))
	}
	return aim{}, errs.New(errs.NotFound, "no node %q; there are: %s", name, strings.Join(names, ", "))
}

// controlPlanes names them with an address each, for people.
func controlPlanes(trust *trustv1.TrustState) string {
	var out []string
	for _, n := range trust.GetNodes() {
		if n.GetRole() == controlPlane && len(out) < maxNamed {
			text := n.GetName()
			if a := n.GetAddresses(); len(a) > 0 {
				text += " (" + a[0] + ")"
			}
			out = append(out, text)
		}
	}
	if len(out) == 0 {
		return "none is known here yet"
	}
	return strings.Join(out, ", ")
}

// mayName are the methods for which a daemon of a control plane may name the node that is to answer.
var mayName = map[string]string{
	machinev1.Trial_Witness_FullMethodName: uid.Etcdd.Name(), // whether a version on trial can be called is seen from another node only
}

// aimOfDaemon is for daemons of this node, which may ask a control plane, and for the methods of mayName another node.
func aimOfDaemon(c *call, named []string, own string, trust *trustv1.TrustState) (aim, error) {
	if trust.GetNodeName() == "" {
		return aim{}, errs.New(errs.Unavailable, "this node has no place in a cluster yet")
	}
	if len(named) == 1 && named[0] != peer.ControlPlanes && mayName[c.route.name()] == c.local && trust.GetNodeRole() == controlPlane {
		a, err := lookup(named[0], own, trust)
		if err != nil && named[0] == own { // nobody has seen its address, so nobody else is there
			return aim{}, nil
		}
		return a, err // itself too: over the network, as others would
	}
	if len(named) != 1 || named[0] != peer.ControlPlanes {
		return aim{}, errs.New(errs.Invalid, "%s calls through apid only with %s: %s", c.local, peer.NodeKey, peer.ControlPlanes)
	}
	return aim{any: true}, nil
}
