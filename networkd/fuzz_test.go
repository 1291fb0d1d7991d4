package networkd

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzLink: a link's message of the kernel, whose names others give, is a link or an error.
func FuzzLink(f *testing.F) {
	attr := func(kind uint16, value string) []byte {
		b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
		b = append(binary.NativeEndian.AppendUint16(b, kind), value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
		return b
	}
	head := make([]byte, unix.SizeofIfInfomsg)
	head[2] = unix.ARPHRD_ETHER
	whole := append(head, attr(unix.IFLA_IFNAME, "eth0\x00")...)
	whole = append(whole, attr(unix.IFLA_ADDRESS, "\x52\x54\x00\x01\x02\x03")...)
	whole = append(whole, attr(unix.IFLA_LINKINFO, string(attr(unix.IFLA_INFO_KIND, "bridge\x00")))...)
	whole = append(whole, attr(unix.IFLA_AF_SPEC, string(attr(unix.AF_INET, string(attr(1, string(make([]byte, 140)))))))...)
	f.Add(whole)
	f.Add(whole[:21])
	f.Add(head)
	f.Add(head[:7])
	testfuzz.Run(f, func(t *testing.T, m []byte) {
		l, err := parseLink(m)
		if err != nil && err.Error() == "" {
			t.Error("an error that says nothing")
		}
		if err == nil && len(l.Name)+len(l.Kind)+len(l.Hardware) > 4*len(m)+len("device") {
			t.Errorf("%x is read as %+v", m, l)
		}
	})
}

// FuzzPods: kubeletd hands on what the cluster's nodes say of themselves: what is accepted is inside of the pods' network and is never a
// route that takes other traffic.
func FuzzPods(f *testing.F) {
	f.Add("10.244.0.0/16", "10.244.1.0/24", "10.244.2.0/24", "10.0.0.7")
	f.Add("fd00::/48", "fd00::/64", "fd00:0:0:1::/64", "fe80::1%eth0")
	f.Add("0.0.0.0/0", "::/0", "10.0.0.0/33", "0.0.0.0")
	pods := netip.MustParsePrefix("10.244.0.0/16")
	testfuzz.Run(f, func(t *testing.T, subnet, local, to, via string) {
		r := &networkv1.SetPodNetworkRequest{PodSubnets: []string{subnet}, LocalPrefixes: []string{local}, Routes: []*networkv1.PodRoute{{Prefix: to, Via: via}}}
		p, err := parsePods(r, Spec{Bridge: true, Pods: pods})
		if err != nil {
			if text := err.Error(); text == "" || !utf8.ValidString(text) || len(text) > 2048 {
				t.Errorf("%v is refused with %q", r, text)
			}
			return
		}
		for _, route := range p.Routes {
			if !within(pods, route.To) || !route.Via.IsValid() || route.Via.Is4() != route.To.Addr().Is4() || route.To.Masked() != route.To {
				t.Errorf("%v gives %+v", r, p)
			}
		}
	})
}
