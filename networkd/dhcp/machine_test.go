package dhcp

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

var (
	hardware = net.HardwareAddr{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	server   = net.IPv4(10, 0, 2, 2)
	rival    = net.IPv4(10, 0, 2, 9)
)

// table is one machine under test with a clock, and a log of what it does.
type table struct {
	*Machine
	now  time.Duration
	last *dhcpv4.DHCPv4 // sent
	log  strings.Builder
}

func begin(l *Lease) *table {
	return &table{Machine: NewMachine(Identity{Hardware: hardware, Hostname: "n1"}, rand.New(rand.NewPCG(1, 2)), l, 0)}
}

func (t *table) note(m *Message) {
	if m == nil {
		return
	}
	t.last = m.Packet
	to := "everybody"
	if m.To.IsValid() {
		to = m.To.String()
	}
	fmt.Fprintf(&t.log, "%s %s %s", t.now.Round(time.Second), m.Packet.MessageType(), to)
	if a := m.Packet.RequestedIPAddress(); a != nil {
		fmt.Fprintf(&t.log, " wants %s", a)
	}
	if a := m.Packet.ClientIPAddr; !a.IsUnspecified() {
		fmt.Fprintf(&t.log, " has %s", a)
	}
	if a := m.Packet.ServerIdentifier(); a != nil {
		fmt.Fprintf(&t.log, " of %s", a)
	}
	t.log.WriteByte('\n')
}

// until lets time pass, from deadline to deadline.
func (t *table) until(end time.Duration) {
	for t.Deadline() <= end {
		t.now = max(t.now, t.Deadline())
		t.note(t.Tick(t.now))
	}
	t.now = end
}

func (t *table) answer(kind dhcpv4.MessageType, from net.IP, mods ...dhcpv4.Modifier) {
	p, err := dhcpv4.NewReplyFromRequest(t.last, append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(net.IPv4(10, 0, 2, 15)), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(from)), dhcpv4.WithRouter(server), dhcpv4.WithDNS(net.IPv4(10, 0, 2, 3)),
		dhcpv4.WithLeaseTime(3600)}, mods...)...)
	if err != nil {
		panic(err)
	}
	m, err := t.Receive(t.now, p)
	if err != nil {
		fmt.Fprintf(&t.log, "%s ignored: %v\n", t.now.Round(time.Second), err)
	}
	t.note(m)
	l := "none"
	if t.Lease() != nil {
		l = t.Lease().Address.String()
	}
	fmt.Fprintf(&t.log, "%s %s: %s, lease %s\n", t.now.Round(time.Second), kind, t.Phase(), l)
}

func (t *table) bound() {
	t.until(t.now)
	t.answer(dhcpv4.MessageTypeOffer, server)
	t.answer(dhcpv4.MessageTypeAck, server)
}

