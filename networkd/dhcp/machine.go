package dhcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// Phase is where a client stands, as in RFC 2131 figure 5. INIT-REBOOT and REBOOTING are one, so are INIT and SELECTING.
type Phase uint8

const (
	Selecting  Phase = iota // asks for offers
	Requesting              // took an offer, waits for the acknowledgement
	Rebooting               // has a lease from before, asks whether it still holds
	Bound                   // has a lease and nothing to do
	Renewing                // asks the server that granted the lease
	Rebinding               // asks any server
)

func (p Phase) String() string {
	return [...]string{"selecting", "requesting", "rebooting", "bound", "renewing", "rebinding"}[p]
}

// Pauses between repetitions, before the random part of a tenth.
const (
	firstPause  = time.Second
	maxPause    = 64 * time.Second
	renewPause  = time.Minute // least pause while renewing and rebinding
	maxRequests = 4           // then the offer, or the hope that the old lease holds, is given up
)

// Identity is what a client says of itself.
type Identity struct {
	Hardware net.HardwareAddr
	Hostname string // "": not said
}

// Message is a packet to send.
type Message struct {
	Packet *dhcpv4.DHCPv4
	// To is the server; invalid means everybody.
	To netip.Addr
}

// Machine is the state of one client. It does no I/O and reads no clock; now is CLOCK_BOOTTIME and must not go back.
// It belongs to one goroutine.
type Machine struct {
	id    Identity
	rand  *rand.Rand
	phase Phase
	xid   dhcpv4.TransactionID
	tries int           // packets sent in this phase
	began time.Duration // of this exchange, for the secs field
	sent  time.Duration // of the last packet
	next  time.Duration // when to act again
	offer *dhcpv4.DHCPv4
	lease *Lease
}

// NewMachine returns a client that acts at once. lease may be one from before a restart; an expired one is forgotten.
func NewMachine(id Identity, r *rand.Rand, lease *Lease, now time.Duration) *Machine {
	m := &Machine{id: id, rand: r}
	if lease != nil && now < lease.Expire {
		m.lease = lease
		m.enter(Rebooting, now, now)
	} else {
		m.enter(Selecting, now, now)
	}
	return m
}

// Lease returns the lease that may be used, or nil. The result must not be changed.
func (m *Machine) Lease() *Lease { return m.lease }

// Phase returns where the client stands.
func (m *Machine) Phase() Phase { return m.phase }

// Deadline is when Tick wants to be called.
func (m *Machine) Deadline() time.Duration { return m.next }

// Kick makes the client look again at once, for example because the cable was plugged in: a lease is checked, not dropped. An
// exchange that has begun goes on: its answer may be on the way.
func (m *Machine) Kick(now time.Duration) {
	switch {
	case m.phase == Selecting && m.tries > 0:
		m.tries, m.next = 0, now
	case m.phase == Requesting, m.phase == Rebooting && m.tries > 0:
		m.next = now
	case m.lease != nil:
		m.enter(Rebooting, now, now)
	}
}

func (m *Machine) enter(p Phase, now, next time.Duration) {
	m.phase, m.tries, m.began, m.next = p, 0, now, next
	if p != Requesting { // a request belongs to the exchange of its offer
		m.offer = nil
		u := m.rand.Uint32()
		m.xid = dhcpv4.TransactionID{byte(u >> 24), byte(u >> 16), byte(u >> 8), byte(u)}
	}
}

// Tick does what is due, and returns what to send; nil if nothing. Before Deadline it does nothing.
func (m *Machine) Tick(now time.Duration) *Message {
	if now < m.next {
		return nil
	}
	if m.lease != nil {
		m.age(now)
	}
	switch m.phase {
	case Bound: // before its time
		m.next = m.lease.Renew
		return nil
	case Requesting:
		if m.tries >= maxRequests {
			m.enter(Selecting, now, now)
		}
	}
	m.tries++
	m.sent = now
	m.next = m.repeat(now)
	return m.message(now)
}

// age moves a client with a lease to the phase that the lease's times say.
func (m *Machine) age(now time.Duration) {
	l := m.lease
	unanswered := m.phase == Rebooting && m.tries >= maxRequests
	switch {
	case now >= l.Expire:
		m.lease = nil
		m.enter(Selecting, now, now)
	case m.phase == Rebooting && !unanswered:
	case now >= l.Rebind:
		if m.phase != Rebinding {
			m.enter(Rebinding, now, now)
		}
	case now >= l.Renew:
		if m.phase != Renewing {
			m.enter(Renewing, now, now)
		}
	case unanswered: // RFC 2131 3.2: the lease may be used for the rest of its time
		m.enter(Bound, now, l.Renew)
	}
}

