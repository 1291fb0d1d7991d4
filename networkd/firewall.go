package networkd

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
)

// Family is an address family, as the firewall's two halves have it.
type Family string

const (
	IPv4 Family = "ipv4"
	IPv6 Family = "ipv6"
)

func (f Family) has(a netip.Addr) bool { return a.Is4() == (f == IPv4) }

// Part is one of the places at which networkd has rules.
type Part string

const (
	Ingress      Part = ""           // what may come in
	Masquerading Part = "masquerade" // with which address pods leave the node
)

// place is where in iptables a part is.
type place struct {
	table string
	hook  string // the chain of the table that enters networkd's
	// prefix begins the names of the part's chains, and of no others. The rest is a hash of the rules: a chain's name says what is in
	// it, so the one in force is right or it is another one.
	prefix string
}

var places = map[Part]place{
	Ingress:      {"filter", "INPUT", "BULKHEAD-IN-"},
	Masquerading: {"nat", "POSTROUTING", "BULKHEAD-OUT-"},
}

// words is the text of an operation on this part.
func (p Part) words(op Op) string {
	if p == Ingress {
		return string(op)
	}
	return strings.Replace(string(op), "firewall", string(p), 1)
}

// Table is the part of one family's table that is networkd's.
type Table struct {
	Family Family
	Chains []Chain  // sorted by name
	Jumps  []string // the chains that the hook enters, in order; a chain may appear twice
}

// Chain is one chain as the kernel has it.
type Chain struct {
	Name  string
	Rules []string // as iptables-save(8) writes them, without "-A" and the chain
	// Packets and Bytes are what each rule has matched; parallel to Rules, nil if unknown. Plans ignore them.
	Packets, Bytes []uint64
}

// rule is one line of the firewall, for iptables and for people.
type rule struct{ args, text string }