func TestMachine(t *testing.T) {
	const offer, ack, nak = dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak
	bound := "0s DISCOVER everybody\n0s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n0s OFFER: requesting, lease none\n0s ACK: bound, lease 10.0.2.15/24\n"
	old := &Lease{Address: netip.MustParsePrefix("10.0.2.15/24"), Server: netip.MustParseAddr("10.0.2.2"), Renew: 100 * time.Second, Rebind: 200 * time.Second, Expire: 300 * time.Second}
	tests := []struct {
		name string
		old  *Lease
		do   func(*table)
		log  string
	}{
		{"from nothing to a lease", nil, (*table).bound, bound},
		{"nobody answers: ever slower", nil, func(t *table) { t.until(130 * time.Second) },
			"0s DISCOVER everybody\n1s DISCOVER everybody\n3s DISCOVER everybody\n8s DISCOVER everybody\n16s DISCOVER everybody\n32s DISCOVER everybody\n1m5s DISCOVER everybody\n"},
		{"the offer is forgotten by its server", nil, func(t *table) { t.until(0); t.answer(offer, server); t.until(16 * time.Second) },
			"0s DISCOVER everybody\n0s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n0s OFFER: requesting, lease none\n" +
				"1s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n3s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n7s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n15s DISCOVER everybody\n"},
		{"an offer without server, a rival's acknowledgement, a second offer: ignored", nil, func(t *table) {
			t.until(0)
			t.answer(offer, net.IPv4zero)
			t.answer(ack, server)
			t.answer(offer, server)
			t.answer(ack, rival)
			t.answer(offer, rival)
		}, "0s DISCOVER everybody\n0s ignored: offer without a server identifier\n0s OFFER: selecting, lease none\n0s ACK: selecting, lease none\n" +
			"0s REQUEST everybody wants 10.0.2.15 of 10.0.2.2\n0s OFFER: requesting, lease none\n0s ignored: acknowledgement from 10.0.2.9, asked 10.0.2.2\n0s ACK: requesting, lease none\n0s OFFER: requesting, lease none\n"},
		{"renewed", nil, func(t *table) {
			t.bound()
			t.until(1800 * time.Second)
			t.answer(ack, server)
			t.until(3599 * time.Second)
		},
			bound + "30m0s REQUEST 10.0.2.2 has 10.0.2.15\n30m0s ACK: bound, lease 10.0.2.15/24\n"},
		{"the server is gone: renew, rebind, expire, start over", nil, func(t *table) { t.bound(); t.until(3601 * time.Second) }, bound +
			"30m0s REQUEST 10.0.2.2 has 10.0.2.15\n41m15s REQUEST 10.0.2.2 has 10.0.2.15\n46m53s REQUEST 10.0.2.2 has 10.0.2.15\n49m41s REQUEST 10.0.2.2 has 10.0.2.15\n" +
			"51m6s REQUEST 10.0.2.2 has 10.0.2.15\n52m6s REQUEST 10.0.2.2 has 10.0.2.15\n52m30s REQUEST everybody has 10.0.2.15\n56m15s REQUEST everybody has 10.0.2.15\n" +
			"58m8s REQUEST everybody has 10.0.2.15\n59m8s REQUEST everybody has 10.0.2.15\n1h0m0s DISCOVER everybody\n"},
		{"refused while renewing: start over, after a pause", nil, func(t *table) {
			t.bound()
			t.until(1800 * time.Second)
			t.answer(nak, server)
			t.until(1801 * time.Second)
		}, bound + "30m0s REQUEST 10.0.2.2 has 10.0.2.15\n30m0s NAK: selecting, lease none\n30m1s DISCOVER everybody\n"},
		{"another server takes over while rebinding", nil, func(t *table) {
			t.bound()
			t.until(1799 * time.Second)
			t.now = 3200 * time.Second // the machine slept
			t.until(t.now)
			t.answer(ack, rival)
		}, bound + "53m20s REQUEST everybody has 10.0.2.15\n53m20s ACK: bound, lease 10.0.2.15/24\n"},
		{"a lease from before is checked", old, func(t *table) { t.until(0); t.answer(ack, server) },
			"0s REQUEST everybody wants 10.0.2.15\n0s ACK: bound, lease 10.0.2.15/24\n"},
		{"a lease from before, of another network", old, func(t *table) { t.until(0); t.answer(nak, rival) },
			"0s REQUEST everybody wants 10.0.2.15\n0s NAK: selecting, lease none\n"},
		{"a lease from before, nobody answers: used for the rest of its time", old, func(t *table) { t.until(150 * time.Second) },
			"0s REQUEST everybody wants 10.0.2.15\n1s REQUEST everybody wants 10.0.2.15\n3s REQUEST everybody wants 10.0.2.15\n8s REQUEST everybody wants 10.0.2.15\n1m40s REQUEST 10.0.2.2 has 10.0.2.15\n"},
		{"the cable was pulled and put back", nil, func(t *table) { t.bound(); t.Kick(t.now); t.until(0); t.answer(ack, server) },
			bound + "0s REQUEST everybody wants 10.0.2.15\n0s ACK: bound, lease 10.0.2.15/24\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := begin(tt.old)
			tt.do(b)
			if got := b.log.String(); got != tt.log {
				t.Errorf("got\n%swant\n%s", got, tt.log)
			}
		})
	}
}

// An address is held exactly from the acknowledgement to its end, whatever the server does in between.
func TestExpiredLeaseIsGone(t *testing.T) {
	b := begin(nil)
	b.bound()
	b.until(3600*time.Second - 1)
	if b.Lease() == nil {
		t.Error("the lease is gone before its end")
	}
	b.until(3600 * time.Second)
	if b.Lease() != nil {
		t.Error("the lease is there after its end")
	}
}

