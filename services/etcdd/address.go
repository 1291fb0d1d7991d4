package etcdd

import (
	"net"
	"net/netip"

	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// peerListen is where members are listened for: on all addresses, since the one that others use may come later than the member, or change.
// Who gets in is a matter of certificates.
func peerListen() string {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		return "0.0.0.0:2380" // a kernel without IPv6
	}
	l.Close()
	return "[::]:2380"
}

func hostsOf(peerURLs []string) []netip.Addr {
	var out []netip.Addr
	for _, u := range peerURLs {
		if a := nodeaddr.InURL(u); a.IsValid() {
			out = append(out, a)
		}
	}
	return out
}
