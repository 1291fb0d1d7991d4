package config

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Validate checks a set that did not come from Parse: each field by itself, and all against each other. Kinds that are
// nil and fields that are zero count as their defaults. The error, if any, is an *Error.
func Validate(s Set) error {
	p := &parser{lines: map[string]int{}, bad: map[string]bool{}}
	for _, k := range Kinds() {
		if v := s.slot(k); !v.IsNil() {
			p.walk(v.Elem(), string(k))
		}
	}
	s = s.copy()
	s.fill()
	for _, c := range cross(s) {
		p.follow(c)
	}
	return p.err()
}

// walk checks each written field of a value against its rule.
func (p *parser) walk(v reflect.Value, at string) {
	r := rule(at)
	switch {
	case v.Kind() == reflect.Struct && v.Type() != addrType && v.Type() != prefixType:
		for i, name := range names(v.Type()) {
			field := at + "." + name
			if f := v.Field(i); !f.IsZero() {
				p.walk(f, field)
			} else if rule(field).required {
				p.problem(0, field, "is missing; allowed: %s", rule(field).permits())
			}
		}
	case v.Kind() == reflect.Slice:
		if v.Len() > r.listMax() {
			p.problem(0, at, "has %d entries; at most %d are allowed", v.Len(), r.listMax())
			return
		}
		for i := range v.Len() {
			p.walk(v.Index(i), at+"["+strconv.Itoa(i)+"]")
		}
	case v.Kind() == reflect.Pointer:
		p.walk(v.Elem(), at)
	default:
		if text := r.check(v); text != "" {
			p.problem(0, at, "%s", text)
		}
	}
}

// copy returns a set whose documents can be filled without touching the caller's.
func (s Set) copy() Set {
	var out Set
	for _, k := range Kinds() {
		if v := s.slot(k); !v.IsNil() {
			to := reflect.New(v.Type().Elem())
			to.Elem().Set(v.Elem())
			out.slot(k).Set(to)
		}
	}
	if out.Storage != nil {
		out.Storage.Keys = append([]StorageKey(nil), out.Storage.Keys...)
	}
	if out.Network != nil {
		out.Network.Firewall.Allow = append([]Allow(nil), out.Network.Firewall.Allow...)
	}
	return out
}

// A checker collects what is wrong between fields.
type checker []Problem

func (c *checker) add(at, format string, args ...any) {
	*c = append(*c, Problem{Field: at, Text: fmt.Sprintf(format, args...)})
}

// cross returns what is wrong between fields of a set with every default filled in, and with values whose meaning needs
// more than one look.
func cross(s Set) []Problem {
	var c checker
	c.interfaces(s.Network)
	unique(&c, "Network.nameservers", s.Network.Nameservers)
	for i, a := range s.Network.Nameservers {
		if why := unusable(a); why != "" && !a.IsLoopback() {
			c.add(index("Network.nameservers", i), "%q %s", a, why)
		}
	}
	unique(&c, "Network.searchDomains", s.Network.SearchDomains)
	for i, a := range s.Network.Firewall.Allow {
		at := index("Network.firewall.allow", i) + ".from"
		unique(&c, at, a.From)
		for j, p := range a.From {
			c.masked(index(at, j), p)
		}
	}
	unique(&c, "Cluster.names", s.Cluster.Names)
	unique(&c, "Update.health", s.Update.Health)
	if s.Machine.Role == Worker && s.Cluster.Endpoint == "" {
		c.add("Cluster.endpoint", "is missing; a worker (Machine.role) needs %s", rule("Cluster.endpoint").allowed)
	}
	c.virtualIPs(s)
	c.subnets(s)
	c.keys(s.Storage)
	c.access(s.Access)
	return c
}

