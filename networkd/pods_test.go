package networkd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// podSpec is a node's with the built-in pod network.
func podSpec(subnet string, interfaces ...config.Interface) Spec {
	s := spec(interfaces...)
	s.Pods, s.Bridge = pfx(subnet), true
	return s
}

// asked is what kubeletd asks for; routes are "prefix via address".
func asked(t *testing.T, want Spec, local string, routes ...string) *Pods {
	t.Helper()
	p, err := parsePods(request(want.Pods.String(), local, routes...), want)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func request(subnet, local string, routes ...string) *networkv1.SetPodNetworkRequest {
	r := &networkv1.SetPodNetworkRequest{PodSubnets: strings.Fields(subnet), LocalPrefixes: strings.Fields(local)}
	for _, s := range routes {
		to, via, _ := strings.Cut(s, " via ")
		r.Routes = append(r.Routes, &networkv1.PodRoute{Prefix: to, Via: via})
	}
	return r
}

func TestSetPodNetworkRefuses(t *testing.T) {
	many := make([]string, maxPodRoutes+1)
	for i := range many {
		many[i] = fmt.Sprintf("10.244.%d.%d/32 via 10.0.0.7", 2+i/256, i%256)
	}
	good := podSpec("10.244.0.0/16", static("10.0.0.3/24"))
	none := good
	none.Bridge = false
	for _, c := range []struct {
		name string
		want Spec
		r    *networkv1.SetPodNetworkRequest
		kind errs.Kind
		text string
	}{
		{"a route that leads outside", good, request("10.244.0.0/16", "", "10.0.0.0/24 via 10.0.0.7"), errs.Invalid, "10.0.0.0/24 is not inside of the pod subnets [10.244.0.0/16]"},
		{"the default route", good, request("10.244.0.0/16", "", "0.0.0.0/0 via 10.0.0.7"), errs.Invalid, "is not a prefix like"},
		{"a route around the subnet", good, request("10.244.0.0/16", "", "10.240.0.0/12 via 10.0.0.7"), errs.Invalid, "not inside"},
		{"bits behind the length", good, request("10.244.0.0/16", "", "10.244.1.1/24 via 10.0.0.7"), errs.Invalid, "10.244.1.0/24 is meant"},
		{"no gateway", good, request("10.244.0.0/16", "", "10.244.1.0/24"), errs.Invalid, `gateway "" of`},
		{"gateway of the other family", good, request("10.244.0.0/16", "", "10.244.1.0/24 via fd00::1"), errs.Invalid, "other family"},
		{"gateway among the pods", good, request("10.244.0.0/16", "", "10.244.1.0/24 via 10.244.2.1"), errs.Invalid, "no node's address"},
		{"loopback as gateway", good, request("10.244.0.0/16", "", "10.244.1.0/24 via 127.0.0.1"), errs.Invalid, "no node's address"},
		{"one prefix twice", good, request("10.244.0.0/16", "", "10.244.1.0/24 via 10.0.0.7", "10.244.1.0/24 via 10.0.0.8"), errs.Invalid, "twice"},
		{"another node's is this one's", good, request("10.244.0.0/16", "10.244.1.0/24", "10.244.1.128/25 via 10.0.0.7"), errs.Invalid, "overlaps this node's own"},
		{"local pods outside", good, request("10.244.0.0/16", "10.0.0.0/24"), errs.Invalid, "local_prefixes: 10.0.0.0/24 is not inside"},
		{"two subnets of a family", good, request("10.244.0.0/16 10.245.0.0/16", ""), errs.Invalid, "second one of its family"},
		{"too many", good, request("10.244.0.0/16", "", many...), errs.Invalid, "5001 of them; at most 5000"},
		{"a subnet that is not the document's", good, request("10.0.0.0/8", ""), errs.Precondition, "10.0.0.0/8 is not inside of 10.244.0.0/16"},
		{"another pod network", none, request("10.244.0.0/16", ""), errs.Precondition, "Kubernetes.cni"},
	} {
		if _, err := parsePods(c.r, c.want); !errs.Is(err, c.kind) || !strings.Contains(fmt.Sprint(err), c.text) {
			t.Errorf("%s: %v; want %q", c.name, err, c.text)
		}
	}
	if p, err := parsePods(request("10.244.0.0/16", "", many[1:]...), good); err != nil || len(p.Routes) != maxPodRoutes {
		t.Errorf("%d routes: %v", maxPodRoutes, err)
	}
	if _, err := parsePods(request("", ""), none); err != nil {
		t.Errorf("nothing at all: %v", err)
	}
}

// What is asked for comes, what is no longer asked for goes, others' stays, and before kubeletd speaks nothing changes.
func TestPlanPods(t *testing.T) {
	want := podSpec("10.244.0.0/16", static("10.0.0.3/24"))
	m := settled(t, newModel(eth("eth0", 2)), want)
	foreign := Route{To: pfx("10.244.9.0/24"), Via: ip("10.0.0.9"), Link: "eth0", Origin: OriginOther}
	m.Routes = append(m.Routes, foreign)
	m.Pods = asked(t, want, "10.244.1.0/24", "10.244.2.0/24 via 10.0.0.4", "10.244.3.0/24 via 10.0.0.5", "10.244.4.0/24 via 192.0.2.1", "10.244.5.0/24 via 10.0.0.3")
	chain := chainOf(Masquerading, masquerade(m.Pods, IPv4)).Name
	if got, golden := lines(plan(want, m.State)), "masquerade enter ipv4 "+chain+"\nroute add 10.244.2.0/24 via 10.0.0.4 dev eth0\nroute add 10.244.3.0/24 via 10.0.0.5 dev eth0\n"; got != golden {
		t.Errorf("plan is\n%swant\n%s", got, golden)
	}
	if waiting := resolve(want, m.State).waiting; len(waiting) != 2 || !strings.Contains(waiting[0], "192.0.2.1") || !strings.Contains(waiting[1], "own address") {
		t.Errorf("waiting: %q", waiting)
	}
	settled(t, m, want)

	// Another process, to which kubeletd has not yet spoken.
	m.Pods = nil
	if got := lines(plan(want, m.State)); got != "" {
		t.Errorf("before kubeletd speaks:\n%s", got)
	}
	if got := lines(plan(bare("n1"), m.State)); strings.Contains(got, "10.244") || strings.Contains(got, "masquerade") {
		t.Errorf("without a spec:\n%s", got)
	}
	// The node moved.
	m.Pods = asked(t, want, "10.244.1.0/24", "10.244.2.0/24 via 10.0.0.6")
	if got, golden := lines(plan(want, m.State)), "route add 10.244.2.0/24 via 10.0.0.6 dev eth0\nroute del 10.244.2.0/24 via 10.0.0.4 dev eth0\nroute del 10.244.3.0/24 via 10.0.0.5 dev eth0\n"; got != golden {
		t.Errorf("plan is\n%swant\n%s", got, golden)
	}
	settled(t, m, want)
	// Another pod network took over: whatever was asked for.
	other := want
	other.Bridge = false
	settled(t, m, other)
	if len(m.Masquerade[0].Chains)+len(m.Masquerade[0].Jumps) != 0 || !slices.Equal(m.Routes, []Route{foreign}) {
		t.Errorf("left behind: %v, %v", m.Masquerade[0], m.Routes)
	}
}

// A plan for the most nodes there may be must not take long: it is made at every event.
func TestPlanManyRoutes(t *testing.T) {
	want := podSpec("10.0.0.0/8", static("192.168.0.3/16"))
	m := settled(t, newModel(eth("eth0", 2)), want)
	var routes []string
	for i := range maxPodRoutes {
		routes = append(routes, fmt.Sprintf("10.%d.%d.0/24 via 192.168.%d.%d", i/256, i%256, 1+i/250, 1+i%250))
	}
	m.Pods = asked(t, want, "10.200.0.0/24", routes...)
	for _, r := range m.Pods.Routes {
		m.Routes = append(m.Routes, Route{To: r.To, Via: r.Via, Link: "eth0", Origin: OriginPod})
	}
	start := time.Now()
	steps := plan(want, m.State)
	if d := time.Since(start); d > time.Second {
		t.Errorf("a plan took %s", d)
	}
	if len(steps) != 1 { // the masquerading
		t.Errorf("%d steps, want one: %v", len(steps), steps[:min(3, len(steps))])
	}
}

// podWorld is a node's kernel in this namespace, a pod behind a cable, and another node with a pod and the outside behind another one.
func podWorld(t *testing.T) (k *linux, pod, far netns.NsHandle) {
	t.Helper()
	testns.New(t)
	pod, far = testns.Other(t), testns.Other(t)
	cable(t, "pod0", "eth0", pod)
	cable(t, "eth0", "peer0", far)
	setup := func(name string, addresses []string, routes ...string) {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range addresses {
			p := pfx(a)
			err = errors.Join(err, netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: 0x02})) // nodad
		}
		err = errors.Join(err, netlink.LinkSetUp(l))
		for _, r := range routes {
			to, via, _ := strings.Cut(r, " via ")
			p := pfx(to)
			err = errors.Join(err, netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Gw: net.ParseIP(via)}))
		}
		if err != nil {
			t.Errorf("set up %s: %v", name, err)
		}
	}
	setup("pod0", []string{"10.244.1.1/24", "fd00:244:0:1::1/64"})
	testns.In(t, pod, func() {
		setup("eth0", []string{"10.244.1.2/24", "fd00:244:0:1::2/64"}, "0.0.0.0/0 via 10.244.1.1", "::/0 via fd00:244:0:1::1")
	})
	testns.In(t, far, func() { // its pod's and the outside's addresses are its own
		setup("lo", []string{"10.244.2.2/32", "192.0.2.1/32", "fd00:244:0:2::2/128", "2001:db8::1/128"})
		setup("peer0", []string{"10.0.0.4/24", "fd00::4/64"}, "10.244.1.0/24 via 10.0.0.3", "fd00:244:0:1::/64 via fd00::3")
	})
	for _, p := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} { // as PID 1 does
		if err := os.WriteFile("/proc/sys/net/"+p, []byte("1"), 0); err != nil { // the thread's namespace's
			t.Fatal(err)
		}
	}
	return real(t, t.TempDir()), pod, far
}