// ingress returns what may come in, in the order in which it is tried. The spelling is that of iptables-save, because
// what is read back is compared with it.
func ingress(want Spec, managed []Link, f Family) []rule {
	icmp := map[Family]string{IPv4: "icmp", IPv6: "ipv6-icmp"}[f]
	out := []rule{
		{"-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "accept established, related"},
		{"-i lo -j ACCEPT", "accept in lo"},
		{"-p " + icmp + " -j ACCEPT", "accept " + icmp},
	}
	if f == IPv4 {
		out = append(out, rule{"-p udp -m udp --sport 67 --dport 68 -j ACCEPT", "accept udp sport 67 dport 68"})
	}
	if want.Pods.IsValid() && f.has(want.Pods.Addr()) {
		pods := want.Pods.Masked().String()
		for _, l := range managed {
			if want.Bridge { // a pod's packet cannot come from there: somebody pretends
				out = append(out, rule{fmt.Sprintf("-s %s -i %s -j DROP", pods, l.Name), fmt.Sprintf("drop in %s from %s", l.Name, pods)})
			}
		}
		out = append(out, rule{"-s " + pods + " -j ACCEPT", "accept from " + pods})
	}
	for _, port := range want.Ports {
		if !slices.ContainsFunc(want.Network.Firewall.Allow, func(a config.Allow) bool { return a.Port == port && a.Protocol != "udp" }) {
			out = append(out, accept("tcp", port, netip.Prefix{}, f))
		}
	}
	for _, a := range want.Network.Firewall.Allow {
		protocol := a.Protocol
		if protocol == "" {
			protocol = "tcp"
		}
		if len(a.From) == 0 {
			out = append(out, accept(protocol, a.Port, netip.Prefix{}, f))
		}
		for _, from := range a.From {
			if f.has(from.Addr()) {
				out = append(out, accept(protocol, a.Port, from.Masked(), f))
			}
		}
	}
	return append(unique(out), rule{"-j DROP", "drop everything else"})
}

// accept opens a port to a prefix; the zero prefix is everybody.
func accept(protocol string, port int, from netip.Prefix, f Family) rule {
	match := ""
	if from.IsValid() && from.Bits() > 0 {
		match = "-s " + from.String() + " "
	} else if f == IPv4 {
		from = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	} else {
		from = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return rule{
		args: fmt.Sprintf("%s-p %s -m %s --dport %d -j ACCEPT", match, protocol, protocol, port),
		text: fmt.Sprintf("accept %s dport %d from %s", protocol, port, from),
	}
}

// chainOf returns the chain with these rules.
func chainOf(part Part, rules []rule) Chain {
	var c Chain
	h := sha256.New()
	for _, r := range rules {
		c.Rules = append(c.Rules, r.args)
		h.Write([]byte(r.args + "\n"))
	}
	c.Name = places[part].prefix + hex.EncodeToString(h.Sum(nil)[:4])
	return c
}

// planFirewall is the plan for what may come in.
func planFirewall(want Spec, have State, managed []Link) (now, later []Step) {
	if have.NoFirewall != "" {
		now = append(now, Step{Op: opFirewallWait, Content: have.NoFirewall})
	}
	for _, t := range have.Tables {
		n, l := planChain(Ingress, t, ingress(want, managed, t.Family))
		now, later = append(now, n...), append(later, l...)
	}
	return now, later
}

// planChain builds and enters the wanted chain, and only later leaves and deletes what was there before: at every moment the hook
// enters at least one whole chain, and each of INPUT's ends by dropping. A crash anywhere leaves work for the next plan. Without rules
// no chain is wanted.
func planChain(part Part, t Table, rules []rule) (now, later []Step) {
	var c Chain
	if len(rules) > 0 {
		c = chainOf(part, rules)
		at := slices.IndexFunc(t.Chains, func(h Chain) bool { return h.Name == c.Name })
		switch {
		case !slices.Contains(t.Jumps, c.Name):
			now = append(now, Step{Op: opJumpAdd, Family: t.Family, Part: part, Name: c.Name, Rules: c.Rules})
		case at < 0 || !slices.Equal(t.Chains[at].Rules, c.Rules):
			now = append(now, Step{Op: opChainBuild, Family: t.Family, Part: part, Name: c.Name, Rules: c.Rules})
		}
	}
	seen := false
	for _, j := range t.Jumps {
		if j != c.Name || seen {
			later = append(later, Step{Op: opJumpDel, Family: t.Family, Part: part, Name: j})
		}
		seen = seen || j == c.Name
	}
	for _, h := range t.Chains {
		if h.Name != c.Name {
			later = append(later, Step{Op: opChainDel, Family: t.Family, Part: part, Name: h.Name})
		}
	}
	return now, later
}

// spelling makes protocols look the same whatever the version of iptables, and whether or not there is an /etc/protocols.
var spelling = strings.NewReplacer("-p icmpv6 ", "-p ipv6-icmp ", "-p 58 ", "-p ipv6-icmp ", "-p 1 ", "-p icmp ", "-p 6 ", "-p tcp ", "-p 17 ", "-p udp ")

// parseSave reads what iptables-save -c prints: networkd's part of each table. Chains and rules of others are passed over.
func parseSave(f Family, text string) (map[Part]Table, error) {
	out := map[Part]Table{}
	_, text, _ = strings.Cut("\n"+text, "\n*") // behind remarks
	for section := range strings.SplitSeq(text, "\n*") {
		name, lines, _ := strings.Cut(section, "\n")
		for part, at := range places {
			if at.table != strings.TrimSpace(name) {
				continue
			}
			t, err := parseTable(at, lines)
			if err != nil {
				return nil, err
			}
			t.Family = f
			out[part] = t
		}
	}
	return out, nil
}

func parseTable(at place, text string) (Table, error) {
	var t Table
	chains := map[string]*Chain{}
	for line := range strings.SplitSeq(text, "\n") {
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name, _, _ = strings.Cut(name, " ")
			if strings.HasPrefix(name, at.prefix) {
				chains[name] = &Chain{Name: name}
			}
			continue
		}
		counters, args, ok := strings.Cut(line, " -A ")
		if !ok {
			continue
		}
		chain, args, _ := strings.Cut(args, " ")
		if target, ok := strings.CutPrefix(args, "-j "+at.prefix); ok && chain == at.hook {
			t.Jumps = append(t.Jumps, at.prefix+target)
			continue
		}
		c := chains[chain]
		if c == nil {
			continue
		}
		var packets, bytes uint64
		if _, err := fmt.Sscanf(counters, "[%d:%d]", &packets, &bytes); err != nil {
			return Table{}, fmt.Errorf("read firewall: counters of %q: %w", line, err)
		}
		c.Rules, c.Packets, c.Bytes = append(c.Rules, spelling.Replace(args)), append(c.Packets, packets), append(c.Bytes, bytes)
	}
	for _, c := range chains {
		t.Chains = append(t.Chains, *c)
	}
	slices.SortFunc(t.Chains, func(a, b Chain) int { return strings.Compare(a.Name, b.Name) })
	return t, nil
}
