package networkd

import (
	"encoding/json"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// world is a kernel with links eth0 and eth1 that have carriers, and a way to give it a lease.
type world struct {
	kernel
	lease func(t *testing.T, link string, l *dhcp.Lease)
}

// kernels runs test against the model and, as root, against Linux in a namespace of its own.
func kernels(t *testing.T, test func(*testing.T, *world)) {
	t.Run("model", func(t *testing.T) {
		m := newModel(eth("eth0", 2), eth("eth1", 3))
		test(t, &world{m, func(_ *testing.T, link string, l *dhcp.Lease) {
			m.DHCP = []dhcp.Entry{{Link: link, Lease: l}}
		}})
	})
	t.Run("linux", func(t *testing.T) {
		testns.New(t)
		other := testns.Other(t)
		cable(t, "eth0", "peer0", other)
		cable(t, "eth1", "peer1", other)
		dir := t.TempDir()
		w := &world{kernel: real(t, dir)}
		w.lease = func(t *testing.T, link string, l *dhcp.Lease) { // as if an earlier process had got it
			data, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "lease-"+link+".json"), data, 0o600); err != nil {
				t.Fatal(err)
			}
			w.kernel = real(t, dir)
		}
		test(t, w)
	})
}

func real(t *testing.T, dir string) *linux {
	t.Helper()
	pool, err := dhcp.NewPool(slog.New(slog.DiscardHandler), dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	k, err := newLinux(dir, pool)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.events.Close() })
	return k
}

// cable puts one end of a veth pair here and the other, up, into another namespace.
func cable(t *testing.T, here, there string, other netns.NsHandle) {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: here}, PeerName: there, PeerNamespace: netlink.NsFd(other)}); err != nil {
		t.Fatalf("make veth pair: %v", err)
	}
	testns.In(t, other, func() {
		l, err := netlink.LinkByName(there)
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			t.Errorf("set up %s: %v", there, err)
		}
	})
}

func read(t *testing.T, k kernel) State {
	t.Helper()
	if w, ok := k.(*world); ok {
		k = w.kernel
	}
	if l, ok := k.(*linux); ok {
		l.firewall.readAt = time.Time{}
	}
	s, err := k.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.NoFirewall != "" {
		t.Fatal(s.NoFirewall)
	}
	return s
}

