package networkd

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// State is the part of Linux that networkd is about, as it was read. Slices are sorted, so that equal kernels give equal states.
type State struct {
	Links     []Link
	Addresses []Address
	Routes    []Route
	// DHCP has one entry for each link with a client or a lease.
	DHCP []dhcp.Entry
	// Files are those of networkd's runtime folder that others read, by name.
	Files map[string]string
	// Tables has the firewall, one for each family that the kernel knows.
	Tables []Table
	// NoFirewall says why a family has no table; "" if all have one. It does not keep the node from being reached, because nobody could
	// repair it then, but it is never converged.
	NoFirewall string
	// Masquerade has the rules with which pods leave the node, one table for each family that the kernel knows.
	Masquerade []Table
	// Pods is what kubeletd has asked for; nil: it has not spoken to this process yet.
	Pods *Pods
	// Young is true as long as a spec may be on its way: see Config.Grace.
	Young bool
}

// Link is one network interface.
type Link struct {
	Name     config.LinkName
	Index    int
	Kind     string // "device" if it is no virtual one
	Hardware string // "" if it has none
	MTU      int    // bytes
	Up       bool
	Carrier  bool
	Loopback bool
	Physical bool // Ethernet hardware, and no member of a bridge or bond
	// Promote says that a secondary address outlives the primary one of its subnet. Without it, renumbering cuts the link off.
	Promote                  bool
	ReceivedBytes, SentBytes uint64
}

// Origin says who made an address or a route. The kernel keeps it: it is a number that networkd gives with each.
type Origin string

const (
	OriginStatic Origin = "static"
	OriginDHCP   Origin = "dhcp"
	OriginPod    Origin = "pod" // to the pods of another node
	// OriginVirtual is an address of the cluster that this node has for some seconds: Hold says it again and again.
	OriginVirtual Origin = "virtual"
	OriginKernel  Origin = "kernel"
	OriginOther   Origin = "other"
)

// own reports whether it is networkd's to remove.
func (o Origin) own() bool { return o == OriginStatic || o == OriginDHCP || o == OriginPod }

// Address is one address of a link.
type Address struct {
	Link   config.LinkName
	Prefix netip.Prefix
	Origin Origin
}

// Route is one route of the main table. An invalid Via means on link.
type Route struct {
	To     netip.Prefix
	Via    netip.Addr
	Link   config.LinkName
	Metric int
	Origin Origin
}

// Op is what a step does.
type Op string

const (
	opLinkUp      Op = "link up"
	opLinkMTU     Op = "link mtu"
	opLinkPromote Op = "link promote"
	opLinkWait    Op = "link wait"
	opAddrAdd     Op = "addr add"
	opAddrDel     Op = "addr del"
	opAddrHold    Op = "addr hold"
	opAddrTell    Op = "addr announce"
	opRouteAdd    Op = "route add"
	opRouteDel    Op = "route del"
	opDHCPStart   Op = "dhcp start"
	opDHCPStop    Op = "dhcp stop"
	opFileWrite   Op = "file write"
	opChainBuild  Op = "firewall build"
	opJumpAdd     Op = "firewall enter"
	opJumpDel     Op = "firewall leave"
	opChainDel    Op = "firewall delete"

	opFirewallWait Op = "firewall read"
)

// Step is one change. Which fields count follows from Op; String is what people see.
type Step struct {
	Op      Op
	Link    config.LinkName // link, dhcp
	MTU     int             // link mtu
	Until   time.Duration   // addr hold; of CLOCK_BOOTTIME
	Address Address
	Route   Route
	Family  Family   // firewall
	Part    Part     // firewall; the zero value is Ingress
	Name    string   // chain or file
	Rules   []string // firewall build, firewall enter (which builds too)
	Content string   // file write; hostname for dhcp start; why for the waits
}

func (s Step) String() string {
	switch s.Op {
	case opLinkMTU:
		return fmt.Sprintf("link set mtu %d dev %s", s.MTU, s.Link)
	case opLinkUp:
		return fmt.Sprintf("link set up dev %s", s.Link)
	case opAddrAdd, opAddrDel, opAddrHold, opAddrTell:
		return fmt.Sprintf("%s %s dev %s", s.Op, s.Address.Prefix, s.Address.Link)
	case opRouteAdd, opRouteDel:
		return fmt.Sprintf("%s %s", s.Op, s.Route)
	case opFileWrite:
		return fmt.Sprintf("%s %s", s.Op, s.Name)
	case opFirewallWait:
		return string(s.Op)
	case opChainBuild, opJumpAdd, opJumpDel, opChainDel:
		return fmt.Sprintf("%s %s %s", s.Part.words(s.Op), s.Family, s.Name)
	}
	return fmt.Sprintf("%s dev %s", s.Op, s.Link)
}

