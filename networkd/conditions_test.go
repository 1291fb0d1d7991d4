package networkd

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/needs"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

func TestConditions(t *testing.T) {
	card := Link{Name: "eth0", Physical: true, Up: true, Carrier: true}
	cut := card
	cut.Carrier = false
	at := func(origin Origin, address string) []Address {
		return []Address{{Link: "eth0", Prefix: netip.MustParsePrefix(address), Origin: origin}}
	}
	for _, c := range []struct {
		name string
		have State
		want string
	}{
		{"well", State{Links: []Link{card}, Addresses: at(OriginDHCP, "10.0.0.5/24")}, "address=; carrier="},
		{"no card", State{}, "address=the node has no address at which others could reach it; carrier=the kernel has found no network card"},
		{"no cable", State{Links: []Link{cut}}, "address=the node has no address at which others could reach it; carrier=no network card has a link (eth0): look at the cable and the switch"},
		{"no DHCP server", State{Links: []Link{card}, DHCP: []dhcp.Entry{{Link: "eth0", Running: true}}},
			"address=the node has no address at which others could reach it: no DHCP server answers on eth0; carrier="},
		{"only pods", State{Links: []Link{card}, Addresses: at(OriginPod, "10.244.0.1/24")}, "address=the node has no address at which others could reach it; carrier="},
		{"only a bridge of pods", State{Links: []Link{card}, Addresses: at(OriginOther, "10.244.0.1/24")}, "address=the node has no address at which others could reach it; carrier="},
		{"only on the link", State{Links: []Link{card}, Addresses: at(OriginKernel, "fe80::1/64")}, "address=the node has no address at which others could reach it; carrier="},
	} {
		var got []string
		for _, x := range conditions(c.have) {
			if !x.GetExplains() {
				t.Errorf("%s counts in health", x.GetName())
			}
			got = append(got, x.GetName()+"="+x.GetTrouble())
		}
		if s := strings.Join(got, "; "); s != c.want {
			t.Errorf("%s: got %q, want %q", c.name, s, c.want)
		}
	}
}

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	for _, c := range conditions(State{}) {
		told[c.GetName()] = true
		for _, ref := range c.GetNeeds() {
			if !needs.Known(ref) {
				t.Errorf("%s needs %s, which nobody reports", c.GetName(), ref)
			}
		}
	}
	for _, name := range needs.Of("networkd") {
		if !told[name] {
			t.Errorf("others refer to %s, which is not reported", name)
		}
	}
}
