package networkd

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Pods is what kubeletd has asked for: the way to other nodes' pods, and that this node's own can leave the cluster. It is not changed
// after it was made.
type Pods struct {
	Subnets []netip.Prefix // of the whole cluster
	Local   []netip.Prefix // of this node's own pods
	Routes  []PodRoute     // sorted
}

// PodRoute leads to the pods of another node.
type PodRoute struct {
	To  netip.Prefix
	Via netip.Addr
}

// Limits of SetPodNetwork.
const (
	maxPodRoutes   = 5000
	maxPodPrefixes = 16 // subnets, and local prefixes: one for each family is usual
)

// parsePods checks a request against the node's document.
func parsePods(r *networkv1.SetPodNetworkRequest, want Spec) (*Pods, error) {
	if n := len(r.GetRoutes()); n > maxPodRoutes {
		return nil, errs.New(errs.Invalid, "routes: %d of them; at most %d", n, maxPodRoutes)
	}
	if n := max(len(r.GetPodSubnets()), len(r.GetLocalPrefixes())); n > maxPodPrefixes {
		return nil, errs.New(errs.Invalid, "pod_subnets, local_prefixes: %d of them; at most %d", n, maxPodPrefixes)
	}
	p := &Pods{}
	for _, s := range r.GetPodSubnets() {
		to, err := parsePrefix("pod_subnets", s)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(p.Subnets, func(o netip.Prefix) bool { return o.Addr().Is4() == to.Addr().Is4() }) {
			return nil, errs.New(errs.Invalid, "pod_subnets: %s is a second one of its family; one of each at most", to)
		}
		p.Subnets = append(p.Subnets, to)
	}
	for _, s := range r.GetLocalPrefixes() {
		to, err := parsePrefix("local_prefixes", s)
		if err == nil {
			err = p.inside("local_prefixes", to)
		}
		if err != nil {
			return nil, err
		}
		p.Local = append(p.Local, to)
	}
	if err := p.parseRoutes(r.GetRoutes()); err != nil {
		return nil, err
	}
	for _, s := range p.Subnets {
		switch {
		case !want.Bridge:
			return nil, errs.New(errs.Precondition, "pod_subnets: the node's document has a pod network of its own (Kubernetes.cni), or none; send no subnets")
		case !within(want.Pods, s):
			return nil, errs.New(errs.Precondition, "pod_subnets: %s is not inside of %s, the node's Kubernetes.podSubnet; apply the same document everywhere", s, want.Pods)
		}
	}
	return p, nil
}

// parseRoutes adds the routes to the subnets and local prefixes that are there already.
func (p *Pods) parseRoutes(routes []*networkv1.PodRoute) error {
	seen := map[netip.Prefix]bool{}
	for _, in := range routes {
		to, err := parsePrefix("routes", in.GetPrefix())
		if err == nil {
			err = p.inside("routes", to)
		}
		if err != nil {
			return err
		}
		via, err := netip.ParseAddr(in.GetVia())
		switch {
		case err != nil || via.Zone() != "" || via.Is4In6():
			return errs.New(errs.Invalid, "routes: gateway %.64q of %s is not an address like 10.0.0.7", in.GetVia(), to)
		case via.Is4() != to.Addr().Is4():
			return errs.New(errs.Invalid, "routes: gateway %s of %s is of the other family", via, to)
		case !via.IsGlobalUnicast() && !via.IsLinkLocalUnicast() || slices.ContainsFunc(p.Subnets, func(s netip.Prefix) bool { return s.Contains(via) }):
			return errs.New(errs.Invalid, "routes: gateway %s of %s is no node's address", via, to)
		case seen[to]:
			return errs.New(errs.Invalid, "routes: %s is there twice", to)
		case slices.ContainsFunc(p.Local, to.Overlaps):
			return errs.New(errs.Invalid, "routes: %s overlaps this node's own %s", to, p.Local)
		}
		seen[to] = true
		p.Routes = append(p.Routes, PodRoute{to, via})
	}
	slices.SortFunc(p.Routes, func(a, b PodRoute) int { return a.To.Compare(b.To) })
	return nil
}

func parsePrefix(field, s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Bits() == 0 || p.Addr().Is4In6() {
		return netip.Prefix{}, errs.New(errs.Invalid, "%s: %.64q is not a prefix like 10.244.1.0/24", field, s)
	}
	if p != p.Masked() {
		return netip.Prefix{}, errs.New(errs.Invalid, "%s: %s has bits behind its length; %s is meant", field, p, p.Masked())
	}
	return p, nil
}

func (p *Pods) inside(field string, to netip.Prefix) error {
	if slices.ContainsFunc(p.Subnets, func(s netip.Prefix) bool { return within(s, to) }) {
		return nil
	}
	return errs.New(errs.Invalid, "%s: %s is not inside of the pod subnets %s", field, to, p.Subnets)
}

// within reports whether all of part is in whole.
func within(whole, part netip.Prefix) bool {
	return whole.IsValid() && part.Bits() >= whole.Bits() && whole.Contains(part.Addr())
}