func (r Route) String() string {
	var b strings.Builder
	if r.To.Bits() == 0 {
		b.WriteString("default")
	} else {
		b.WriteString(r.To.String())
	}
	if r.Via.IsValid() {
		b.WriteString(" via " + r.Via.String())
	}
	b.WriteString(" dev " + string(r.Link))
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	return b.String()
}

const (
	dhcpMetric  = 1024 // below what a document gives (0): static routes win
	ipv6Default = 1024 // what the kernel makes of metric 0
	maxMTU      = 65535
)

// target is what a spec means on the links there are, with the leases there are.
type target struct {
	managed   []Link
	addresses []Address
	routes    []Route
	files     map[string]string
	// waiting has a sentence for each route to other nodes' pods that cannot be.
	waiting []string
}

// plan returns the steps that lead from have to want. Equal inputs give equal steps. It adds before it deletes: a link being
// renumbered is never bare. It touches only what carries networkd's mark, and links that the spec names.
func plan(want Spec, have State) []Step {
	var steps []Step
	add := func(s ...Step) { steps = append(steps, s...) }
	t := resolve(want, have)
	add(planLinks(want, have, t)...)
	add(planDHCP(want, have, t)...)
	// Before addresses: no IPv4 packet comes in that the firewall has not seen. After links and DHCP: these then work meanwhile.
	now, later := planFirewall(want, have, t.managed)
	add(now...)
	now, left := planPods(want, have)
	add(now...)
	for _, a := range t.addresses {
		if !slices.ContainsFunc(have.Addresses, func(h Address) bool { return h.Link == a.Link && h.Prefix == a.Prefix }) {
			add(Step{Op: opAddrAdd, Address: a})
		}
	}
	there, wanted := routeSet(have.Routes), routeSet(t.routes)
	for _, r := range t.routes {
		if !there[r.bare()] {
			add(Step{Op: opRouteAdd, Route: r})
		}
	}
	for _, name := range []string{fileHostname, fileHosts, fileResolver} {
		if content, ok := have.Files[name]; !ok || content != t.files[name] {
			add(Step{Op: opFileWrite, Name: name, Content: t.files[name]})
		}
	}
	for _, r := range have.Routes {
		if r.Origin.own() && !wanted[r.bare()] {
			add(Step{Op: opRouteDel, Route: r})
		}
	}
	for _, a := range have.Addresses {
		if a.Origin.own() && !slices.ContainsFunc(t.addresses, func(w Address) bool { return w.Link == a.Link && w.Prefix == a.Prefix }) {
			add(Step{Op: opAddrDel, Address: a})
		}
	}
	add(later...) // nothing waits for it
	add(left...)
	return steps
}

// planBare is the plan as long as there is no spec.
func planBare(hostname string, have State) []Step {
	steps := plan(bare(hostname), have)
	if have.Young {
		early := []Op{opLinkUp, opLinkPromote, opDHCPStart}
		steps = slices.DeleteFunc(steps, func(s Step) bool { return !slices.Contains(early, s.Op) })
	}
	return steps
}

// equal ignores the origin: a route that somebody else made does as well.
func (r Route) equal(o Route) bool { return r.bare() == o.bare() }

// bare is the route without its origin.
func (r Route) bare() Route {
	r.Origin = ""
	return r
}

// routeSet has the routes without their origins: there may be thousands, one for each node.
func routeSet(routes []Route) map[Route]bool {
	out := make(map[Route]bool, len(routes))
	for _, r := range routes {
		out[r.bare()] = true
	}
	return out
}

// resolve works out what the spec wants. Links come in the order of their names, so the first address is always the same one.
func resolve(want Spec, have State) target {
	var t target
	nameservers := slices.Clone(want.Network.Nameservers)
	domains := slices.Clone(want.Network.SearchDomains)
	for _, l := range have.Links {
		c := want.interfaceOf(l)
		if c == nil {
			continue
		}
		t.managed = append(t.managed, l)
		for _, p := range c.Addresses {
			t.address(Address{l.Name, p, OriginStatic})
		}
		for _, r := range c.Routes {
			t.route(Route{r.To.Masked(), r.Via, l.Name, r.Metric, OriginStatic})
		}
		lease := leaseOf(have, l.Name)
		if !c.DHCP || lease == nil {
			continue
		}
		t.address(Address{l.Name, lease.Address, OriginDHCP})
		for _, r := range lease.Routes {
			t.route(Route{r.To, r.Via, l.Name, dhcpMetric, OriginDHCP})
		}
		nameservers = append(nameservers, lease.Nameservers...)
		domains = append(domains, lease.Domains...)
	}
	t.pods(want, have)
	t.files = files(want.Hostname, t.addresses, nameservers, domains)
	return t
}

