package networkd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// model is Linux as far as plans can tell. It is strict where Linux is: what Linux refuses, it refuses.
type model struct{ State }

func newModel(links ...Link) *model {
	m := &model{State{Files: map[string]string{}, Tables: []Table{{Family: IPv4}, {Family: IPv6}}, Masquerade: []Table{{Family: IPv4}, {Family: IPv6}}}}
	m.Links = append(m.Links, Link{Name: "lo", Index: 1, Kind: "device", Loopback: true, MTU: 65536})
	m.Links = append(m.Links, links...)
	slices.SortFunc(m.Links, func(a, b Link) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return m
}

func (m *model) Read(context.Context) (State, error)        { return m.State, nil }
func (m *model) ReadLinks() (State, error)                  { return m.State, nil }
func (m *model) Run(ctx context.Context, wake func()) error { <-ctx.Done(); return ctx.Err() }
func (m *model) link(name config.LinkName) (*Link, error) {
	for i := range m.Links {
		if m.Links[i].Name == name {
			return &m.Links[i], nil
		}
	}
	return nil, fmt.Errorf("no link %s", name)
}

func (m *model) Do(_ context.Context, s Step) error {
	switch s.Op {
	case opChainBuild, opChainDel, opJumpAdd, opJumpDel:
		return m.firewall(s)
	case opFileWrite:
		m.Files[s.Name] = s.Content
		return nil
	case opLinkWait, opFirewallWait:
		return errors.New(s.Content)
	case opDHCPStop:
		m.DHCP = slices.DeleteFunc(slices.Clone(m.DHCP), func(e dhcp.Entry) bool { return e.Link == string(s.Link) })
		return nil
	}
	link, err := m.link(cmpOr(s.Link, s.Address.Link, s.Route.Link))
	if err != nil {
		return err
	}
	switch s.Op {
	case opLinkUp:
		link.Up = true
	case opLinkMTU:
		if s.MTU < 68 {
			return errors.New("invalid argument")
		}
		link.MTU = s.MTU
	case opLinkPromote:
		link.Promote = true
	case opDHCPStart:
		for i := range m.DHCP {
			if m.DHCP[i].Link == string(s.Link) {
				m.DHCP[i].Running = true
				return nil
			}
		}
		m.DHCP = append(m.DHCP, dhcp.Entry{Link: string(s.Link), Running: true})
	case opAddrAdd:
		if !slices.Contains(m.Addresses, s.Address) {
			m.Addresses = append(m.Addresses, s.Address)
		}
	case opAddrDel:
		m.Addresses = slices.DeleteFunc(slices.Clone(m.Addresses), func(a Address) bool { return a.Link == s.Address.Link && a.Prefix == s.Address.Prefix })
	case opRouteAdd:
		if !link.Up {
			return errors.New("network is down")
		}
		if s.Route.Via.IsValid() && !m.reaches(s.Route) {
			return errors.New("network is unreachable")
		}
		if !slices.ContainsFunc(m.Routes, s.Route.equal) {
			m.Routes = append(m.Routes, s.Route)
		}
	case opRouteDel:
		m.Routes = slices.DeleteFunc(slices.Clone(m.Routes), s.Route.equal)
	default:
		return fmt.Errorf("the model cannot %q", s.Op)
	}
	return nil
}

func cmpOr(names ...config.LinkName) config.LinkName {
	for _, n := range names {
		if n != "" {
			return n
		}
	}
	return ""
}

// reaches reports whether a route's gateway is a neighbour.
func (m *model) reaches(r Route) bool {
	return slices.ContainsFunc(m.Addresses, func(a Address) bool { return a.Link == r.Link && a.Prefix.Contains(r.Via) }) ||
		slices.ContainsFunc(m.Routes, func(o Route) bool { return o.Link == r.Link && !o.Via.IsValid() && o.To.Contains(r.Via) })
}

func (m *model) firewall(s Step) error {
	tables := m.Tables
	if s.Part == Masquerading {
		tables = m.Masquerade
	}
	t := &tables[slices.IndexFunc(tables, func(t Table) bool { return t.Family == s.Family })]
	at := slices.IndexFunc(t.Chains, func(c Chain) bool { return c.Name == s.Name })
	jump := slices.Index(t.Jumps, s.Name)
	switch s.Op {
	case opChainBuild, opJumpAdd:
		if at >= 0 {
			t.Chains[at].Rules = s.Rules
		} else {
			t.Chains = append(t.Chains, Chain{Name: s.Name, Rules: s.Rules})
		}
		if s.Op == opJumpAdd {
			t.Jumps = append([]string{s.Name}, t.Jumps...)
		}
	case opJumpDel:
		if jump >= 0 {
			t.Jumps = slices.Delete(slices.Clone(t.Jumps), jump, jump+1)
		}
	case opChainDel:
		if jump >= 0 {
			return errors.New("chain is in use")
		}
		if at >= 0 {
			t.Chains = slices.Delete(slices.Clone(t.Chains), at, at+1)
		}
	}
	return nil
}

// guarded reports what is wrong with a firewall at this moment: INPUT must enter a whole chain first.
func guarded(s State) error {
	for _, t := range s.Tables {
		if len(t.Jumps) == 0 {
			return fmt.Errorf("%s: INPUT enters no chain", t.Family)
		}
		at := slices.IndexFunc(t.Chains, func(c Chain) bool { return c.Name == t.Jumps[0] })
		if at < 0 || len(t.Chains[at].Rules) == 0 || t.Chains[at].Rules[len(t.Chains[at].Rules)-1] != "-j DROP" {
			return fmt.Errorf("%s: INPUT enters %s first, which does not end by dropping", t.Family, t.Jumps[0])
		}
	}
	return nil
}