// pods adds the routes to other nodes' pods that are wanted, and a sentence for each that waits. Before kubeletd has spoken what is there
// stays: pods talk over it, and networkd is only back after a restart.
func (t *target) pods(want Spec, have State) {
	wanted := routeSet(t.routes)
	add := func(r Route) { // each prefix is there once: no search for each of thousands
		if r = r.metric(); !wanted[r.bare()] {
			t.routes = append(t.routes, r)
		}
	}
	if have.Pods == nil && (want.Bridge || !want.Pods.IsValid()) {
		for _, r := range have.Routes {
			if r.Origin == OriginPod {
				add(r)
			}
		}
	}
	if have.Pods == nil || !want.Bridge {
		return
	}
	near := t.nearby(have)
	for _, p := range have.Pods.Routes {
		switch link, own := near.link(p.Via); {
		case own:
			t.waiting = append(t.waiting, fmt.Sprintf("the gateway %s of %s is this node's own address", p.Via, p.To))
		case link == "":
			t.waiting = append(t.waiting, fmt.Sprintf("the gateway %s of %s is on no link's subnet: nodes must share a network, or the document needs an on-link route to it", p.Via, p.To))
		default:
			add(Route{To: p.To, Via: p.Via, Link: link, Origin: OriginPod})
		}
	}
}

// neighbourhood is what is on link.
type neighbourhood struct {
	own     map[netip.Addr]bool
	subnets []Route // longest prefix first
}

// nearby is what will be on link once the rest of the target is reached; what others have set up on managed links counts too.
func (t *target) nearby(have State) neighbourhood {
	n := neighbourhood{own: map[netip.Addr]bool{}}
	managed := map[config.LinkName]bool{}
	for _, l := range t.managed {
		managed[l.Name] = true
	}
	for _, a := range have.Addresses {
		if a.Origin.own() {
			continue // what stays of these is in the target
		}
		n.own[a.Prefix.Addr()] = true
		if managed[a.Link] && a.Origin != OriginVirtual {
			n.subnets = append(n.subnets, Route{To: a.Prefix.Masked(), Link: a.Link})
		}
	}
	for _, a := range t.addresses {
		n.own[a.Prefix.Addr()] = true
		n.subnets = append(n.subnets, Route{To: a.Prefix.Masked(), Link: a.Link})
	}
	n.subnets = append(n.subnets, t.routes...)
	for _, r := range have.Routes {
		if managed[r.Link] && r.Origin == OriginOther {
			n.subnets = append(n.subnets, r)
		}
	}
	n.subnets = slices.DeleteFunc(n.subnets, func(r Route) bool { return r.Via.IsValid() || r.To.Bits() == 0 })
	slices.SortStableFunc(n.subnets, func(a, b Route) int {
		if a.To.Bits() != b.To.Bits() {
			return b.To.Bits() - a.To.Bits()
		}
		if a.Metric != b.Metric {
			return a.Metric - b.Metric
		}
		return strings.Compare(string(a.Link), string(b.Link))
	})
	return n
}

// link returns the link that an address is on; "" if it is on none. own: it is this node's.
func (n neighbourhood) link(a netip.Addr) (link config.LinkName, own bool) {
	if n.own[a] {
		return "", true
	}
	for _, s := range n.subnets {
		if s.To.Contains(a) {
			return s.Link, false
		}
	}
	return "", false
}

// masquerade is what happens to packets of this node's pods as they leave it: between pods nothing, else they get the node's address,
// which is the only one that others know the way back to. The spelling is that of iptables-save.
func masquerade(p *Pods, f Family) []rule {
	var out []rule
	multicast := map[Family]string{IPv4: "224.0.0.0/4", IPv6: "ff00::/8"}[f]
	for _, local := range p.Local {
		if !f.has(local.Addr()) {
			continue
		}
		for _, to := range append(prefixes(p.Subnets, f), multicast) {
			out = append(out, rule{fmt.Sprintf("-s %s -d %s -j RETURN", local, to), fmt.Sprintf("keep the sender from %s to %s", local, to)})
		}
		out = append(out, rule{fmt.Sprintf("-s %s -j MASQUERADE --random-fully", local), fmt.Sprintf("masquerade from %s", local)})
	}
	return unique(out)
}

func prefixes(list []netip.Prefix, f Family) []string {
	var out []string
	for _, p := range list {
		if f.has(p.Addr()) {
			out = append(out, p.String())
		}
	}
	return out
}

// planPods is the part of the firewall that is for pods: the addresses with which they leave the node.
func planPods(want Spec, have State) (now, later []Step) {
	if have.Pods == nil && (want.Bridge || !want.Pods.IsValid()) {
		return nil, nil // as for routes
	}
	p := have.Pods
	if p == nil || !want.Bridge {
		p = &Pods{}
	}
	for _, t := range have.Masquerade {
		n, l := planChain(Masquerading, t, masquerade(p, t.Family))
		now, later = append(now, n...), append(later, l...)
	}
	return now, later
}

// pods is network.v1.Pods.
type pods struct {
	networkv1.UnimplementedPodsServer
	d *Daemon
}

func (s *pods) SetPodNetwork(_ context.Context, r *networkv1.SetPodNetworkRequest) (*networkv1.SetPodNetworkResponse, error) {
	want, generation := s.d.loop.Spec()
	if generation == 0 {
		return nil, errs.New(errs.Precondition, "the node has no configuration yet; run: bhctl apply")
	}
	p, err := parsePods(r, want)
	if err != nil {
		return nil, err
	}
	have, err := s.d.kernel.ReadLinks()
	if err != nil {
		return nil, err
	}
	have.Pods = p
	waiting := resolve(want, have).waiting
	if was := s.d.pods.Swap(p); !reflect.DeepEqual(was, p) {
		s.d.log.Info("pod network set", "routes", len(p.Routes), "waiting", len(waiting))
		s.d.loop.Wake()
	}
	return &networkv1.SetPodNetworkResponse{Unreachable: waiting}, nil
}
