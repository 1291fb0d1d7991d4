package nodeaddr

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	const nat, lan, vip, pods = "10.0.2.15/24", "10.5.0.11/24", "10.5.0.100/32", "10.244.0.1/24"
	for _, c := range []struct {
		name             string
		own, seen        string
		listed, endpoint string
		want             string
	}{
		{"none", "", "", "", "", ""},
		{"the first", lan + " " + pods, "", "", "", "10.5.0.11"},
		{"the endpoint's network", nat + " " + lan, "", "", "10.5.0.11", "10.5.0.11"},
		{"the endpoint is a virtual address of this node", nat + " " + vip + " " + lan, "", "", "10.5.0.100", "10.5.0.11"},
		{"seen goes before the endpoint", nat + " " + lan, "10.0.2.15", "", "10.5.0.11", "10.0.2.15"},
		{"seen twice: the endpoint's network", nat + " " + lan, "10.0.2.15 10.5.0.11", "", "10.5.0.100", "10.5.0.11"},
		{"seen behind a translation only", nat, "203.0.113.9", "", "", "10.0.2.15"},
		{"listed stays", nat + " " + lan, "", "10.5.0.11", "", "10.5.0.11"},
		{"listed stays of two in one network", "10.5.0.9/24 " + lan, "10.5.0.9 10.5.0.11", "10.5.0.11", "10.5.0.100", "10.5.0.11"},
		{"listed gives way to the endpoint's network", nat + " " + lan, "", "10.0.2.15", "10.5.0.1", "10.5.0.11"},
		{"listed gives way to what was seen", nat + " " + lan, "10.5.0.11", "10.0.2.15", "", "10.5.0.11"},
		{"listed is gone", lan, "", "10.5.0.77", "", "10.5.0.11"},
		{"IPv6", "fd00::5/64", "", "", "fd00::1", "fd00::5"},
	} {
		var own []netip.Prefix
		for _, p := range strings.Fields(c.own) {
			own = append(own, netip.MustParsePrefix(p))
		}
		var listed, endpoint, want netip.Addr
		for a, text := range map[*netip.Addr]string{&listed: c.listed, &endpoint: c.endpoint, &want: c.want} {
			if text != "" {
				*a = netip.MustParseAddr(text)
			}
		}
		if got := Choose(own, Parse(strings.Fields(c.seen)), listed, endpoint); got != want {
			t.Errorf("%s: got %s, want %s", c.name, got, want)
		}
	}
}

// What is likeliest to lead to others comes first; what leads to pods only, nowhere.
func TestUsable(t *testing.T) {
	link := func(name string, up bool, addresses ...string) Link {
		l := Link{Name: name, Up: up}
		for _, a := range addresses {
			l.Addresses = append(l.Addresses, netip.MustParsePrefix(a))
		}
		return l
	}
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	route := func(iface, to, metric string) string {
		return iface + "\t" + to + "\t0202000A\t0003\t0\t0\t" + metric + "\t00000000\t0\t0\t0\n"
	}
	links := []Link{link("lo", true, "127.0.0.1/8"), link("cni0", true, "10.244.0.1/24"), link("veth1", true, "10.244.0.9/24"), link("down", false, "10.9.0.1/24"),
		link("eth0", true, "fe80::1/64", "10.0.2.15/24"), link("eth1", true, "10.5.0.11/24", "10.5.0.100/32", "2001:db8::5/64")}
	for _, c := range []struct{ name, routes, want string }{
		{"no default route", head, "[10.0.2.15/24 10.5.0.11/24 10.5.0.100/32 2001:db8::5/64]"},
		{"default route", head + route("eth1", "00000000", "0"), "[10.5.0.11/24 10.5.0.100/32 2001:db8::5/64 10.0.2.15/24]"},
		{"the better of two", head + route("eth0", "00000000", "200") + route("eth1", "00000000", "100"), "[10.5.0.11/24 10.5.0.100/32 2001:db8::5/64 10.0.2.15/24]"},
		{"another route", head + route("eth1", "0000000A", "0"), "[10.0.2.15/24 10.5.0.11/24 10.5.0.100/32 2001:db8::5/64]"},
		{"garbage", "a b c\n00000000 00000000 0 0 0 0 x 00000000\n", "[10.0.2.15/24 10.5.0.11/24 10.5.0.100/32 2001:db8::5/64]"},
	} {
		if got := fmt.Sprint(Usable(links, Default(c.routes))); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestInURL(t *testing.T) {
	for url, want := range map[string]string{"https://10.5.0.11:6443": "10.5.0.11", "https://[fd00::1]:6443": "fd00::1", "https://api.example:6443": "invalid IP", "": "invalid IP", "::": "invalid IP"} {
		if got := InURL(url).String(); got != want {
			t.Errorf("%q: %s, want %s", url, got, want)
		}
	}
}
