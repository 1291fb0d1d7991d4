package twin

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// families are sockets that are opened. The name of a family is that in a unit, "" if no unit can have it.
var families = []struct {
	name, family string
	domain, kind int
	protocol     int
	caps         []string
}{
	{"unix, stream", "unix", unix.AF_UNIX, unix.SOCK_STREAM, 0, nil},
	{"unix, datagram", "unix", unix.AF_UNIX, unix.SOCK_DGRAM, 0, nil},
	{"TCP", "inet", unix.AF_INET, unix.SOCK_STREAM, 0, nil},
	{"UDP", "inet", unix.AF_INET, unix.SOCK_DGRAM, 0, nil},
	{"SCTP", "inet", unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP, nil},
	{"MPTCP", "inet", unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, nil},
	{"raw IPv4", "inet", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW, []string{"NET_RAW"}},
	{"raw ICMP", "inet", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP, []string{"NET_RAW"}},
	{"TCP over IPv6", "inet6", unix.AF_INET6, unix.SOCK_STREAM, 0, nil},
	{"UDP over IPv6", "inet6", unix.AF_INET6, unix.SOCK_DGRAM, 0, nil},
	{"raw IPv6", "inet6", unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW, []string{"NET_RAW"}},
	{"raw ICMPv6", "inet6", unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6, []string{"NET_RAW"}},
	{"packets", "packet", unix.AF_PACKET, unix.SOCK_RAW, 0, []string{"NET_RAW"}},
	{"packets without headers", "packet", unix.AF_PACKET, unix.SOCK_DGRAM, 0, []string{"NET_RAW"}},
	{"netlink, route", "netlink:route", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, nil},
	{"netlink, netfilter", "netlink:netfilter", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER, nil},
	{"netlink, uevent", "netlink:uevent", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT, nil},
	{"netlink, generic", "netlink:generic", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_GENERIC, nil},
	{"netlink, audit", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT, nil},
	{"netlink, xfrm", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_XFRM, nil},
	{"netlink, sock_diag", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SOCK_DIAG, nil},
	{"netlink, connector", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_CONNECTOR, nil},
	{"netlink, crypto", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_CRYPTO, nil},
	{"netlink, SELinux", "", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SELINUX, nil},
	{"AX.25", "", unix.AF_AX25, unix.SOCK_DGRAM, 0, nil},
	{"X.25", "", unix.AF_X25, unix.SOCK_SEQPACKET, 0, nil},
	{"AppleTalk", "", unix.AF_APPLETALK, unix.SOCK_DGRAM, 0, nil},
	{"ATM", "", unix.AF_ATMPVC, unix.SOCK_DGRAM, 0, nil},
	{"key management", "", unix.AF_KEY, unix.SOCK_RAW, 2, []string{"NET_ADMIN"}},
	{"RDS", "", unix.AF_RDS, unix.SOCK_SEQPACKET, 0, nil},
	{"PPP", "", unix.AF_PPPOX, unix.SOCK_STREAM, 0, nil},
	{"LLC", "", unix.AF_LLC, unix.SOCK_STREAM, 0, []string{"NET_RAW"}},
	{"CAN", "", unix.AF_CAN, unix.SOCK_RAW, 1, nil},
	{"TIPC", "", unix.AF_TIPC, unix.SOCK_RDM, 0, nil},
	{"Bluetooth", "", unix.AF_BLUETOOTH, unix.SOCK_RAW, 1, nil},
	{"RxRPC", "", unix.AF_RXRPC, unix.SOCK_DGRAM, unix.AF_INET, nil},
	{"crypto of the kernel", "", unix.AF_ALG, unix.SOCK_SEQPACKET, 0, nil},
	{"NFC", "", unix.AF_NFC, unix.SOCK_SEQPACKET, 0, nil},
	{"vsock", "", unix.AF_VSOCK, unix.SOCK_STREAM, 0, nil},
	{"KCM", "", unix.AF_KCM, unix.SOCK_DGRAM, 0, nil},
	{"SMC", "", unix.AF_SMC, unix.SOCK_STREAM, 0, nil},
	{"XDP", "", unix.AF_XDP, unix.SOCK_RAW, 0, []string{"NET_RAW"}},
	{"MCTP", "", 45, unix.SOCK_DGRAM, 0, nil},
}

// Ports are those that somebody listens on in a node, and a few besides.
var Ports = []uint16{22, 53, 80, 443, 2379, 2380, 6443, 7445, 10250, 10257, 10259, 50000, 50001, 50002}

// network opens sockets of every family, listens, connects, and tries to change links.
func network() (out []Probe) {
	for _, f := range families {
		out = append(out, Probe{Group: Network, Name: "socket: " + f.name, Calls: []string{"socket"}, Family: f.family, Caps: f.caps, Maybe: f.family == "" || f.name == "SCTP" || f.name == "MPTCP", run: func(*env) string {
			return opened(unix.Socket(f.domain, f.kind|unix.SOCK_CLOEXEC, f.protocol))
		}})
	}
	for _, port := range append([]uint16{0}, Ports...) {
		p := Probe{Group: Network, Name: "listen on port " + itoa(int(port)), Calls: []string{"socket", "bind", "listen"}, Family: "inet", Port: port, Verb: "bind"}
		if port < 1024 && port != 0 {
			p.Caps = []string{"NET_BIND_SERVICE"}
		}
		p.run = func(*env) string {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return says(err)
			}
			defer unix.Close(fd)
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)})
			if err == nil {
				err = unix.Listen(fd, 1)
			}
			return says(err)
		}
		out = append(out, p)
	}
	for _, port := range Ports {
		out = append(out, Probe{Group: Network, Name: "connect to port " + itoa(int(port)), Calls: []string{"socket", "connect"}, Family: "inet", Port: port, Verb: "connect", run: func(*env) string {
			return connect(unix.AF_INET, unix.SOCK_STREAM, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
		}})
	}
	out = append(out, Probe{Group: Network, Name: "take a link down by ioctl", Calls: []string{"socket", "ioctl"}, Family: "inet", Number: unix.SIOCSIFFLAGS, Caps: []string{"NET_ADMIN"}, Maybe: true, run: func(*env) string {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return says(err)
		}
		defer unix.Close(fd)
		r, _ := unix.NewIfreq("nosuch0")
		return says(unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r))
	}})
	return append(out, Probe{Group: Network, Name: "make a link by netlink", Calls: []string{"socket", "sendto", "recvfrom"}, Family: "netlink:route", Caps: []string{"NET_ADMIN"}, Maybe: true, run: func(*env) string { return newLink() }})
}

// newLink asks for a link of a kind that there is not.
func newLink() string {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return says(err)
	}
	defer unix.Close(fd)
	_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10})
	var m struct {
		unix.NlMsghdr
		unix.IfInfomsg
		info, kind unix.RtAttr
		name       [8]byte
	}
	m.NlMsghdr = unix.NlMsghdr{Len: uint32(unsafe.Sizeof(m)), Type: unix.RTM_NEWLINK, Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE | unix.NLM_F_EXCL, Seq: 1}
	m.info = unix.RtAttr{Len: 16, Type: unix.IFLA_LINKINFO}
	m.kind = unix.RtAttr{Len: 12, Type: unix.IFLA_INFO_KIND}
	copy(m.name[:], "nosuch")
	if err := unix.Sendto(fd, unsafe.Slice((*byte)(unsafe.Pointer(&m)), unsafe.Sizeof(m)), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return says(err)
	}
	b := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if err != nil || n < 20 {
		return says(err)
	}
	return name(unix.Errno(-*(*int32)(unsafe.Pointer(&b[16]))))
}