// keys checks that each key says where it is, and nothing that is for another kind.
func (c *checker) keys(s *Storage) {
	if s.Install.Wanted() && s.Disk != "system" {
		c.add("Storage.disk", "%q is one choice of a disk and Storage.install another; STATE and VAR go where the system is installed: remove Storage.disk", s.Disk)
	}
	if len(s.Keys) > 0 && s.Encryption != EncryptionLUKS2 {
		c.add("Storage.keys", "keys are for encrypted volumes; set Storage.encryption to luks2")
	}
	for i, k := range s.Keys {
		at := index("Storage.keys", i)
		if j := slices.Index(s.Keys, k); j < i {
			c.add(at, "this key stands here twice; the first is %s", index("Storage.keys", j))
		}
		for _, f := range []struct{ name, value, of string }{
			{"partition", k.Partition, "keyFile"}, {"firmware", k.Firmware, "keyFile"}, {"address", k.Address, "kms"}, {"pin", k.Pin, "kms"},
		} {
			switch {
			case f.value != "" && string(k.Kind) != f.of:
				c.add(at+"."+f.name, "is for kind %s; this key is of kind %.40q", f.of, k.Kind)
			case f.value == "" && k.Kind == KeyService && f.of == "kms":
				c.add(at+"."+f.name, "is missing; allowed: %s", rule(at+"."+f.name).allowed)
			}
		}
		if k.Kind == KeyFile && (k.Partition == "") == (k.Firmware == "") {
			c.add(at, "a key of kind keyFile has either partition or firmware")
		}
	}
}

func index(at string, i int) string { return at + "[" + strconv.Itoa(i) + "]" }

// unique finds entries that stand in a list twice.
func unique[T comparable](c *checker, at string, list []T) {
	first := map[T]int{}
	for i, e := range list {
		if j, twice := first[e]; twice {
			c.add(index(at, i), "\"%v\" stands here twice; the first is %s", e, index(at, j))
			continue
		}
		first[e] = i
	}
}

// masked wants a network, not an address in it.
func (c *checker) masked(at string, p netip.Prefix) {
	if p.IsValid() && p.Masked() != p {
		c.add(at, "%q has bits set behind the prefix length; the network is %q", p, p.Masked())
	}
	if p.IsValid() && p.Addr().Is4In6() {
		c.add(at, "%q is an IPv4 address in IPv6 form; write it as IPv4", p)
	}
}

// virtualIPs checks that nothing else has them.
func (c *checker) virtualIPs(s Set) {
	list := s.Cluster.VirtualIPs
	for i, a := range list {
		at := index("Cluster.virtualIPs", i)
		switch why := unusable(a); {
		case why != "":
			c.add(at, "%q %s", a, why)
		case a.IsLinkLocalUnicast() || a.Zone() != "":
			c.add(at, "%q is of one link only; allowed: %s", a, rule(at).allowed)
		case s.Kubernetes.PodSubnet.Contains(a) || s.Kubernetes.ServiceSubnet.Contains(a):
			c.add(at, "%q is among the addresses of pods (%s) or Services (%s); it must be one of the nodes' network", a, s.Kubernetes.PodSubnet, s.Kubernetes.ServiceSubnet)
		}
		if j := slices.IndexFunc(list, func(o netip.Addr) bool { return o.Is4() == a.Is4() }); j < i {
			c.add(at, "%q is a second one of its family; the first is %s", a, index("Cluster.virtualIPs", j))
		}
		for k, l := range s.Network.Interfaces {
			if slices.ContainsFunc(l.Addresses, func(p netip.Prefix) bool { return p.Addr() == a }) {
				c.add(at, "%q is an address of this machine (%s); a virtual one belongs to none for good", a, index("Network.interfaces", k))
			}
		}
	}
}

// unusable says why no host can have the address; "" if it can.
func unusable(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return ""
	case a.Is4In6():
		return "is an IPv4 address in IPv6 form; write it as IPv4"
	case a.IsUnspecified():
		return "is the unspecified address; no host has it"
	case a.IsMulticast():
		return "is a multicast address; no host has it"
	case a.IsLoopback():
		return "is a loopback address; the loopback link has it already"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "is the broadcast address; no host has it"
	}
	return ""
}