// sender returns which address a server at the far side sees when a pod calls it.
func sender(t *testing.T, pod, far netns.NsHandle, at string) string {
	t.Helper()
	var l net.Listener
	var err error
	testns.In(t, far, func() { l, err = net.Listen("tcp", net.JoinHostPort(at, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	seen := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			seen <- err.Error()
			return
		}
		defer c.Close()
		seen <- netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().String()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	testns.In(t, pod, func() {
		var c net.Conn
		if c, err = (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String()); err == nil {
			c.Close()
		}
	})
	if err != nil {
		return "nobody: " + err.Error()
	}
	return <-seen
}

// Pods reach pods of another node with their own addresses, and everybody else with the node's.
func TestPodsAcrossNodes(t *testing.T) {
	for _, c := range []struct {
		family                               Family
		subnet, local, route, pod, far, node string
		outside, own                         string
	}{
		{IPv4, "10.244.0.0/16", "10.244.1.0/24", "10.244.2.0/24 via 10.0.0.4", "10.244.1.2", "10.244.2.2", "10.0.0.3", "192.0.2.1", "0.0.0.0/0 via 10.0.0.4"},
		{IPv6, "fd00:244::/48", "fd00:244:0:1::/64", "fd00:244:0:2::/64 via fd00::4", "fd00:244:0:1::2", "fd00:244:0:2::2", "fd00::3", "2001:db8::1", "::/0 via fd00::4"},
	} {
		t.Run(string(c.family), func(t *testing.T) {
			k, pod, far := podWorld(t)
			want := podSpec(c.subnet, static("10.0.0.3/24", "fd00::3/64"))
			to, via, _ := strings.Cut(c.own, " via ")
			want.Network.Interfaces[0].Routes = []config.Route{{To: pfx(to), Via: ip(via)}}
			asks := asking{k, asked(t, want, c.local, c.route)}
			have := reach(t, asks, want)
			if c.family == IPv6 {
				undad(t, "eth0")
			}
			if got := sender(t, pod, far, c.far); got != c.pod {
				t.Errorf("another node's pod sees %s, want the pod's own %s", got, c.pod)
			}
			if got := sender(t, pod, far, c.outside); got != c.node {
				t.Errorf("the outside sees %s, want the node's %s", got, c.node)
			}
			rule := "-s " + c.local + " -j MASQUERADE --random-fully"
			at := slices.IndexFunc(have.Masquerade, func(tb Table) bool { return tb.Family == c.family })
			if ch := have.Masquerade[at].Chains; len(ch) != 1 || ch[0].Rules[len(ch[0].Rules)-1] != rule {
				t.Errorf("%v: want %q last", ch, rule)
			}
			// A networkd that nobody has spoken to yet leaves all of it, and one that is told of nothing takes all of it away.
			if again := reach(t, asking{k, nil}, want); owned(again) != owned(have) || len(again.Masquerade[at].Jumps) != 1 {
				t.Errorf("after a restart:\n%s\nwant\n%s", owned(again), owned(have))
			}
			gone := reach(t, asking{k, &Pods{}}, want)
			if strings.Contains(owned(gone), " pod") || len(gone.Masquerade[at].Chains)+len(gone.Masquerade[at].Jumps) != 0 {
				t.Errorf("left behind:\n%s\n%v", owned(gone), gone.Masquerade[at])
			}
		})
	}
}

// asking is a kernel to whose networkd kubeletd has spoken.
type asking struct {
	*linux
	pods *Pods
}

func (a asking) Read(ctx context.Context) (State, error) {
	a.firewall.readAt = time.Time{}
	s, err := a.linux.Read(ctx)
	s.Pods = a.pods
	return s, err
}

// undad waits until a link's IPv6 addresses may be used: the kernel looks whether another has them (RFC 4862).
func undad(t *testing.T, link string) {
	t.Helper()
	updates, stop := make(chan netlink.AddrUpdate, 64), make(chan struct{})
	defer close(stop)
	if err := netlink.AddrSubscribe(updates, stop); err != nil {
		t.Fatal(err)
	}
	late := time.After(10 * time.Second)
	for {
		l, err := netlink.LinkByName(link)
		if err != nil {
			t.Fatal(err)
		}
		list, err := netlink.AddrList(l, netlink.FAMILY_V6)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool { return a.Flags&0x40 != 0 }) { // IFA_F_TENTATIVE
			return
		}
		select {
		case <-updates:
		case <-late:
			t.Fatalf("%s: addresses stay tentative", link)
		}
	}
}

// kubeletd and nobody else says where pods are; the routes appear, are told by whom, and a restarted networkd keeps them.
func TestSetPodNetwork(t *testing.T) {
	if !testns.Isolate(t) {
		return
	}
	cable(t, "eth0", "peer0", testns.Other(t))
	dir := t.TempDir()
	var who atomic.Uint32
	start := func() (*grpc.ClientConn, func()) {
		ctx, cancel := context.WithCancel(t.Context())
		socket := filepath.Join(dir, "sock")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(Config{Dir: dir, Hostname: "n1", Env: daemon.Env{
			Name: "networkd", Log: slog.New(slog.DiscardHandler), Listen: l, Metrics: metrics.New("networkd"),
			Ready: func() {}, Who: func(net.Conn) (uid.ID, error) { return uid.ID(who.Load()), nil },
		}})
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx) }()
		conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		return conn, func() { cancel(); <-ended; conn.Close() }
	}
	ctx := t.Context()
	who.Store(uint32(uid.Machined))
	conn, stop := start()
	pods, control := networkv1.NewPodsClient(conn), controlv1.NewControlClient(conn)
	if _, err := pods.SetPodNetwork(ctx, &networkv1.SetPodNetworkRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("machined sets the pod network: %v, want it refused", err)
	}
	if _, err := networkv1.NewVirtualClient(conn).Hold(ctx, &networkv1.HoldRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("machined holds virtual addresses: %v, want it refused", err)
	}
	const document = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n---\napiVersion: bulkhead.dev/v1\nkind: Network\ninterfaces:\n  - {name: eth0, addresses: [10.0.0.3/24]}\n" +
		"---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: c\nvirtualIPs: [10.0.0.100]\n---\napiVersion: bulkhead.dev/v1\nkind: Kubernetes\n"
	if _, err := control.SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 1, Documents: []byte(document)}}); err != nil {
		t.Fatal(err)
	}
	stop()

	who.Store(uint32(uid.Kubeletd))
	conn, stop = start()
	pods = networkv1.NewPodsClient(conn)
	r := request("10.244.0.0/16", "10.244.1.0/24", "10.244.2.0/24 via 10.0.0.4", "10.244.3.0/24 via 192.0.2.7")
	out, err := pods.SetPodNetwork(ctx, r)
	if err != nil || len(out.GetUnreachable()) != 1 || !strings.Contains(out.GetUnreachable()[0], "192.0.2.7") {
		t.Errorf("%v, %v; want the one whose gateway is on no link", out.GetUnreachable(), err)
	}
	await := func(f func(*networkv1.Status) bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		stream, err := networkv1.NewNetworkClient(conn).WatchStatus(ctx, &networkv1.WatchStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for {
			s, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if f(s) {
				return
			}
		}
	}
	awaitPod := func() {
		t.Helper()
		await(func(s *networkv1.Status) bool {
			route := slices.ContainsFunc(s.GetRoutes(), func(r *networkv1.Route) bool {
				return r.GetOrigin() == "pod" && r.GetDestination() == "10.244.2.0/24" && r.GetGateway() == "10.0.0.4"
			})
			rule := slices.ContainsFunc(s.GetRules(), func(r *networkv1.Rule) bool {
				return strings.Contains(r.GetText(), "ASQUERADE") || strings.Contains(r.GetText(), "masquerade from 10.244.1.0/24")
			})
			return route && rule && s.GetConverged()
		})
	}
	awaitPod()
	if _, err := pods.SetPodNetwork(ctx, request("10.244.0.0/16", "", "10.0.0.0/8 via 10.0.0.4")); !errs.Is(err, errs.Invalid) {
		t.Errorf("a route outside of the pod subnets: %v", err)
	}
	hold := func(seconds time.Duration, addresses ...string) error {
		_, err := networkv1.NewVirtualClient(conn).Hold(ctx, &networkv1.HoldRequest{Addresses: addresses, UntilMilliseconds: uint64((dhcp.Now() + seconds*time.Second) / time.Millisecond)})
		return err
	}
	virtual := func(s *networkv1.Status) bool {
		return slices.ContainsFunc(s.GetAddresses(), func(a *networkv1.Address) bool {
			return a.GetAddress() == "10.0.0.100/32" && a.GetOrigin() == "virtual"
		})
	}
	if err := hold(5, "10.0.0.100"); err != nil {
		t.Error(err)
	}
	await(virtual)
	if err := hold(11, "10.0.0.100"); !errs.Is(err, errs.Invalid) {
		t.Errorf("a virtual address for eleven seconds: %v", err)
	}
	if err := hold(5, "10.0.0.101"); !errs.Is(err, errs.Invalid) {
		t.Errorf("an address that the document does not name: %v", err)
	}
	if err := hold(0); err != nil {
		t.Error(err)
	}
	await(func(s *networkv1.Status) bool { return !virtual(s) })
	stop()
	conn, stop = start()
	defer stop()
	awaitPod()
}
