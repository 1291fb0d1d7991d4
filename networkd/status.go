package networkd

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// gauges are networkd's figures. Labels are links that the spec manages, never those of pods.
type gauges struct {
	desired, observed, converged *metrics.Vec
	received, sent, carrier      *metrics.Vec
	lease, dropped               *metrics.Vec
}

func newGauges(s *metrics.Set) gauges {
	return gauges{
		desired:   s.Gauge("bulkhead_networkd_generation_desired", "Generation of the spec being worked towards; 0: none yet."),
		observed:  s.Gauge("bulkhead_networkd_generation_observed", "Newest generation that the network was found to agree with."),
		converged: s.Gauge("bulkhead_networkd_converged", "1 if the last look found nothing left to do."),
		received:  s.Counter("bulkhead_networkd_link_received_bytes_total", "Bytes received, by managed link.", "link"),
		sent:      s.Counter("bulkhead_networkd_link_sent_bytes_total", "Bytes sent, by managed link.", "link"),
		carrier:   s.Gauge("bulkhead_networkd_link_carrier", "1 if a managed link has a carrier.", "link"),
		lease:     s.Gauge("bulkhead_networkd_lease_remaining_seconds", "Time until the DHCP lease ends, by managed link.", "link"),
		dropped:   s.Counter("bulkhead_networkd_firewall_dropped_packets_total", "Packets that the firewall in force has dropped.", "family"),
	}
}

// report publishes what a round left. It is called by the loop's goroutine only.
func (d *Daemon) report(have State) {
	now := d.describe(have)
	d.measure(now, have)
	before, _ := d.status.Get()
	if !proto.Equal(lasting(before), lasting(now)) {
		d.status.Set(now) // last: who sees a status may ask for its figures
	}
}

func (d *Daemon) measure(now *networkv1.Status, have State) {
	g := d.gauges
	g.desired.Set(float64(now.Generation))
	g.converged.Set(0)
	if now.Converged {
		g.converged.Set(1)
		g.observed.Set(float64(now.Generation))
	}
	for _, v := range []*metrics.Vec{g.received, g.sent, g.carrier, g.lease, g.dropped} {
		v.Reset()
	}
	want := d.spec()
	for _, l := range have.Links {
		if want.interfaceOf(l) == nil {
			continue
		}
		name := string(l.Name)
		g.received.Set(float64(l.ReceivedBytes), name)
		g.sent.Set(float64(l.SentBytes), name)
		g.carrier.Set(0, name)
		if l.Carrier {
			g.carrier.Set(1, name)
		}
		if lease := leaseOf(have, l.Name); lease != nil {
			g.lease.Set((lease.Expire - dhcp.Now()).Seconds(), name)
		}
	}
	for _, t := range have.Tables {
		var n uint64
		for _, c := range t.Chains {
			for i, r := range c.Rules {
				if strings.HasSuffix(r, "-j DROP") && i < len(c.Packets) {
					n += c.Packets[i]
				}
			}
		}
		g.dropped.Set(float64(n), string(t.Family))
	}
}

// spec is what the loop works towards.
func (d *Daemon) spec() Spec {
	if s, generation := d.loop.Spec(); generation > 0 {
		return s
	}
	return bare(d.cfg.Hostname)
}

// lasting is a status without what changes all the time: watchers are not woken for it.
func lasting(s *networkv1.Status) *networkv1.Status {
	s = proto.CloneOf(s)
	for _, l := range s.Links {
		l.ReceivedBytes, l.SentBytes = 0, 0
	}
	for _, r := range s.Rules {
		r.Packets, r.Bytes = 0, 0
	}
	for _, l := range s.Leases {
		l.RemainingSeconds = 0
	}
	return s
}

// describe turns a state into a status.
func (d *Daemon) describe(have State) *networkv1.Status {
	want := d.spec()
	loop := d.loop.State()
	s := &networkv1.Status{
		Generation: loop.GetGeneration(), Converged: loop.GetConverged(), Pending: loop.GetPending(), Error: loop.GetError(),
		Hostname: strings.TrimSpace(have.Files[fileHostname]),
	}
	var managed []Link
	for _, l := range have.Links {
		if want.interfaceOf(l) != nil {
			managed = append(managed, l)
		}
		s.Links = append(s.Links, &networkv1.Link{
			Name: string(l.Name), Index: uint32(l.Index), Kind: l.Kind, HardwareAddress: l.Hardware, Mtu: uint32(l.MTU),
			Up: l.Up, Carrier: l.Carrier, ReceivedBytes: l.ReceivedBytes, SentBytes: l.SentBytes,
		})
	}
	for _, a := range have.Addresses {
		origin := a.Origin
		if origin == OriginKernel { // the proto knows three
			origin = OriginOther
		}
		s.Addresses = append(s.Addresses, &networkv1.Address{Link: string(a.Link), Address: a.Prefix.String(), Origin: string(origin)})
	}
	for _, r := range have.Routes {
		out := &networkv1.Route{Destination: r.To.String(), Link: string(r.Link), Metric: uint32(r.Metric), Origin: string(r.Origin)}
		if r.Via.IsValid() {
			out.Gateway = r.Via.String()
		}
		s.Routes = append(s.Routes, out)
	}
	s.Nameservers, s.SearchDomains = resolver(have.Files[fileResolver])
	s.Rules = append(rules(have.Tables, func(f Family) []rule { return ingress(want, managed, f) }), rules(have.Masquerade, func(f Family) []rule {
		if p := d.pods.Load(); p != nil {
			return masquerade(p, f)
		}
		return nil
	})...)
	for _, e := range have.DHCP {
		out := &networkv1.Lease{Link: e.Link}
		if l := e.Lease; l != nil {
			out.Address = l.Address.String()
			out.RemainingSeconds = uint64(max(l.Expire-dhcp.Now(), 0) / time.Second)
			if l.Server.IsValid() {
				out.Server = l.Server.String()
			}
		}
		s.Leases = append(s.Leases, out)
	}
	return s
}

// rules lists the chains in force, IPv4 first. Rules that are not networkd's are shown as iptables writes them.
func rules(tables []Table, written func(Family) []rule) []*networkv1.Rule {
	var out []*networkv1.Rule
	for _, t := range tables {
		known := map[string]string{}
		for _, r := range written(t.Family) {
			known[r.args] = r.text
		}
		for _, c := range t.Chains {
			if !slices.Contains(t.Jumps, c.Name) {
				continue
			}
			for i, args := range c.Rules {
				text, ok := known[args]
				if !ok {
					text = args
				}
				r := &networkv1.Rule{Text: string(t.Family) + " " + text}
				if i < len(c.Packets) {
					r.Packets, r.Bytes = c.Packets[i], c.Bytes[i]
				}
				out = append(out, r)
			}
		}
	}
	return out
}

// resolver reads the file that files wrote.
func resolver(text string) (nameservers, domains []string) {
	for _, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "nameserver":
			nameservers = append(nameservers, f[1])
		case len(f) > 1 && f[0] == "search":
			domains = append(domains, f[1:]...)
		}
	}
	return nameservers, domains
}
