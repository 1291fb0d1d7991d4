package kubeletd

import (
	"net/netip"
	"slices"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// Member is a node of the cluster, as the cluster knows it.
type Member struct {
	Role      config.Role
	Addresses []netip.Addr // at which the cluster has seen it, newest first
}

// members reads trustd's list; nil while that is not known.
func members(t *trustv1.TrustState) map[string]Member {
	if len(t.GetNodes()) == 0 {
		return nil
	}
	out := map[string]Member{}
	for _, n := range t.GetNodes() {
		out[n.GetName()] = Member{Role: config.Role(n.GetRole()), Addresses: nodeaddr.Parse(n.GetAddresses())}
	}
	return out
}

// controlPlanes are the names of the cluster's control planes, sorted.
func controlPlanes(all map[string]Member) []string {
	var out []string
	for name, m := range all {
		if m.Role == config.ControlPlane {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// keeper reports whether a node is the one that keeps what all control planes could write: the add-ons, whose text is of the node's image and name
// servers. The others only bring what is missing, else two images would replace one another's text for ever.
func keeper(node string, all map[string]Member) bool {
	cps := controlPlanes(all)
	return len(cps) > 0 && cps[0] == node
}
