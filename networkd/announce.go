package networkd

import (
	"encoding/binary"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// arpAnnouncement is the body of an ARP announcement (RFC 5227 section 2.3): an address asks for itself, so that neighbours who
// know it from another machine learn where it is now.
func arpAnnouncement(hardware net.HardwareAddr, a netip.Addr) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, 1} // Ethernet, IPv4, lengths of their addresses, request
	p = append(p, hardware...)
	p = append(p, a.AsSlice()...)
	p = append(p, 0, 0, 0, 0, 0, 0) // nobody: that is asked
	return append(p, a.AsSlice()...)
}

var allNodes = netip.MustParseAddr("ff02::1")

// advertisement is an unsolicited neighbour advertisement to all nodes (RFC 4861 section 4.4) with its IPv6 header.
func advertisement(hardware net.HardwareAddr, a netip.Addr) []byte {
	const router, override = 1 << 31, 1 << 29 // a node forwards, so it is one
	body := []byte{136, 0, 0, 0}
	body = binary.BigEndian.AppendUint32(body, router|override)
	body = append(body, a.AsSlice()...)
	body = append(append(body, 2, 1), hardware...) // target link-layer address, in units of 8 bytes

	pseudo := append(a.AsSlice(), allNodes.AsSlice()...) // RFC 8200 section 8.1
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(body)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(body[2:], checksum(append(pseudo, body...)))

	head := []byte{6 << 4, 0, 0, 0}
	head = binary.BigEndian.AppendUint16(head, uint16(len(body)))
	head = append(head, unix.IPPROTO_ICMPV6, 255)
	head = append(head, a.AsSlice()...)
	head = append(head, allNodes.AsSlice()...)
	return append(head, body...)
}

// checksum is that of RFC 1071; the length of b is even.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// announce tells the neighbours on a link that an address is here.
func announce(index int, hardware net.HardwareAddr, a netip.Addr) error {
	if len(hardware) != 6 {
		return nil // no Ethernet: nobody there remembers hardware addresses
	}
	to, protocol, packet := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, uint16(unix.ETH_P_ARP), arpAnnouncement
	if a.Is6() {
		to, protocol, packet = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, unix.ETH_P_IPV6, advertisement
	}
	network := protocol<<8 | protocol>>8 // in network order, on the little-endian machines that there are
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	addr := &unix.SockaddrLinklayer{Protocol: network, Ifindex: index, Halen: 6}
	copy(addr.Addr[:], to)
	return unix.Sendto(fd, packet(hardware, a), 0, addr)
}
