package networkd

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

func addresses(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		out = append(out, ip(a))
	}
	return out
}

func TestPlanHold(t *testing.T) {
	want := spec(static("10.0.0.3/24", "fd00::3/64"), config.Interface{Name: "eth1", Addresses: []netip.Prefix{pfx("10.5.0.3/24")}})
	want.VirtualIPs = addresses("10.5.0.100", "fd00::100", "192.0.2.1", "10.0.0.3")
	m := settled(t, newModel(eth("eth0", 2), eth("eth1", 3)), want)
	old := Address{"eth0", pfx("10.0.0.200/32"), OriginVirtual}
	m.Addresses = append(m.Addresses, old)
	if got := lines(plan(want, m.State)); got != "" {
		t.Errorf("the plan touches a virtual address:\n%s", got)
	}
	for _, c := range []struct {
		name  string
		hold  string
		steps string
		wrong string // unreachable
		err   string
	}{
		{"both families", "10.5.0.100 fd00::100", "addr hold 10.5.0.100/32 dev eth1\naddr announce 10.5.0.100/32 dev eth1\naddr hold fd00::100/128 dev eth0\naddr announce fd00::100/128 dev eth0\naddr del 10.0.0.200/32 dev eth0\n", "", ""},
		{"none", "", "addr del 10.0.0.200/32 dev eth0\n", "", ""},
		{"one without a subnet does not harm the other", "192.0.2.1 10.5.0.100", "addr hold 10.5.0.100/32 dev eth1\naddr announce 10.5.0.100/32 dev eth1\naddr del 10.0.0.200/32 dev eth0\n", "192.0.2.1 is on no link's subnet", ""},
		{"not the document's", "10.0.0.9", "", "", "not among the document's"},
		{"the node's own", "10.0.0.3", "", "", "10.0.0.3 is on eth0 anyway"},
	} {
		steps, unreachable, err := planHold(want, m.State, addresses(strings.Fields(c.hold)...), time.Hour)
		if got := lines(steps); got != c.steps {
			t.Errorf("%s: steps are\n%swant\n%s", c.name, got, c.steps)
		}
		if got := strings.Join(unreachable, "; "); !strings.HasPrefix(got, c.wrong) || (got == "") != (c.wrong == "") {
			t.Errorf("%s: unreachable are %q, want %q", c.name, got, c.wrong)
		}
		if errs.Is(err, errs.Invalid) != (c.err != "") || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
	}
}

// A neighbour that knows the address from another machine learns where it is now, and the kernel takes the address away when nobody
// says any more that it is to stay.
func TestHold(t *testing.T) {
	other := host(t)
	k := real(t, t.TempDir())
	want := spec(static("10.0.0.3/24", "fd00::3/64"))
	want.VirtualIPs = addresses("10.0.0.100", "fd00::100")
	reach(t, k, want)
	stale, err := net.ParseMAC("02:00:00:00:00:01")
	if err != nil {
		t.Fatal(err)
	}
	neighbour := func(a netip.Addr, set bool) (hardware string) {
		testns.In(t, other, func() {
			l, err := netlink.LinkByName("peer0")
			if err == nil && set {
				err = netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: a.AsSlice(), HardwareAddr: stale, State: netlink.NUD_STALE})
			}
			var list []netlink.Neigh
			if err == nil {
				list, err = netlink.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
			}
			if err != nil {
				t.Error(err)
			}
			for _, n := range list {
				if n.IP.Equal(a.AsSlice()) {
					hardware = n.HardwareAddr.String()
				}
			}
		})
		return hardware
	}
	for _, a := range want.VirtualIPs {
		if got := neighbour(a, true); got != stale.String() {
			t.Fatalf("the neighbour has %q for %s", got, a)
		}
	}
	hold := func(list []netip.Addr) State {
		t.Helper()
		have, err := k.ReadLinks()
		if err != nil {
			t.Fatal(err)
		}
		steps, _, err := planHold(want, have, list, dhcp.Now()+1900*time.Millisecond) // a whole second is left of it
		for _, s := range steps {
			err = errors.Join(err, k.Do(t.Context(), s))
		}
		if err != nil {
			t.Fatal(err)
		}
		if have, err = k.ReadLinks(); err != nil {
			t.Fatal(err)
		}
		return have
	}
	held := func(s State) (out []string) {
		for _, a := range s.Addresses {
			if a.Origin == OriginVirtual {
				out = append(out, a.Prefix.String())
			}
		}
		return out
	}
	all := []string{"10.0.0.100/32", "fd00::100/128"}
	for range 2 { // the second time they are there
		if got := held(hold(want.VirtualIPs)); !slices.Equal(got, all) {
			t.Errorf("held are %q, want %q", got, all)
		}
	}
	here, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range want.VirtualIPs {
		if got := neighbour(a, false); got != here.Attrs().HardwareAddr.String() {
			t.Errorf("the neighbour has %s for %s, want this machine's %s", got, a, here.Attrs().HardwareAddr)
		}
	}
	if err := dial(t, other, "[fd00::100]:50000"); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("%v: want the held address to refuse, at once", err)
	}
	if got := held(hold(want.VirtualIPs[:1])); !slices.Equal(got, all[:1]) {
		t.Errorf("held are %q, want %q only", got, all[:1])
	}
	stuck := Step{Op: opAddrHold, Address: Address{"eth0", pfx("10.0.0.100/32"), OriginVirtual}, Until: dhcp.Now() + 900*time.Millisecond}
	if err := k.Do(t.Context(), stuck); !errs.Is(err, errs.Precondition) {
		t.Errorf("a request that was stuck on its way: %v, want it refused", err)
	}
	updates, stop := make(chan netlink.AddrUpdate, 64), make(chan struct{})
	defer close(stop)
	if err := netlink.AddrSubscribe(updates, stop); err != nil {
		t.Fatal(err)
	}
	late := time.After(5 * time.Second)
	for {
		have, err := k.ReadLinks()
		if err != nil {
			t.Fatal(err)
		}
		if len(held(have)) == 0 { // the kernel's own doing
			break
		}
		select {
		case <-updates:
		case <-late:
			t.Fatal("the address stays though its time is over")
		}
	}
}
