package networkd

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// Messages that netlink's own types lack a field for: the origin of an address (IFA_PROTO, Linux 5.18), and promote_secondaries.

const (
	ifaProto           = 11 // IFA_PROTO
	inetConf           = 1  // IFLA_INET_CONF
	devconfPromote     = 20 // IPV4_DEVCONF_PROMOTE_SECONDARIES
	lowestStats64      = 32 // bytes of rtnl_link_stats64 that are read here
	protoKernelLo      = 1  // IFAPROT_KERNEL_LO
	protoKernelLL      = 3  // IFAPROT_KERNEL_LL; 2 is from router advertisements
	statsReceivedBytes = 16 // offset of rx_bytes; tx_bytes follows
)

// dump asks for all objects of a kind.
func dump(kind uint16, message nl.NetlinkRequestData, answer uint16) ([][]byte, error) {
	return again(func() ([][]byte, error) {
		req := nl.NewNetlinkRequest(int(kind), unix.NLM_F_DUMP)
		req.AddData(message)
		return req.Execute(unix.NETLINK_ROUTE, answer)
	})
}

func readLinks() ([]Link, error) {
	messages, err := dump(unix.RTM_GETLINK, nl.NewIfInfomsg(unix.AF_UNSPEC), unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	var out []Link
	for _, m := range messages {
		l, err := parseLink(m)
		if err != nil {
			return nil, err
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b Link) int { return strings.Compare(string(a.Name), string(b.Name)) })
	return out, nil
}

func parseLink(m []byte) (Link, error) {
	if len(m) < unix.SizeofIfInfomsg {
		return Link{}, fmt.Errorf("a link's message has %d bytes, %d at least are needed", len(m), unix.SizeofIfInfomsg)
	}
	msg := nl.DeserializeIfInfomsg(m)
	attrs, err := attributes(m[unix.SizeofIfInfomsg:])
	if err != nil {
		return Link{}, err
	}
	l := Link{
		Index: int(msg.Index), Kind: "device",
		Up: msg.Flags&unix.IFF_UP != 0, Carrier: msg.Flags&unix.IFF_LOWER_UP != 0, Loopback: msg.Flags&unix.IFF_LOOPBACK != 0,
	}
	member := false
	for _, a := range attrs {
		switch v := a.Value; a.Attr.Type & nl.NLA_TYPE_MASK {
		case unix.IFLA_IFNAME:
			l.Name = config.LinkName(text(v))
		case unix.IFLA_ADDRESS:
			if len(v) == 6 && !l.Loopback {
				l.Hardware = net.HardwareAddr(v).String()
			}
		case unix.IFLA_MTU:
			l.MTU = int(number(v))
		case unix.IFLA_MASTER:
			member = number(v) != 0
		case unix.IFLA_LINKINFO:
			for _, k := range nested(v) {
				if k.Attr.Type&nl.NLA_TYPE_MASK == unix.IFLA_INFO_KIND {
					l.Kind = text(k.Value)
				}
			}
		case unix.IFLA_STATS64:
			if len(v) >= lowestStats64 {
				l.ReceivedBytes = nl.NativeEndian().Uint64(v[statsReceivedBytes:])
				l.SentBytes = nl.NativeEndian().Uint64(v[statsReceivedBytes+8:])
			}
		case unix.IFLA_AF_SPEC:
			l.Promote = promotes(v)
		}
	}
	l.Physical = l.Kind == "device" && msg.Type == unix.ARPHRD_ETHER && !l.Loopback && !member
	return l, nil
}

// promotes reads promote_secondaries out of a link's configuration for each family.
func promotes(spec []byte) bool {
	for _, family := range nested(spec) {
		if family.Attr.Type&nl.NLA_TYPE_MASK != unix.AF_INET {
			continue
		}
		for _, a := range nested(family.Value) {
			at := (devconfPromote - 1) * 4
			if a.Attr.Type&nl.NLA_TYPE_MASK == inetConf && len(a.Value) >= at+4 {
				return number(a.Value[at:]) != 0
			}
		}
	}
	return false
}

func setPromote(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil).AddRtAttr(devconfPromote, nl.Uint32Attr(1))
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func readAddresses(byIndex map[int]config.LinkName) ([]Address, error) {
	messages, err := dump(unix.RTM_GETADDR, nl.NewIfAddrmsg(unix.AF_UNSPEC), unix.RTM_NEWADDR)
	if err != nil {
		return nil, err
	}
	var out []Address
	for _, m := range messages {
		if len(m) < unix.SizeofIfAddrmsg {
			return nil, fmt.Errorf("an address's message has %d bytes, %d at least are needed", len(m), unix.SizeofIfAddrmsg)
		}
		msg := nl.DeserializeIfAddrmsg(m)
		attrs, err := attributes(m[unix.SizeofIfAddrmsg:])
		if err != nil {
			return nil, err
		}
		a := Address{Link: byIndex[int(msg.Index)], Origin: OriginOther}
		var local, any netip.Addr // IFA_ADDRESS is the peer of a point-to-point link; IPv6 has no IFA_LOCAL
		for _, at := range attrs {
			switch at.Attr.Type {
			case unix.IFA_LOCAL:
				local = addr(at.Value)
			case unix.IFA_ADDRESS:
				any = addr(at.Value)
			case ifaProto:
				a.Origin = originOf(at.Value)
			}
		}
		if !local.IsValid() {
			local = any
		}
		if a.Prefix = netip.PrefixFrom(local, int(msg.Prefixlen)); a.Prefix.IsValid() {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b Address) int {
		if c := strings.Compare(string(a.Link), string(b.Link)); c != 0 {
			return c
		}
		return strings.Compare(a.Prefix.String(), b.Prefix.String())
	})
	return out, nil
}

func originOf(v []byte) Origin {
	switch {
	case len(v) != 1:
	case v[0] == marks[OriginStatic]:
		return OriginStatic
	case v[0] == marks[OriginDHCP]:
		return OriginDHCP
	case v[0] == marks[OriginVirtual]:
		return OriginVirtual
	case v[0] >= protoKernelLo && v[0] <= protoKernelLL:
		return OriginKernel
	}
	return OriginOther
}

func addAddress(index int, a Address) error {
	req := addressRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, index, a)
	req.AddData(nl.NewRtAttr(ifaProto, []byte{marks[a.Origin]}))
	if a.Prefix.Addr().Is4() && a.Prefix.Bits() < 31 {
		b := a.Prefix.Masked().Addr().As4()
		for i := a.Prefix.Bits(); i < 32; i++ {
			b[i/8] |= 0x80 >> (i % 8)
		}
		req.AddData(nl.NewRtAttr(unix.IFA_BROADCAST, b[:]))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// holdAddress adds an address that the kernel takes away at a moment of CLOCK_BOOTTIME, or lets it stay until then. It is never chosen as the sender of
// what the node sends by itself (its preferred time is over: RFC 6724 section 5, rule 3; in IPv4 it is the last of its link), and it is
// used at once: whether another node still has it, etcd has decided.
func holdAddress(index int, a Address, until time.Duration) error {
	seconds := (until - dhcp.Now()) / time.Second // the kernel counts in these
	if seconds < 1 {
		return errs.New(errs.Precondition, "less than a second is left")
	}
	req := addressRequest(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK, index, a)
	req.AddData(nl.NewRtAttr(ifaProto, []byte{marks[a.Origin]}))
	lifetimes := make([]byte, 16) // struct ifa_cacheinfo: preferred, valid, two time stamps
	nl.NativeEndian().PutUint32(lifetimes[4:], uint32(seconds))
	req.AddData(nl.NewRtAttr(unix.IFA_CACHEINFO, lifetimes))
	if a.Prefix.Addr().Is6() {
		req.AddData(nl.NewRtAttr(unix.IFA_FLAGS, nl.Uint32Attr(unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE)))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func deleteAddress(index int, a Address) error {
	_, err := addressRequest(unix.RTM_DELADDR, unix.NLM_F_ACK, index, a).Execute(unix.NETLINK_ROUTE, 0)
	return ignore(err, unix.EADDRNOTAVAIL)
}

func addressRequest(kind, flags, index int, a Address) *nl.NetlinkRequest {
	family := unix.AF_INET
	if a.Prefix.Addr().Is6() {
		family = unix.AF_INET6
	}
	req := nl.NewNetlinkRequest(kind, flags)
	msg := nl.NewIfAddrmsg(family)
	msg.Index, msg.Prefixlen = uint32(index), uint8(a.Prefix.Bits())
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, a.Prefix.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, a.Prefix.Addr().AsSlice()))
	return req
}

// prolonged reports whether an event says no more than that a virtual address is there, or there for longer: that happens every second, and
// Hold itself wakes when one is new.
func prolonged(event []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(event)
	if err != nil || len(messages) == 0 {
		return false
	}
	for _, m := range messages {
		if m.Header.Type != unix.RTM_NEWADDR || len(m.Data) < unix.SizeofIfAddrmsg {
			return false
		}
		attrs, err := attributes(m.Data[unix.SizeofIfAddrmsg:])
		if err != nil || !slices.ContainsFunc(attrs, func(a syscall.NetlinkRouteAttr) bool {
			return a.Attr.Type == ifaProto && originOf(a.Value) == OriginVirtual
		}) {
			return false
		}
	}
	return true
}

// attributes takes a message's attributes apart (netlink(7)). The library's own function panics if the last one ends before its padding.
func attributes(b []byte) (all []syscall.NetlinkRouteAttr, err error) {
	for len(b) >= unix.SizeofRtAttr {
		size := int(nl.NativeEndian().Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return nil, fmt.Errorf("an attribute of %d bytes in the %d that are left of a message", size, len(b))
		}
		all = append(all, syscall.NetlinkRouteAttr{Attr: syscall.RtAttr{Len: uint16(size), Type: nl.NativeEndian().Uint16(b[2:])}, Value: b[unix.SizeofRtAttr:size]})
		b = b[min(len(b), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
	}
	return all, nil
}

// nested returns the attributes within one; none if they are malformed, which the kernel does not do.
func nested(v []byte) []syscall.NetlinkRouteAttr {
	attrs, err := attributes(v)
	if err != nil {
		return nil
	}
	return attrs
}

func text(v []byte) string { return string(bytes.TrimRight(v, "\x00")) }

func number(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return nl.NativeEndian().Uint32(v)
}

// addr returns an address of either family; invalid for anything else.
func addr(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a.Unmap()
}

// prefix returns a network's prefix; invalid for nil.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr(n.IP), ones)
}

func unspecified(family int) netip.Prefix {
	if family == netlink.FAMILY_V6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}