func TestLease(t *testing.T) {
	ack := func(mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
		p, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithYourIP(net.IPv4(10, 0, 2, 15)), dhcpv4.WithNetmask(net.CIDRMask(24, 32))}, mods...)...)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	route := func(to string, bits int, via net.IP) *dhcpv4.Route {
		return &dhcpv4.Route{Dest: &net.IPNet{IP: net.ParseIP(to).To4(), Mask: net.CIDRMask(bits, 32)}, Router: via}
	}
	tests := []struct {
		name string
		ack  *dhcpv4.DHCPv4
		want string // "!" and the error
	}{
		{"least", ack(), "10.0.2.15/24 [] [] [] 0 30m0s 52m30s 1h0m0s"},
		{"router outside of the subnet", ack(dhcpv4.WithNetmask(net.CIDRMask(32, 32)), dhcpv4.WithRouter(server)),
			"10.0.2.15/32 [{10.0.2.2/32 invalid IP} {0.0.0.0/0 10.0.2.2}] [] [] 0 30m0s 52m30s 1h0m0s"},
		{"classless routes go before the router", ack(dhcpv4.WithRouter(rival), dhcpv4.WithOption(dhcpv4.OptClasslessStaticRoute(
			route("10.9.0.0", 16, server), route("192.0.2.1", 32, net.IPv4zero), route("10.8.0.0", 16, net.IPv4bcast)))),
			"10.0.2.15/24 [{10.9.0.0/16 10.0.2.2} {192.0.2.1/32 invalid IP}] [] [] 0 30m0s 52m30s 1h0m0s"},
		{"addresses that are none", ack(dhcpv4.WithRouter(net.IPv4bcast), dhcpv4.WithDNS(net.IPv4(127, 0, 0, 1), net.IPv4(224, 0, 0, 1), server)),
			"10.0.2.15/24 [] [10.0.2.2] [] 0 30m0s 52m30s 1h0m0s"},
		{"a domain that would write resolv.conf", ack(dhcpv4.WithOption(dhcpv4.OptDomainName("Good.example.\nnameserver 6.6.6.6 -x a..b"))),
			"10.0.2.15/24 [] [] [good.example nameserver 6.6.6.6] 0 30m0s 52m30s 1h0m0s"},
		{"tiny MTU, senseless times, a lease of one second", ack(dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{0, 68}), dhcpv4.WithLeaseTime(1),
			dhcpv4.WithGeneric(dhcpv4.OptionRenewTimeValue, []byte{255, 0, 0, 0}), dhcpv4.WithGeneric(dhcpv4.OptionRebindingTimeValue, []byte{0, 0, 0, 0})),
			"10.0.2.15/24 [] [] [] 0 4.375s 8.75s 10s"},
		{"for ever", ack(dhcpv4.WithLeaseTime(0xffffffff)), "10.0.2.15/24 [] [] [] 0 596523h14m7.5s 1043915h39m43.125s 1193046h28m15s"},
		{"no address", ack(dhcpv4.WithYourIP(net.IPv4zero)), "!yiaddr: 0.0.0.0 is no address that a host can have"},
		{"loopback", ack(dhcpv4.WithYourIP(net.IPv4(127, 0, 0, 1))), "!yiaddr: 127.0.0.1 is no address that a host can have"},
		{"mask with holes", ack(dhcpv4.WithNetmask(net.IPv4Mask(255, 0, 255, 0))), "!subnet mask: ff00ff00 is none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l, err := fromAck(tt.ack, 0)
			got := ""
			if err != nil {
				got = "!" + err.Error()
			} else {
				got = fmt.Sprint(l.Address, l.Routes, l.Nameservers, l.Domains, l.MTU, l.Renew, l.Rebind, l.Expire)
			}
			if strings.ReplaceAll(got, " ", "") != strings.ReplaceAll(tt.want, " ", "") {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// Whatever comes in: no panic, time goes on, and a lease is one that a host can have and that ends.
func FuzzMachine(f *testing.F) {
	b := begin(nil)
	b.until(0)
	f.Add(b.last.ToBytes(), []byte{0, 2, 9})
	b.answer(dhcpv4.MessageTypeOffer, server)
	f.Add(b.last.ToBytes(), []byte{0, 5, 5, 200, 6})
	testfuzz.Run(f, func(t *testing.T, packet, script []byte) {
		p, err := dhcpv4.FromBytes(packet)
		if err != nil {
			return
		}
		b := begin(nil)
		for _, c := range script[:min(len(script), 64)] {
			b.until(b.now + time.Duration(c)*7*time.Second)
			if b.last == nil {
				continue
			}
			p.OpCode, p.TransactionID, p.ClientHWAddr = dhcpv4.OpcodeBootReply, b.last.TransactionID, hardware
			p.UpdateOption(dhcpv4.OptMessageType([]dhcpv4.MessageType{dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak}[c%3]))
			m, _ := b.Receive(b.now, p)
			b.note(m)
			if l := b.Lease(); l != nil {
				if _, ok := unicast(l.Address.Addr().AsSlice()); !ok || l.Renew >= l.Rebind || l.Rebind >= l.Expire || l.Expire <= b.now {
					t.Fatalf("at %s: lease %+v", b.now, l)
				}
			}
			if b.Deadline() < b.now-time.Second {
				t.Fatalf("at %s: deadline %s", b.now, b.Deadline())
			}
		}
	})
}
