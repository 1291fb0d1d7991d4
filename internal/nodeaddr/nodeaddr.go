// Package nodeaddr chooses the address at which other nodes reach this one. etcd's member, the kubelet and the API server must agree on it, so
// the rule is here once.
//
// It reads interfaces and routes and changes nothing.
package nodeaddr

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Routes is where the kernel lists its IPv4 routes.
const Routes = "/proc/net/route"

// Link is a network interface with its addresses and their subnets.
type Link struct {
	Name      string
	Up        bool
	Addresses []netip.Prefix
}

// Choose returns the address at which others reach this node; the zero value if there is none yet. own are the node's addresses with
// their subnets, the likeliest first (Own); seen are those that the cluster knows, newest first; listed is the one that counts now, and
// endpoint the cluster's, from the document: all but own may be none. It is pure.
//
// What others have seen goes first: that way is known to work. Among several, and for a node that was never seen, the one in the endpoint's subnet
// counts, for that is where the document says that nodes meet; else the first. A listed address stays as long as it is no worse than others.
func Choose(own []netip.Prefix, seen []netip.Addr, listed, endpoint netip.Addr) netip.Addr {
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

// Own returns the addresses at which others could reach the node, those on the interface of the default route first.
func Own() ([]netip.Prefix, error) {
	links, err := Links()
	if err != nil {
		return nil, err
	}
	routes, err := os.ReadFile(Routes)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return Usable(links, Default(string(routes))), nil
}

// Links reads the interfaces, in the order of their indexes.
func Links() ([]Link, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("read interfaces: %w", err)
	}
	var out []Link
	for _, i := range ifaces {
		l := Link{Name: i.Name, Up: i.Flags&net.FlagUp != 0}
		addrs, err := i.Addrs()
		if err != nil {
			continue // it went away meanwhile
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				l.Addresses = append(l.Addresses, netip.PrefixFrom(p.Addr().Unmap(), p.Bits()))
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// Usable returns the addresses of links that may lead to other nodes, those on the link named first before all others. Pods' links do not. It is pure.
func Usable(links []Link, first string) []netip.Prefix {
	var front, rest []netip.Prefix
	for _, l := range links {
		if !l.Up || l.Name == "lo" || l.Name == "cni0" || strings.HasPrefix(l.Name, "veth") {
			continue
		}
		for _, p := range l.Addresses {
			switch {
			case !p.Addr().IsGlobalUnicast():
			case l.Name == first:
				front = append(front, p)
			default:
				rest = append(rest, p)
			}
		}
	}
	return append(front, rest...)
}

// Default returns the interface of the best default route in the text of Routes; "" if there is none. It is pure.
func Default(routes string) string {
	best, metric := "", int64(-1)
	for _, line := range strings.Split(routes, "\n") {
		f := strings.Fields(line)
		if len(f) < 8 || f[1] != "00000000" || f[7] != "00000000" {
			continue
		}
		m, err := strconv.ParseInt(f[6], 10, 64)
		if err == nil && (metric < 0 || m < metric) {
			best, metric = f[0], m
		}
	}
	return best
}

// InURL returns the address in a URL; the zero value if its host is a name, which may mean another one tomorrow, or there is none.
func InURL(text string) netip.Addr {
	u, err := url.Parse(text)
	if err != nil {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(u.Hostname())
	return a.Unmap()
}

// Parse drops what is no address.
func Parse(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, t := range texts {
		if a, err := netip.ParseAddr(t); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}
