package etcdd

import (
	"cmp"
	"net"
	"net/netip"
	"net/url"
	"slices"
)

// peerListen is where members are listened for: on all addresses, since the one that others use may come later than the member, or change.
// Who gets in is a matter of certificates.
func peerListen() string {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return "0.0.0.0:2380" // a kernel without IPv6
	}
	l.Close()
	return "[::]:2380"
}

// advertise returns the address at which other members reach this one; the zero value if there is none yet. own are the node's addresses with
// their subnets, in the order of the interfaces; seen are those that the cluster knows, newest first; listed is the one that etcd has now, and
// endpoint the cluster's, from the document: both may be none.
//
// What others have seen goes first: that way is known to work. Among several, and for a node that was never seen, the one in the endpoint's subnet
// counts, for that is where the document says that nodes meet; else the first. A listed address stays as long as it is no worse than others.
func advertise(own []netip.Prefix, seen []netip.Addr, listed, endpoint netip.Addr) netip.Addr {
	candidates := own
	var known []netip.Prefix
	for _, a := range seen {
		if i := slices.IndexFunc(own, func(p netip.Prefix) bool { return p.Addr() == a }); i >= 0 {
			known = append(known, own[i])
		}
	}
	if len(known) > 0 {
		candidates = known
	}
	if len(candidates) == 0 {
		return netip.Addr{}
	}
	rank := func(p netip.Prefix) int {
		switch {
		case p.IsSingleIP():
			return 3 // lent: a virtual IP, which moves, has no subnet
		case !p.Contains(endpoint):
			return 2
		case p.Addr() != listed:
			return 1
		}
		return 0
	}
	best := slices.MinFunc(candidates, func(a, b netip.Prefix) int { return cmp.Compare(rank(a), rank(b)) }) // the first of the best
	for _, p := range candidates {
		if p.Addr() == listed && rank(p) <= rank(best) {
			return listed
		}
	}
	return best.Addr()
}

// ownAddresses are those at which others could reach the node.
func ownAddresses() ([]netip.Prefix, error) {
	links, err := net.Interfaces() // in the order of their indexes
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			continue // it went away meanwhile
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err == nil && p.Addr().IsGlobalUnicast() {
				out = append(out, p)
			}
		}
	}
	return out, nil
}

// hostOf returns the address in a peer's URL; the zero value if there is none.
func hostOf(peerURL string) netip.Addr {
	u, err := url.Parse(peerURL)
	if err != nil {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(u.Hostname())
	return a.Unmap()
}

func hostsOf(peerURLs []string) []netip.Addr {
	var out []netip.Addr
	for _, u := range peerURLs {
		if a := hostOf(u); a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}

// parseAddrs drops what is no address.
func parseAddrs(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if a, err := netip.ParseAddr(t); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}