// reach brings a kernel to a spec in one round, and wants nothing left after it.
func reach(t *testing.T, k kernel, want Spec) State {
	t.Helper()
	for _, s := range plan(want, read(t, k)) {
		if err := k.Do(t.Context(), s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	have := read(t, k)
	if rest := plan(want, have); len(rest) > 0 {
		t.Fatalf("left: %v", rest)
	}
	return have
}

func owned(s State) string {
	var out []string
	for _, a := range s.Addresses {
		if a.Origin.own() {
			out = append(out, a.Prefix.String()+" "+string(a.Link)+" "+string(a.Origin))
		}
	}
	for _, r := range s.Routes {
		if r.Origin.own() {
			out = append(out, r.String()+" "+string(r.Origin))
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func TestKernelFollowsSpecs(t *testing.T) {
	gateway := func(s Spec, to, via string) Spec {
		c := &s.Network.Interfaces[0]
		c.Routes = append(c.Routes, config.Route{To: pfx(to), Via: ip(via)})
		return s
	}
	onlink := gateway(spec(static("10.0.0.3/24")), "0.0.0.0/0", "10.0.0.1")
	onlink.Network.Interfaces[0].Routes = append(onlink.Network.Interfaces[0].Routes, config.Route{To: pfx("192.0.2.0/24"), Metric: 7})
	rounds := []struct {
		name string
		want Spec
		have string
	}{
		{"static", gateway(spec(static("10.0.0.3/24")), "0.0.0.0/0", "10.0.0.1"), "10.0.0.3/24 eth0 static\ndefault via 10.0.0.1 dev eth0 static"},
		{"renumbered in the same subnet", gateway(spec(static("10.0.0.4/24")), "0.0.0.0/0", "10.0.0.1"), "10.0.0.4/24 eth0 static\ndefault via 10.0.0.1 dev eth0 static"},
		{"another gateway of the same metric", gateway(spec(static("10.0.0.4/24")), "0.0.0.0/0", "10.0.0.2"), "10.0.0.4/24 eth0 static\ndefault via 10.0.0.2 dev eth0 static"},
		{"on link", onlink, "10.0.0.3/24 eth0 static\n192.0.2.0/24 dev eth0 metric 7 static\ndefault via 10.0.0.1 dev eth0 static"},
		{"both families, two gateways", gateway(gateway(spec(static("10.0.0.3/24", "fd00::3/64")), "fd01::/64", "fd00::1"), "fd01::/64", "fd00::2"),
			"10.0.0.3/24 eth0 static\nfd00::3/64 eth0 static\nfd01::/64 via fd00::1 dev eth0 metric 1024 static\nfd01::/64 via fd00::2 dev eth0 metric 1024 static"},
		{"MTU, and a second address", func() Spec {
			s := spec(static("10.0.0.3/24", "10.0.0.5/16"))
			s.Network.Interfaces[0].MTU = 1400
			return s
		}(), "10.0.0.3/24 eth0 static\n10.0.0.5/16 eth0 static"},
		{"nothing", spec(config.Interface{Name: "eth1"}), ""},
	}
	kernels(t, func(t *testing.T, w *world) {
		for _, r := range rounds {
			have := reach(t, w, r.want)
			if got := owned(have); got != r.have {
				t.Errorf("%s: got\n%s\nwant\n%s", r.name, got, r.have)
			}
			for _, l := range have.Links {
				if l.Name == "lo" && !l.Up {
					t.Errorf("%s: lo is down", r.name)
				}
			}
			if err := guarded(have); err != nil {
				t.Errorf("%s: %v", r.name, err)
			}
		}
	})
}

func TestKernelUsesLease(t *testing.T) {
	kernels(t, func(t *testing.T, w *world) {
		l := lease("10.0.2.15/32", dhcp.Route{To: pfx("10.0.2.2/32")}, defaultVia("10.0.2.2"))
		l.MTU, l.Expire = 1400, dhcp.Now()+time.Hour
		w.lease(t, "eth0", l)
		want := spec(config.Interface{Name: "eth0", DHCP: true})
		have := reach(t, w, want)
		if got, want := owned(have), "10.0.2.15/32 eth0 dhcp\n10.0.2.2/32 dev eth0 metric 1024 dhcp\ndefault via 10.0.2.2 dev eth0 metric 1024 dhcp"; got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
		if got, want := have.Files["resolv.conf"], "nameserver 10.0.2.3\nsearch example.org\n"; got != want {
			t.Errorf("resolv.conf is %q, want %q", got, want)
		}
		if got, want := have.Files["hosts"], "127.0.0.1 localhost\n::1 localhost ip6-localhost\n10.0.2.15 n1\n"; got != want {
			t.Errorf("hosts is %q, want %q", got, want)
		}
		if got := owned(reach(t, w, spec(static()))); got != "" {
			t.Errorf("without DHCP the lease's %s is left", got)
		}
	})
}

// What others made is there after any plan, in the real kernel too.
func TestKernelLeavesOthersAlone(t *testing.T) {
	testns.New(t)
	cable(t, "eth0", "peer0", testns.Other(t))
	k := real(t, t.TempDir())
	reach(t, k, spec(static("10.0.0.3/24")))
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	vip := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 0, 99).To4(), Mask: net.CIDRMask(32, 32)}}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(10, 9, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}, Gw: net.IPv4(10, 0, 0, 1)}
	if err := netlink.AddrAdd(link, vip); err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	have := reach(t, k, spec(static("10.0.0.4/24")))
	if !slices.Contains(have.Addresses, Address{"eth0", pfx("10.0.0.99/32"), OriginOther}) {
		t.Errorf("another's address is gone: %v", have.Addresses)
	}
	if !slices.Contains(have.Routes, Route{To: pfx("10.9.0.0/16"), Via: ip("10.0.0.1"), Link: "eth0", Origin: OriginOther}) {
		t.Errorf("another's route is gone: %v", have.Routes)
	}
}

// host is a second machine on eth0's cable, 10.0.0.9; here is 10.0.0.3 and fd00::3.
func host(t *testing.T) netns.NsHandle {
	t.Helper()
	testns.New(t)
	other := testns.Other(t)
	cable(t, "eth0", "peer0", other)
	testns.In(t, other, func() {
		l, err := netlink.LinkByName("peer0")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range []string{"10.0.0.9/24", "fd00::9/64"} {
			n, err := netlink.ParseIPNet(a)
			if err == nil {
				err = netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: 0x02}) // IFA_F_NODAD
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	return other
}

// patience is how long a connection may take that is expected to be dropped.
const patience = 150 * time.Millisecond

func dial(t *testing.T, from netns.NsHandle, to string) (err error) {
	testns.In(t, from, func() {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", to, patience); err == nil {
			c.Close()
		}
	})
	return err
}

func TestFirewall(t *testing.T) {
	other := host(t)
	k := real(t, t.TempDir())
	want := spec(static("10.0.0.3/24"))
	want.Network.Firewall.Allow = []config.Allow{
		{Port: 8001, From: []netip.Prefix{pfx("10.0.0.9/32")}}, {Port: 8002, From: []netip.Prefix{pfx("192.0.2.0/24")}},
	}
	for _, port := range []string{"50000", "8001", "8002", "8003"} {
		l, err := net.Listen("tcp", ":"+port) // opened here, served by the kernel's backlog
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	reach(t, k, want)
	for port, open := range map[string]bool{"50000": true, "8001": true, "8002": false, "8003": false} {
		if err := dial(t, other, "10.0.0.3:"+port); (err == nil) != open {
			t.Errorf("dial %s: %v, want open=%v", port, err, open)
		}
	}
	if c, err := net.DialTimeout("tcp", "127.0.0.1:8003", patience); err != nil {
		t.Errorf("loopback: %v", err)
	} else {
		c.Close()
	}
	have := read(t, k)
	rules := have.Tables[0].Chains[0]
	if n := rules.Packets[len(rules.Packets)-1]; n == 0 {
		t.Error("the drop rule has counted nothing")
	}
	// What goes out may be answered.
	testns.In(t, other, func() {
		l, err := net.Listen("tcp", "10.0.0.9:9000")
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { l.Close() })
	})
	if c, err := net.DialTimeout("tcp", "10.0.0.9:9000", 5*time.Second); err != nil {
		t.Errorf("outwards: %v", err)
	} else {
		c.Close()
	}
	// From the pods' subnet everything is open, but not over a managed interface of a node with the built-in pod network.
	want.Pods = pfx("10.0.0.0/24")
	reach(t, k, want)
	if err := dial(t, other, "10.0.0.3:8003"); err != nil {
		t.Errorf("a pod: %v", err)
	}
	want.Bridge = true
	reach(t, k, want)
	if err := dial(t, other, "10.0.0.3:50000"); err == nil {
		t.Error("a machine that pretends to be a pod got in")
	}
}

// While chains are swapped nothing slips through, and after each swap there is one chain and one jump.
func TestFirewallSwap(t *testing.T) {
	other := host(t)
	k := real(t, t.TempDir())
	want := spec(static("10.0.0.3/24"))
	reach(t, k, want)
	in, err := net.ListenPacket("udp4", ":9999")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	stop, ended := make(chan struct{}), make(chan struct{})
	var out net.Conn
	testns.In(t, other, func() { out, err = net.Dial("udp4", "10.0.0.3:9999") })
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	go func() {
		defer close(ended)
		for tick := time.NewTicker(time.Millisecond / 5); ; <-tick.C {
			select {
			case <-stop:
				return
			default:
			}
			_, _ = out.Write([]byte("x")) // an ICMP answer may come back as an error; it does not matter here
		}
	}()
	for i := range 6 {
		want.Network.Firewall.Allow = []config.Allow{{Port: 8000 + i%3}}
		have := reach(t, k, want)
		for _, tb := range have.Tables {
			if len(tb.Chains) != 1 || len(tb.Jumps) != 1 {
				t.Errorf("%s: %d chains and %d jumps, want one each", tb.Family, len(tb.Chains), len(tb.Jumps))
			}
		}
	}
	// The last chain counts from 0: on a busy machine the sender may not have had its turn yet.
	dropped := func() uint64 {
		c := reach(t, k, want).Tables[0].Chains[0]
		return uint64(c.Packets[len(c.Rules)-1])
	}
	for start := time.Now(); dropped() == 0; {
		if time.Since(start) > 10*time.Second {
			t.Fatal("the sender's packets did not come as far as the firewall: this test proves nothing")
		}
	}
	close(stop)
	<-ended
	if err := in.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if n, from, err := in.ReadFrom(make([]byte, 10)); err == nil {
		t.Errorf("%d bytes from %s came through", n, from)
	}
}

// Whatever somebody did to the chains, one plan repairs it; and a chain that cannot be built leaves the old one in force.
func TestFirewallRepairs(t *testing.T) {
	testns.New(t)
	k := real(t, t.TempDir())
	want := spec(config.Interface{Name: "lo"})
	chain := reach(t, k, want).Tables[0].Chains[0].Name
	for _, damage := range []string{
		"-F " + chain, "-I " + chain + " -j ACCEPT", "-D INPUT -j " + chain, "-A INPUT -j " + chain, "-N BULKHEAD-IN-old",
		"-Z " + chain,
	} {
		if _, err := run(t.Context(), "iptables", "", strings.Fields(damage)...); err != nil {
			t.Fatal(err)
		}
		have := reach(t, k, want)
		if len(have.Tables[0].Chains) != 1 || len(have.Tables[0].Jumps) != 1 || have.Tables[0].Chains[0].Name != chain {
			t.Errorf("after %q: %v", damage, have.Tables[0])
		}
	}
	for _, s := range []Step{
		{Op: opChainBuild, Family: IPv4, Name: "BULKHEAD-IN-new", Rules: []string{"-p nonsense -j DROP"}},
		{Op: opJumpAdd, Family: IPv4, Name: "BULKHEAD-IN-new", Rules: []string{"-p nonsense -j DROP"}}, {Op: opJumpDel, Family: IPv4, Name: chain}, {Op: opChainDel, Family: IPv4, Name: chain},
	} {
		if err := k.Do(t.Context(), s); err == nil {
			t.Errorf("%s succeeded", s)
		}
	}
	if err := guarded(read(t, k)); err != nil {
		t.Error(err)
	}
}
