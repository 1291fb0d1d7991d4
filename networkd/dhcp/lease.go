// Package dhcp is a DHCPv4 client (RFC 2131, 3442, 3397): a pure state machine, and a thin layer that gives it sockets.
//
// It never touches the kernel's addresses or routes: it says which lease there is, and networkd's planner decides.
// Time is what CLOCK_BOOTTIME shows: it goes on while the machine sleeps, and no step of the wall clock can end a lease.
package dhcp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// What is kept of one server's answer, at most.
const (
	maxRoutes      = 64
	maxNameservers = 6
	maxDomains     = 6
)

// Limits on a lease's length. A server that says less is held to have meant the least; the longest is RFC 2131's infinity.
const (
	minLease = 10 * time.Second
	maxLease = time.Duration(0xffffffff) * time.Second
)

// Lease is what a server granted. Everything in it has been checked: it may be written into files as it is.
type Lease struct {
	Address netip.Prefix `json:"address"`
	Server  netip.Addr   `json:"server"`
	// Routes are those of option 121, else one default route for each router (option 3).
	Routes      []Route      `json:"routes,omitempty"`
	Nameservers []netip.Addr `json:"nameservers,omitempty"`
	Domains     []string     `json:"domains,omitempty"`
	// MTU in bytes; 0 if the server said nothing usable.
	MTU int `json:"mtu,omitempty"`
	// Renew, Rebind and Expire are points of CLOCK_BOOTTIME.
	Renew  time.Duration `json:"renew"`
	Rebind time.Duration `json:"rebind"`
	Expire time.Duration `json:"expire"`
}

// Route is one route of a lease. An invalid Via means on link.
type Route struct {
	To  netip.Prefix `json:"to"`
	Via netip.Addr   `json:"via,omitzero"`
}

// Same reports whether two leases give the machine the same network; times and server may differ.
func (l *Lease) Same(o *Lease) bool {
	if l == nil || o == nil {
		return l == o
	}
	a, b := *l, *o
	a.Renew, a.Rebind, a.Expire, a.Server = 0, 0, 0, netip.Addr{}
	b.Renew, b.Rebind, b.Expire, b.Server = 0, 0, 0, netip.Addr{}
	return fmt.Sprint(a) == fmt.Sprint(b)
}

// fromAck reads an acknowledgement for a request sent at a time. The lease counts from the sending, as RFC 2131 4.4.1 wants.
func fromAck(ack *dhcpv4.DHCPv4, sent time.Duration) (*Lease, error) {
	ip, ok := unicast(ack.YourIPAddr)
	if !ok {
		return nil, fmt.Errorf("yiaddr: %v is no address that a host can have", ack.YourIPAddr)
	}
	mask := ack.SubnetMask()
	if mask == nil {
		mask = ack.YourIPAddr.DefaultMask()
	}
	ones, bits := mask.Size()
	if bits != 32 || ones == 0 {
		return nil, fmt.Errorf("subnet mask: %v is none", mask)
	}
	l := &Lease{Address: netip.PrefixFrom(ip, ones), Domains: domains(ack)}
	l.Server, _ = unicast(ack.ServerIdentifier())
	for _, a := range ack.DNS() {
		if a, ok := unicast(a); ok && len(l.Nameservers) < maxNameservers {
			l.Nameservers = append(l.Nameservers, a)
		}
	}
	if raw := ack.GetOneOption(dhcpv4.OptionInterfaceMTU); len(raw) == 2 {
		if mtu := int(binary.BigEndian.Uint16(raw)); mtu >= 576 {
			l.MTU = mtu
		}
	}
	l.routes(ack)
	l.times(ack, sent)
	return l, nil
}

func (l *Lease) routes(ack *dhcpv4.DHCPv4) {
	for _, r := range ack.ClasslessStaticRoute() {
		if r == nil || r.Dest == nil || len(l.Routes) >= maxRoutes {
			continue
		}
		to, ok := netip.AddrFromSlice(r.Dest.IP.To4())
		ones, bits := r.Dest.Mask.Size()
		if !ok || bits != 32 {
			continue
		}
		via, _ := unicast(r.Router) // 0.0.0.0: on link
		if !via.IsValid() && !r.Router.IsUnspecified() {
			continue
		}
		l.Routes = append(l.Routes, Route{netip.PrefixFrom(to, ones).Masked(), via})
	}
	if len(l.Routes) > 0 {
		return // RFC 3442: then option 3 is ignored
	}
	for _, r := range ack.Router() {
		via, ok := unicast(r)
		if !ok {
			continue
		}
		if !l.Address.Contains(via) { // a lease of one address (/32): the router is a neighbour all the same
			l.Routes = append(l.Routes, Route{To: netip.PrefixFrom(via, 32)})
		}
		l.Routes = append(l.Routes, Route{netip.PrefixFrom(netip.IPv4Unspecified(), 0), via})
		return // the first is preferred; more than one default route of the same rank is no use
	}
}

func (l *Lease) times(ack *dhcpv4.DHCPv4, sent time.Duration) {
	length := min(max(ack.IPAddressLeaseTime(time.Hour), minLease), maxLease)
	t2 := ack.IPAddressRebindingTime(length / 8 * 7)
	if t2 <= 0 || t2 >= length {
		t2 = length / 8 * 7
	}
	t1 := ack.IPAddressRenewalTime(length / 2)
	if t1 <= 0 || t1 >= t2 {
		t1 = min(length/2, t2/2)
	}
	l.Renew, l.Rebind, l.Expire = sent+t1, sent+t2, sent+length
}

// unicast returns an address that a host on a network may have.
func unicast(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.As4()[0] == 0 || a.As4()[0] >= 240 {
		return netip.Addr{}, false
	}
	return a, true
}

// domains returns the search domains (option 119, else 15) that are well formed: they end up in resolv.conf.
func domains(ack *dhcpv4.DHCPv4) []string {
	var names, out []string
	if ls := ack.DomainSearch(); ls != nil {
		names = ls.Labels
	}
	if len(names) == 0 {
		names = strings.Fields(ack.DomainName())
	}
	for _, n := range names {
		n = strings.ToLower(strings.TrimSuffix(n, "."))
		if len(out) < maxDomains && wellFormed(n) {
			out = append(out, n)
		}
	}
	return out
}

func wellFormed(domain string) bool {
	if len(domain) == 0 || len(domain) > 253 {
		return false
	}
	for _, label := range strings.Split(domain, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' {
			return false
		}
		for _, c := range label {
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return false
			}
		}
	}
	return true
}
