package networkd

import (
	"encoding/binary"
	"flag"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

var update = flag.Bool("update", false, "write the golden files")

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr    { return netip.MustParseAddr(s) }

func eth(name string, index int) Link {
	return Link{Name: config.LinkName(name), Index: index, Kind: "device", Hardware: "52:54:00:12:34:56", MTU: 1500, Carrier: true, Physical: true}
}

func lease(address string, routes ...dhcp.Route) *dhcp.Lease {
	return &dhcp.Lease{
		Address: pfx(address), Server: ip("10.0.2.2"), Routes: routes, Nameservers: []netip.Addr{ip("10.0.2.3")},
		Domains: []string{"example.org"}, Renew: time.Hour, Rebind: 2 * time.Hour, Expire: 3 * time.Hour,
	}
}

var defaultVia = func(s string) dhcp.Route { return dhcp.Route{To: pfx("0.0.0.0/0"), Via: ip(s)} }

func static(addresses ...string) config.Interface {
	c := config.Interface{Name: "eth0"}
	for _, a := range addresses {
		c.Addresses = append(c.Addresses, pfx(a))
	}
	return c
}

func spec(interfaces ...config.Interface) Spec {
	return Spec{Hostname: "n1", Network: config.Network{Interfaces: interfaces}, Ports: []int{50000}}
}

// settled brings a model to a spec and fails if that takes more than one plan.
func settled(t *testing.T, m *model, want Spec) *model {
	t.Helper()
	for _, s := range plan(want, m.State) {
		if err := m.Do(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	if rest := plan(want, m.State); len(rest) > 0 {
		t.Fatalf("plan does not converge, left: %v", rest)
	}
	return m
}

func lines(steps []Step) string {
	var b strings.Builder
	for _, s := range steps {
		b.WriteString(s.String() + "\n")
	}
	return b.String()
}

func TestPlan(t *testing.T) {
	pods := Link{Name: "cni0", Index: 9, Kind: "bridge", MTU: 1500, Up: true}
	veth := Link{Name: "veth12", Index: 10, Kind: "veth", MTU: 1500, Up: true}
	tests := []struct {
		name string
		have func(t *testing.T) *model
		want Spec
		plan string
	}{
		{"nothing is there yet, no spec: every device, the firewall, no pod's link",
			func(*testing.T) *model { return newModel(eth("eth0", 2), pods, veth) }, bare("n1"),
			`link set up dev lo
link promote dev eth0
link set up dev eth0
dhcp start dev eth0
firewall enter ipv4 BULKHEAD-IN-$4
firewall enter ipv6 BULKHEAD-IN-$6
file write hostname
file write hosts
file write resolv.conf
`},
		{"a lease came",
			func(t *testing.T) *model {
				m := settled(t, newModel(eth("eth0", 2)), bare("n1"))
				m.DHCP[0].Lease = lease("10.0.2.15/24", defaultVia("10.0.2.2"))
				m.DHCP[0].Lease.MTU = 1400
				return m
			}, bare("n1"),
			`link set mtu 1400 dev eth0
addr add 10.0.2.15/24 dev eth0
route add default via 10.0.2.2 dev eth0 metric 1024
file write hosts
file write resolv.conf
`},
		{"the lease moved: add before delete",
			func(t *testing.T) *model {
				m := newModel(eth("eth0", 2))
				m.DHCP = []dhcp.Entry{{Link: "eth0", Running: true, Lease: lease("10.0.2.15/24", defaultVia("10.0.2.2"))}}
				settled(t, m, bare("n1"))
				m.DHCP[0].Lease = lease("10.0.2.16/24", defaultVia("10.0.2.1"))
				return m
			}, bare("n1"),
			`addr add 10.0.2.16/24 dev eth0
route add default via 10.0.2.1 dev eth0 metric 1024
file write hosts
route del default via 10.0.2.2 dev eth0 metric 1024
addr del 10.0.2.15/24 dev eth0
`},
		{"networkd was restarted: the lease is kept, nothing goes",
			func(t *testing.T) *model {
				m := newModel(eth("eth0", 2))
				m.DHCP = []dhcp.Entry{{Link: "eth0", Running: true, Lease: lease("10.0.2.15/24", defaultVia("10.0.2.2"))}}
				settled(t, m, bare("n1"))
				m.DHCP[0].Running = false
				return m
			}, bare("n1"), "dhcp start dev eth0\n"},
		{"from DHCP to static",
			func(t *testing.T) *model {
				m := newModel(eth("eth0", 2))
				m.DHCP = []dhcp.Entry{{Link: "eth0", Running: true, Lease: lease("10.0.2.15/24")}}
				return settled(t, m, spec(config.Interface{Name: "e*", DHCP: true}))
			},
			spec(config.Interface{Name: "eth0", MTU: 9000, Addresses: []netip.Prefix{pfx("10.0.0.3/24"), pfx("fd00::3/64")},
				Routes: []config.Route{{To: pfx("0.0.0.0/0"), Via: ip("10.0.0.1")}, {To: pfx("fd01::/64"), Via: ip("fd00::1")}}}),
			`link set mtu 9000 dev eth0
dhcp stop dev eth0
addr add 10.0.0.3/24 dev eth0
addr add fd00::3/64 dev eth0
route add default via 10.0.0.1 dev eth0
route add fd01::/64 via fd00::1 dev eth0 metric 1024
file write hosts
file write resolv.conf
addr del 10.0.2.15/24 dev eth0
`},
		{"what others made stays, on managed links too",
			func(t *testing.T) *model {
				m := settled(t, newModel(eth("eth0", 2), pods), spec(static()))
				m.Addresses = []Address{{"cni0", pfx("10.244.0.1/24"), OriginOther}, {"eth0", pfx("10.0.0.99/32"), OriginOther}}
				m.Routes = []Route{{To: pfx("10.244.0.0/24"), Link: "cni0", Origin: OriginKernel}, {To: pfx("10.9.0.0/16"), Via: ip("10.0.0.1"), Link: "eth0", Origin: OriginOther}}
				return m
			}, spec(static()), ""},
		{"an interface leaves the document: what networkd put there goes",
			func(t *testing.T) *model {
				return settled(t, newModel(eth("eth0", 2), eth("eth1", 3)), spec(static("10.0.0.3/24"), config.Interface{Name: "eth1", Addresses: []netip.Prefix{pfx("10.1.0.3/24")}}))
			}, spec(static("10.0.0.3/24")), "addr del 10.1.0.3/24 dev eth1\n"},
		{"a link that is not there is waited for; the rest goes on",
			func(t *testing.T) *model { return settled(t, newModel(eth("eth0", 2)), spec(static())) },
			spec(static("10.0.0.3/24"), config.Interface{Name: "eth7"}),
			"link wait dev eth7\naddr add 10.0.0.3/24 dev eth0\nfile write hosts\n"},
		{"a new rule: the new chain is entered before the old one is left",
			func(t *testing.T) *model { return settled(t, newModel(), spec(static())) },
			func() Spec {
				s := spec(static())
				s.Network.Firewall.Allow = []config.Allow{{Port: 179, From: []netip.Prefix{pfx("10.0.0.0/8")}}}
				return s
			}(),
			`link wait dev eth0
firewall enter ipv4 BULKHEAD-IN-$4
firewall leave ipv4 BULKHEAD-IN-*
firewall delete ipv4 BULKHEAD-IN-*
`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.name, "a new rule") {
				m := newModel()
				for _, s := range plan(spec(static()), m.State) {
					_ = m.Do(t.Context(), s) // the wait for eth0 fails, as it must
				}
				compare(t, tt.want, m, tt.plan)
				return
			}
			compare(t, tt.want, tt.have(t), tt.plan)
		})
	}
}

// A node whose spec may be on its way raises links and asks for leases, and does no more.
func TestPlanYoung(t *testing.T) {
	m := newModel(eth("eth0", 2))
	m.Young = true
	if got, want := lines(planBare("n1", m.State)), "link set up dev lo\nlink promote dev eth0\nlink set up dev eth0\ndhcp start dev eth0\n"; got != want {
		t.Errorf("plan is\n%swant\n%s", got, want)
	}
	m.Young = false
	if got, want := lines(planBare("n1", m.State)), lines(plan(bare("n1"), m.State)); got != want {
		t.Errorf("later the plan is\n%swant\n%s", got, want)
	}
}

func compare(t *testing.T, want Spec, m *model, golden string) {
	t.Helper()
	var managed []Link
	for _, l := range m.Links {
		if want.interfaceOf(l) != nil {
			managed = append(managed, l)
		}
	}
	for mark, f := range map[string]Family{"BULKHEAD-IN-$4": IPv4, "BULKHEAD-IN-$6": IPv6} {
		golden = strings.ReplaceAll(golden, mark, chainOf(Ingress, ingress(want, managed, f)).Name)
	}
	for _, tb := range m.Tables {
		if len(tb.Jumps) > 0 && tb.Family == IPv4 {
			golden = strings.ReplaceAll(golden, "BULKHEAD-IN-*", tb.Jumps[0])
		}
	}
	if got := lines(plan(want, m.State)); got != golden {
		t.Errorf("plan is\n%swant\n%s", got, golden)
	}
}

// The ingress rules of a whole document, as iptables and as people see them.
func TestIngressGolden(t *testing.T) {
	s, err := parse([]byte(`apiVersion: bulkhead.dev/v1
kind: Machine
hostname: n1
---
apiVersion: bulkhead.dev/v1
kind: Network
firewall:
  allow:
    - {port: 6443, from: [10.0.0.0/8, "fd00::/8"]}
    - {port: 10250, from: [10.0.0.7/32]}
    - {port: 53, protocol: udp}
    - {port: 80, from: [0.0.0.0/0]}
`), "unused")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range []Family{IPv4, IPv6} {
		rules := ingress(s, []Link{eth("eth0", 2)}, f)
		b.WriteString("# " + string(f) + " " + chainOf(Ingress, rules).Name + "\n")
		for _, r := range rules {
			b.WriteString(r.args + "    # " + r.text + "\n")
		}
	}
	golden := filepath.Join("testdata", "ingress.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("got\n%swant (-update writes it)\n%s", b.String(), want)
	}
}

// randomSpec and randomState make small worlds in which things collide often.
func randomSpec(r *rand.Rand) Spec {
	s := Spec{Hostname: []string{"n1", "n2"}[r.IntN(2)], Ports: []int{50000, 6443}[:r.IntN(3)], Bridge: r.IntN(2) == 0}
	if r.IntN(2) == 0 {
		s.Pods = pfx("10.244.0.0/16")
	}
	for _, n := range []config.LinkName{"eth0", "eth1", "e*", "*"} {
		if r.IntN(2) == 0 {
			continue
		}
		c := config.Interface{Name: n, DHCP: r.IntN(2) == 0, MTU: []int{0, 1400, 9000}[r.IntN(3)]}
		for _, a := range []string{"10.0.0.3/24", "10.0.0.4/24", "10.0.2.15/24", "fd00::3/64"} {
			if r.IntN(3) == 0 {
				c.Addresses = append(c.Addresses, pfx(a))
			}
		}
		for _, a := range c.Addresses {
			if r.IntN(2) == 0 && a.Addr().Is4() {
				c.Routes = append(c.Routes, config.Route{To: pfx("0.0.0.0/0"), Via: a.Masked().Addr().Next(), Metric: r.IntN(2) * 1024})
			}
		}
		s.Network.Interfaces = append(s.Network.Interfaces, c)
	}
	for range r.IntN(3) {
		a := config.Allow{Port: []int{50000, 53, 80}[r.IntN(3)], Protocol: []string{"", "tcp", "udp"}[r.IntN(3)]}
		if r.IntN(2) == 0 {
			a.From = []netip.Prefix{pfx([]string{"10.0.0.0/8", "fd00::/8", "0.0.0.0/0"}[r.IntN(3)])}
		}
		s.Network.Firewall.Allow = append(s.Network.Firewall.Allow, a)
	}
	return s
}

func randomLeases(r *rand.Rand, m *model) {
	for i := range m.DHCP {
		m.DHCP[i].Running = r.IntN(4) > 0
		m.DHCP[i].Lease = []*dhcp.Lease{nil, lease("10.0.2.15/24", defaultVia("10.0.2.2")), lease("10.0.2.16/32", dhcp.Route{To: pfx("10.0.2.2/32")}, defaultVia("10.0.2.2"))}[r.IntN(3)]
	}
}

// randomPods is what kubeletd may have asked for.
func randomPods(t *testing.T, r *rand.Rand) *Pods {
	if r.IntN(4) == 0 {
		return nil
	}
	var routes []string
	for _, to := range []string{"10.244.2.0/24", "10.244.3.0/24", "10.244.4.0/24"} {
		if r.IntN(3) > 0 {
			routes = append(routes, to+" via "+[]string{"10.0.0.3", "10.0.0.7", "10.0.2.7", "192.0.2.1"}[r.IntN(4)])
		}
	}
	return asked(t, podSpec("10.244.0.0/16"), []string{"", "10.244.1.0/24"}[r.IntN(2)], routes...)
}

// The law: apply a plan, plan again, and nothing is left; wherever the world starts, and with every prefix of a plan
// done before something else is wanted. Meanwhile the firewall never stands open.
func FuzzPlanConverges(f *testing.F) {
	for i := range uint64(64) {
		f.Add(binary.BigEndian.AppendUint64(nil, i))
	}
	testfuzz.Run(f, func(t *testing.T, seed []byte) {
		var n uint64
		for _, b := range seed {
			n = n*257 + uint64(b)
		}
		r := rand.New(rand.NewPCG(n, 1))
		m := newModel(eth("eth0", 2), eth("eth1", 3), Link{Name: "cni0", Index: 4, Kind: "bridge"})
		m.Addresses = []Address{{"cni0", pfx("10.244.0.1/24"), OriginOther}}
		foreign := slices.Clone(m.Addresses)
		closed := false
		for range 4 {
			want := randomSpec(r)
			randomLeases(r, m)
			m.Pods = randomPods(t, r)
			steps := plan(want, m.State)
			for _, s := range steps[:r.IntN(len(steps)+1)] { // power of a SIGKILL
				if err := m.Do(t.Context(), s); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
				if err := guarded(m.State); closed && err != nil {
					t.Fatalf("after %s: %v", s, err)
				}
				closed = closed || guarded(m.State) == nil
			}
		}
		want := randomSpec(r)
		settled(t, m, want)
		for _, a := range foreign {
			if !slices.Contains(m.Addresses, a) {
				t.Errorf("%v was somebody else's and is gone", a)
			}
		}
		for _, tb := range m.Tables {
			if len(tb.Chains) != 1 || len(tb.Jumps) != 1 {
				t.Errorf("%s: left %d chains and %d jumps, want one each", tb.Family, len(tb.Chains), len(tb.Jumps))
			}
		}
		for _, tb := range m.Masquerade {
			if len(tb.Chains) > 1 || len(tb.Jumps) > 1 {
				t.Errorf("%s: left %d chains and %d jumps for pods, want one each at most", tb.Family, len(tb.Chains), len(tb.Jumps))
			}
		}
		if l, _ := m.link("cni0"); l.Up {
			t.Error("touched cni0")
		}
	})
}

func FuzzParseSave(f *testing.F) {
	f.Add("*filter\n:INPUT ACCEPT [0:0]\n:BULKHEAD-IN-aa - [0:0]\n[1:2] -A INPUT -j BULKHEAD-IN-aa\n[3:4] -A BULKHEAD-IN-aa -j DROP\nCOMMIT\n")
	f.Add("# a remark\n*nat\n:BULKHEAD-OUT-aa - [0:0]\n[1:2] -A POSTROUTING -j BULKHEAD-OUT-aa\n[3:4] -A BULKHEAD-OUT-aa -j MASQUERADE\nCOMMIT\n*filter\n")
	f.Add("[x] -A BULKHEAD-IN-aa -j DROP\n:BULKHEAD-IN-aa")
	testfuzz.Run(f, func(t *testing.T, text string) {
		parts, err := parseSave(IPv4, text)
		if err != nil {
			return
		}
		for _, c := range slices.Concat(parts[Ingress].Chains, parts[Masquerading].Chains) {
			if len(c.Rules) != len(c.Packets) || len(c.Rules) != len(c.Bytes) {
				t.Errorf("chain %q: %d rules, %d and %d counters", c.Name, len(c.Rules), len(c.Packets), len(c.Bytes))
			}
		}
	})
}
