package networkd

import (
	"strings"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
)

// conditions say whether others can reach the node. No step mends a cable or a DHCP server, and a node that wants neither is well: so they only explain
// what fails elsewhere. It is pure.
func conditions(have State) []*controlv1.Condition {
	carrier := &controlv1.Condition{Name: "carrier", Help: "bhctl get links", Explains: true}
	address := &controlv1.Condition{Name: "address", Help: "bhctl get addresses", Explains: true, Needs: []string{"networkd/carrier", "networkd/converged"}}
	var links, silent []string
	carried, physical := false, map[string]bool{}
	for _, l := range have.Links {
		if !l.Physical {
			continue
		}
		physical[string(l.Name)] = true
		links = append(links, string(l.Name))
		carried = carried || l.Carrier
	}
	switch {
	case len(links) == 0:
		carrier.Trouble = "the kernel has found no network card"
	case !carried:
		carrier.Trouble = "no network card has a link (" + strings.Join(links, ", ") + "): look at the cable and the switch"
	}
	for _, a := range have.Addresses {
		if (a.Origin == OriginStatic || a.Origin == OriginDHCP) && a.Prefix.Addr().IsGlobalUnicast() { // bridges of pods have others
			return []*controlv1.Condition{address, carrier}
		}
	}
	address.Trouble = "the node has no address at which others could reach it"
	for _, e := range have.DHCP {
		if e.Running && e.Lease == nil {
			silent = append(silent, e.Link)
		}
	}
	if len(silent) > 0 {
		address.Trouble += ": no DHCP server answers on " + strings.Join(silent, ", ")
	}
	return []*controlv1.Condition{address, carrier}
}
