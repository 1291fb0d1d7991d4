package lan

import (
	"encoding/binary"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// A machine that has no configuration yet asks for addresses on all its links, and must be reachable for the nodes it is to join. So the switch answers for the
// network, which has no other host of its own: always with the port's one address, and without a router, because there is none.

const (
	leaseTime  = 24 * time.Hour
	clientPort = 68
	serverPort = 67

	headEthernet, headIP, headUDP = 14, 20, 8
)

// serverMAC is the switch's own, locally administered.
var serverMAC = mac{0x52, 0x54, 0x00, 0, 0, 1}

// dhcpAnswer returns the frame, with its length before it, that answers a DHCP client's; nil if this is none, or needs no answer. It is pure.
func dhcpAnswer(address netip.Prefix, frame []byte) []byte {
	payload := udp(frame, serverPort)
	if payload == nil || !address.Addr().Is4() {
		return nil
	}
	ask, err := dhcpv4.FromBytes(payload)
	if err != nil || ask.OpCode != dhcpv4.OpcodeBootRequest {
		return nil
	}
	own, server := net.IP(address.Addr().AsSlice()), net.IP(lastHost(address).AsSlice())
	kind := dhcpv4.MessageTypeOffer
	switch ask.MessageType() {
	case dhcpv4.MessageTypeDiscover:
	case dhcpv4.MessageTypeRequest:
		kind = dhcpv4.MessageTypeAck
		want := ask.RequestedIPAddress()
		if len(want) == 0 || want.IsUnspecified() {
			want = ask.ClientIPAddr
		}
		if !want.Equal(own) { // the lease of another network
			kind = dhcpv4.MessageTypeNak
		}
	default:
		return nil
	}
	opts := []dhcpv4.Modifier{dhcpv4.WithMessageType(kind), dhcpv4.WithServerIP(server), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(server))}
	if kind != dhcpv4.MessageTypeNak {
		opts = append(opts, dhcpv4.WithYourIP(own), dhcpv4.WithLeaseTime(uint32(leaseTime.Seconds())), dhcpv4.WithNetmask(net.CIDRMask(address.Bits(), 32)))
	}
	reply, err := dhcpv4.NewReplyFromRequest(ask, opts...)
	if err != nil {
		return nil
	}
	return udpFrame(mac(frame[6:12]), server, reply.ToBytes())
}

// lastHost is the network's last address but the broadcast's: the server's.
func lastHost(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	n := binary.BigEndian.Uint32(b[:]) | (1<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(b[:], n-1)
	return netip.AddrFrom4(b)
}

// udp returns what an Ethernet frame holds for a UDP port over IPv4, nil if it does not.
func udp(frame []byte, port uint16) []byte {
	if len(frame) < headEthernet+headIP+headUDP || binary.BigEndian.Uint16(frame[12:]) != 0x0800 {
		return nil
	}
	ip := frame[headEthernet:]
	head := int(ip[0]&0x0f) * 4
	if ip[0]>>4 != 4 || ip[9] != 17 || head < headIP || len(ip) < head+headUDP || binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 { // no fragments
		return nil
	}
	u := ip[head:]
	n := int(binary.BigEndian.Uint16(u[4:]))
	if binary.BigEndian.Uint16(u[2:]) != port || n < headUDP || n > len(u) {
		return nil
	}
	return u[headUDP:n]
}

// udpFrame is a datagram to a client that may have no address yet: it goes to its Ethernet address and to IP's broadcast.
func udpFrame(to mac, server net.IP, payload []byte) []byte {
	n := headIP + headUDP + len(payload)
	f := make([]byte, prefix+headEthernet+n)
	binary.BigEndian.PutUint32(f, uint32(headEthernet+n))
	e := f[prefix:]
	copy(e, to[:])
	copy(e[6:], serverMAC[:])
	binary.BigEndian.PutUint16(e[12:], 0x0800)
	ip := e[headEthernet:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(n))
	copy(ip[12:], server.To4())
	copy(ip[16:], net.IPv4bcast.To4())
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip[:headIP]))
	u := ip[headIP:]
	binary.BigEndian.PutUint16(u, serverPort)
	binary.BigEndian.PutUint16(u[2:], clientPort)
	binary.BigEndian.PutUint16(u[4:], uint16(headUDP+len(payload))) // the checksum may be 0: none (RFC 768)
	copy(u[headUDP:], payload)
	return f
}

// sum is the Internet's checksum before its complement (RFC 1071), of an even number of bytes.
func sum(b []byte) uint16 {
	var n uint32
	for i := 0; i < len(b); i += 2 {
		n += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}