// repeat returns when to send again if nobody answers.
func (m *Machine) repeat(now time.Duration) time.Duration {
	half := func(until time.Duration) time.Duration {
		return min(now+max((until-now)/2, renewPause), until)
	}
	switch m.phase {
	case Renewing:
		return half(m.lease.Rebind)
	case Rebinding:
		return half(m.lease.Expire)
	}
	pause := min(firstPause<<min(m.tries-1, 10), maxPause)
	next := now + pause + time.Duration(m.rand.Int64N(int64(pause/10)))
	if m.lease != nil {
		next = min(next, m.lease.Expire)
	}
	return next
}

func (m *Machine) message(now time.Duration) *Message {
	mods := []dhcpv4.Modifier{
		dhcpv4.WithTransactionID(m.xid),
		dhcpv4.WithHwAddr(m.id.Hardware),
		dhcpv4.WithOption(dhcpv4.OptClientIdentifier(append([]byte{1}, m.id.Hardware...))),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500)),
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRouter,
			dhcpv4.OptionDomainNameServer, dhcpv4.OptionDomainName, dhcpv4.OptionDNSDomainSearchList, dhcpv4.OptionInterfaceMTU),
	}
	if m.id.Hostname != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(m.id.Hostname)))
	}
	out := &Message{}
	kind := dhcpv4.MessageTypeRequest
	ip := func(a netip.Addr) net.IP { return a.AsSlice() }
	switch m.phase {
	case Selecting:
		kind = dhcpv4.MessageTypeDiscover
	case Requesting:
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(m.offer.YourIPAddr)),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(m.offer.ServerIdentifier())))
	case Rebooting:
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(ip(m.lease.Address.Addr()))))
	case Renewing, Rebinding:
		mods = append(mods, dhcpv4.WithClientIP(ip(m.lease.Address.Addr())))
		if m.phase == Renewing {
			out.To = m.lease.Server
		}
	}
	p, err := dhcpv4.New(append(mods, dhcpv4.WithMessageType(kind))...)
	if err != nil { // New fails only if the system has no randomness, which it asks for although it is given a number
		panic(fmt.Sprintf("dhcp: make packet: %v", err))
	}
	p.NumSeconds = uint16(min((now-m.began)/time.Second, 0xffff))
	out.Packet = p
	return out
}

// Receive takes a packet that came in, and returns what to send next; nil if nothing. Packets for others, late ones and
// nonsense change nothing; why is in the error, for a debug log.
func (m *Machine) Receive(now time.Duration, p *dhcpv4.DHCPv4) (*Message, error) {
	if p.OpCode != dhcpv4.OpcodeBootReply || p.TransactionID != m.xid || !bytes.Equal(p.ClientHWAddr, m.id.Hardware) {
		return nil, nil
	}
	switch kind := p.MessageType(); {
	case kind == dhcpv4.MessageTypeOffer && m.phase == Selecting:
		if _, ok := unicast(p.ServerIdentifier()); !ok {
			return nil, fmt.Errorf("offer without a server identifier")
		}
		if _, err := fromAck(p, now); err != nil {
			return nil, fmt.Errorf("offer: %w", err)
		}
		m.offer = p
		m.enter(Requesting, m.began, now)
		return m.Tick(now), nil
	case kind == dhcpv4.MessageTypeAck && m.phase != Selecting && m.phase != Bound:
		if m.phase == Requesting && !p.ServerIdentifier().Equal(m.offer.ServerIdentifier()) {
			return nil, fmt.Errorf("acknowledgement from %v, asked %v", p.ServerIdentifier(), m.offer.ServerIdentifier())
		}
		l, err := fromAck(p, m.sent)
		if err != nil {
			return nil, fmt.Errorf("acknowledgement: %w", err)
		}
		if !l.Server.IsValid() && m.lease != nil {
			l.Server = m.lease.Server
		}
		m.lease = l
		m.enter(Bound, now, l.Renew)
	case kind == dhcpv4.MessageTypeNak && m.phase != Selecting && m.phase != Bound:
		if m.phase == Requesting && !p.ServerIdentifier().Equal(m.offer.ServerIdentifier()) {
			return nil, fmt.Errorf("refusal from %v, asked %v", p.ServerIdentifier(), m.offer.ServerIdentifier())
		}
		// The pause keeps client and server from refusing each other as fast as they can.
		m.lease = nil
		m.enter(Selecting, now, now+firstPause)
	}
	return nil, nil
}