func (c *checker) interfaces(n *Network) {
	owner := map[netip.Addr]string{}
	links := map[LinkName]int{}
	type way struct {
		to     netip.Prefix
		metric int
	}
	ways := map[way]string{}
	for i, l := range n.Interfaces {
		at := index("Network.interfaces", i)
		if j, twice := links[l.Name]; twice && l.Name != "" {
			c.add(at+".name", "%q stands here twice; the first is %s", l.Name, index("Network.interfaces", j))
		} else {
			links[l.Name] = i
		}
		if l.Name == "lo" {
			c.add(at+".name", "\"lo\" is the loopback link, which needs no configuration; remove it")
		}
		if strings.Contains(string(l.Name), "*") && (len(l.Addresses) > 0 || len(l.Routes) > 0) {
			c.add(at+".name", "%q is a pattern; addresses and routes need one link's exact name", l.Name)
		}
		for j, a := range l.Addresses {
			here := index(at+".addresses", j)
			c.address(here, l, a)
			if first, twice := owner[a.Addr()]; twice {
				c.add(here, "%q stands here twice; the first is %s", a.Addr(), first)
			} else if a.IsValid() {
				owner[a.Addr()] = here
			}
		}
		for j, r := range l.Routes {
			here := index(at+".routes", j)
			c.route(here, l, r)
			if first, twice := ways[way{r.To, r.Metric}]; twice && r.To.IsValid() {
				c.add(here, "a second route to %q with metric %d; the first is %s", r.To, r.Metric, first)
			} else {
				ways[way{r.To, r.Metric}] = here
			}
		}
	}
}

// address checks one static address of a link.
func (c *checker) address(at string, l Interface, p netip.Prefix) {
	if !p.IsValid() {
		return
	}
	a := p.Addr()
	if why := unusable(a); why != "" {
		c.add(at, "%q %s", p, why)
		return
	}
	if p.Bits() == 0 {
		c.add(at, "%q has prefix length 0; write the length of its network, like \"%s/24\"", p, a)
		return
	}
	if a.Is4() && p.Bits() < 31 {
		if p.Masked().Addr() == a {
			c.add(at, "%q is the address of the network, no host has it; the first host is \"%s/%d\"", p, a.Next(), p.Bits())
		}
		if last(p) == a {
			c.add(at, "%q is the broadcast address of its network, no host has it; the last host is \"%s/%d\"", p, a.Prev(), p.Bits())
		}
	}
	if a.Is6() && l.MTU != 0 && l.MTU < 1280 {
		c.add(at, "%q is IPv6, which needs an mtu of at least 1280; mtu is %d", p, l.MTU)
	}
}

// last returns the last address of an IPv4 network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// route checks one route of a link: its next hop must be on the link, as far as the document can tell.
func (c *checker) route(at string, l Interface, r Route) {
	c.masked(at+".to", r.To)
	if !r.Via.IsValid() || !r.To.IsValid() {
		return
	}
	if why := unusable(r.Via); why != "" {
		c.add(at+".via", "%q %s", r.Via, why)
		return
	}
	if r.Via.Is4() != r.To.Addr().Is4() {
		c.add(at+".via", "%q is not of the same family as the destination %q", r.Via, r.To)
		return
	}
	if l.DHCP || r.Via.IsLinkLocalUnicast() {
		return // the lease may bring the network
	}
	for _, a := range l.Addresses {
		if a.Contains(r.Via) {
			return
		}
	}
	for _, o := range l.Routes {
		if !o.Via.IsValid() && o.To.Bits() > 0 && o.To.Contains(r.Via) {
			return
		}
	}
	c.add(at+".via", "%q is in no network of %.40q; add an address of its network, or a route to it without via", r.Via, l.Name)
}

// subnets checks Kubernetes' networks, and that nothing overlaps.
func (c *checker) subnets(s Set) {
	k := s.Kubernetes
	one := func(at string, p netip.Prefix, from, to int) {
		if !p.Addr().Is4() || p.Bits() < from || p.Bits() > to {
			c.add(at, "%q is not within what is allowed: %s", p, rule(at).allowed)
		}
		c.masked(at, p)
	}
	const pods, services = "Kubernetes.podSubnet", "Kubernetes.serviceSubnet"
	one(pods, k.PodSubnet, 8, 24)
	one(services, k.ServiceSubnet, 12, 28)
	if k.PodSubnet.Overlaps(k.ServiceSubnet) {
		c.add(services, "%q overlaps with podSubnet %q", k.ServiceSubnet, k.PodSubnet)
	}
	for i, l := range s.Network.Interfaces {
		for j, a := range l.Addresses {
			at := index(index("Network.interfaces", i)+".addresses", j)
			for _, n := range []struct {
				name string
				net  netip.Prefix
			}{{pods, k.PodSubnet}, {services, k.ServiceSubnet}} {
				if a.IsValid() && a.Bits() > 0 && a.Overlaps(n.net) {
					c.add(at, "%q overlaps with %s %q; set one of them to a network that is free", a, n.name, n.net)
				}
			}
		}
	}
}