// address adds one, unless the link has it already (static beside a lease of the same).
func (t *target) address(a Address) {
	if !slices.ContainsFunc(t.addresses, func(o Address) bool { return o.Link == a.Link && o.Prefix == a.Prefix }) {
		t.addresses = append(t.addresses, a)
	}
}

func (t *target) route(r Route) {
	r = r.metric()
	if !slices.ContainsFunc(t.routes, r.equal) {
		t.routes = append(t.routes, r)
	}
}

// metric gives the route the metric that it will be read back with.
func (r Route) metric() Route {
	if r.To.Addr().Is6() && r.Metric == 0 {
		r.Metric = ipv6Default
	}
	return r
}

func leaseOf(have State, link config.LinkName) *dhcp.Lease {
	for _, e := range have.DHCP {
		if e.Link == string(link) {
			return e.Lease
		}
	}
	return nil
}

func planLinks(want Spec, have State, t target) []Step {
	var steps []Step
	for _, l := range have.Links {
		if l.Loopback && !l.Up {
			steps = append(steps, Step{Op: opLinkUp, Link: l.Name})
		}
	}
	for _, l := range t.managed {
		c := want.interfaceOf(l)
		mtu := c.MTU
		if lease := leaseOf(have, l.Name); mtu == 0 && c.DHCP && lease != nil {
			mtu = lease.MTU
		}
		if mtu != 0 && mtu != l.MTU {
			steps = append(steps, Step{Op: opLinkMTU, Link: l.Name, MTU: mtu})
		}
		if !l.Promote {
			steps = append(steps, Step{Op: opLinkPromote, Link: l.Name})
		}
		if !l.Up {
			steps = append(steps, Step{Op: opLinkUp, Link: l.Name})
		}
	}
	for _, c := range want.Network.Interfaces {
		if !isPattern(c.Name) && !slices.ContainsFunc(have.Links, func(l Link) bool { return l.Name == c.Name }) {
			steps = append(steps, Step{Op: opLinkWait, Link: c.Name, Content: "there is no such link; there are " + names(have.Links)})
		}
	}
	return steps
}

func names(links []Link) string {
	var out []string
	for _, l := range links {
		if l.Physical || l.Loopback {
			out = append(out, string(l.Name))
		}
	}
	return strings.Join(out, ", ")
}

func planDHCP(want Spec, have State, t target) []Step {
	var steps []Step
	wanted := func(link string) bool {
		for _, l := range t.managed {
			if string(l.Name) == link {
				return want.interfaceOf(l).DHCP
			}
		}
		return false
	}
	for _, l := range t.managed {
		running := slices.ContainsFunc(have.DHCP, func(e dhcp.Entry) bool { return e.Link == string(l.Name) && e.Running })
		if want.interfaceOf(l).DHCP && !running {
			steps = append(steps, Step{Op: opDHCPStart, Link: l.Name, Content: want.Hostname})
		}
	}
	for _, e := range have.DHCP {
		if !wanted(e.Link) {
			steps = append(steps, Step{Op: opDHCPStop, Link: config.LinkName(e.Link)})
		}
	}
	return steps
}

// The files of the runtime folder that /etc links to.
const (
	fileHostname = "hostname"
	fileHosts    = "hosts"
	fileResolver = "resolv.conf"
)

// Limits of resolv.conf(5).
const (
	maxNameservers = 3
	maxDomains     = 6
)

// files returns their contents. The node's own name leads to its first address, which is where others reach it too.
func files(hostname string, addresses []Address, nameservers []netip.Addr, domains []string) map[string]string {
	own := netip.MustParseAddr("127.0.1.1")
	if len(addresses) > 0 {
		first := slices.MinFunc(addresses, func(a, b Address) int { // IPv4 first, else their own order
			return cmp.Compare(a.Prefix.Addr().BitLen(), b.Prefix.Addr().BitLen())
		})
		own = first.Prefix.Addr()
	}
	var hosts, resolver strings.Builder
	hosts.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")
	fmt.Fprintf(&hosts, "%s %s\n", own, hostname)
	for i, n := range unique(nameservers) {
		if i < maxNameservers {
			fmt.Fprintf(&resolver, "nameserver %s\n", n)
		}
	}
	if d := unique(domains); len(d) > 0 {
		fmt.Fprintf(&resolver, "search %s\n", strings.Join(d[:min(len(d), maxDomains)], " "))
	}
	return map[string]string{fileHostname: hostname + "\n", fileHosts: hosts.String(), fileResolver: resolver.String()}
}

// unique returns the values without repetitions, in the order of their first appearance.
func unique[T comparable](in []T) []T {
	var out []T
	for _, v := range in {
		if !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out
}
