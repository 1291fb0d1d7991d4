package networkd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testns"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

const helperDir = "BULKHEAD_TEST_NETWORKD"

// TestHelper is no test: it is networkd itself, in the process that TestDaemon starts with networkd's user and capabilities.
func TestHelper(t *testing.T) {
	dir := os.Getenv(helperDir)
	if dir == "" {
		t.Skip("it is started by TestDaemon")
	}
	socket := filepath.Join(dir, "sock")
	_ = os.Remove(socket) // of the one before
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Dir: dir, Hostname: "bulkhead-test", Env: daemon.Env{
		Name: "networkd", Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Listen: l, Metrics: metrics.New("networkd"),
		Ready: func() { fmt.Println("ready") }, Who: func(net.Conn) (uid.ID, error) { return uid.Machined, nil },
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Fatal(d.Run(t.Context()))
}

// process is one life of networkd.
type process struct {
	*exec.Cmd
	control controlv1.ControlClient
	network networkv1.NetworkClient
}

// spawn starts networkd confined as its unit says, and waits until it serves.
func spawn(t *testing.T, dir string) *process {
	t.Helper()
	data, err := os.ReadFile("unit.json")
	if err != nil {
		t.Fatal(err)
	}
	u, err := unitfile.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestHelper$", "-test.v")}
	p.Env = append(os.Environ(), helperDir+"="+dir)
	p.Stderr = os.Stderr
	p.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.UID}}
	for bit := range 64 {
		if u.Capabilities&(1<<bit) != 0 {
			p.SysProcAttr.AmbientCaps = append(p.SysProcAttr.AmbientCaps, uintptr(bit))
		}
	}
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	lines := bufio.NewScanner(stdout)
	for lines.Scan() && lines.Text() != "ready" {
	}
	if lines.Text() != "ready" {
		t.Fatal("networkd ended before it served")
	}
	go func() {
		for lines.Scan() {
		}
	}()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	p.control, p.network = controlv1.NewControlClient(conn), networkv1.NewNetworkClient(conn)
	return p
}

func (p *process) kill() {
	_ = p.Process.Kill() // it may be dead already
	_ = p.Wait()         // "signal: killed"
}

// await returns the first status for which f holds.
func (p *process) await(t *testing.T, what string, f func(*networkv1.Status) bool) *networkv1.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stream, err := p.network.WatchStatus(ctx, &networkv1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var last *networkv1.Status
	for {
		s, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: %v; last status: %v", what, err, last)
		}
		if last = s; f(s) {
			return s
		}
	}
}

// dhcpServer answers on the far end of a cable, and remembers what it was asked.
type dhcpServer struct {
	mu      sync.Mutex
	heard   []string      // guarded by mu
	address net.IP        // guarded by mu
	renewed chan struct{} // capacity 1; filled by each renewal, which has a client address
}

func (s *dhcpServer) handle(conn net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = append(s.heard, m.MessageType().String())
	kind := map[dhcpv4.MessageType]dhcpv4.MessageType{dhcpv4.MessageTypeDiscover: dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeRequest: dhcpv4.MessageTypeAck}[m.MessageType()]
	asked := m.RequestedIPAddress()
	if asked == nil {
		asked = m.ClientIPAddr
		select {
		case s.renewed <- struct{}{}:
		default:
		}
	}
	if kind == dhcpv4.MessageTypeAck && !asked.Equal(s.address) {
		kind = dhcpv4.MessageTypeNak
	}
	reply, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(s.address), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 0, 2, 2))), dhcpv4.WithRouter(net.IPv4(10, 0, 2, 2)),
		dhcpv4.WithDNS(net.IPv4(10, 0, 2, 3)), dhcpv4.WithLeaseTime(60),
		dhcpv4.WithGeneric(dhcpv4.OptionRenewTimeValue, []byte{0, 0, 0, 1}))
	if err == nil {
		_, err = conn.WriteTo(reply.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
	}
	if err != nil {
		s.heard = append(s.heard, err.Error())
	}
}

func (s *dhcpServer) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := strings.Join(s.heard, " ")
	s.heard = nil
	return out
}

func (s *dhcpServer) move(to net.IP) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.address = to
}

// serveDHCP makes eth0, and a server at its other end.
func serveDHCP(t *testing.T) *dhcpServer {
	t.Helper()
	s := &dhcpServer{address: net.IPv4(10, 0, 2, 15), renewed: make(chan struct{}, 1)}
	other := testns.Other(t)
	cable(t, "eth0", "peer0", other)
	testns.In(t, other, func() {
		l, err := netlink.LinkByName("peer0")
		if err == nil {
			err = netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 2, 2).To4(), Mask: net.CIDRMask(24, 32)}})
		}
		if err != nil {
			t.Error(err)
			return
		}
		srv, err := server4.NewServer("peer0", nil, s.handle) // opens its socket here
		if err != nil {
			t.Error(err)
			return
		}
		ended := make(chan struct{})
		go func() { defer close(ended); _ = srv.Serve() }() // ends with an error when it is closed
		t.Cleanup(func() { srv.Close(); <-ended })
	})
	return s
}

const document = `apiVersion: bulkhead.dev/v1
kind: Machine
hostname: n1
---
apiVersion: bulkhead.dev/v1
kind: Network
interfaces:
  - name: eth0
`

func kernelHas(t *testing.T, want ...string) {
	t.Helper()
	k := real(t, t.TempDir())
	have := owned(read(t, k))
	for _, w := range want {
		if !strings.Contains(have, w) {
			t.Errorf("the kernel lacks %q; it has\n%s", w, have)
		}
	}
}

// networkd, confined as its unit says, from nothing to a lease, killed, restarted, moved, and given another document.
func TestDaemon(t *testing.T) {
	if !testns.Isolate(t) {
		return
	}
	dir, err := os.MkdirTemp("/tmp", "networkd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chown(dir, int(uid.Networkd), int(uid.Networkd))); err != nil {
		t.Fatal(err)
	}
	dhcpd := serveDHCP(t)
	p := spawn(t, dir)
	s := p.await(t, "bare firewall", func(s *networkv1.Status) bool { return len(s.Rules) > 0 && s.Hostname != "" })
	if s.Generation != 0 || s.Hostname != "bulkhead-test" {
		t.Errorf("bare status: %v", s)
	}
	set := func(generation uint64, text string) {
		t.Helper()
		spec := &controlv1.Spec{Generation: generation, Documents: []byte(text)}
		if _, err := p.control.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: spec}); err != nil {
			t.Fatal(err)
		}
	}
	plan, err := p.control.PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: &controlv1.Spec{Generation: 1, Documents: []byte(document + "    dhcp: true\n")}})
	if err != nil || !strings.Contains(strings.Join(plan.GetSteps(), "\n"), "dhcp start dev eth0") {
		t.Errorf("plan: %v, %v", plan.GetSteps(), err)
	}
	set(1, document+"    dhcp: true\n")
	leased := func(address string) func(*networkv1.Status) bool {
		return func(s *networkv1.Status) bool {
			return s.Converged && len(s.Leases) == 1 && s.Leases[0].Address == address && strings.Contains(fmt.Sprint(s.Addresses), address)
		}
	}
	s = p.await(t, "lease", leased("10.0.2.15/24"))
	if heard := dhcpd.take(); !strings.HasPrefix(heard, "DISCOVER") || !strings.Contains(heard, "REQUEST") {
		t.Errorf("the server heard %q", heard)
	}
	if s.Hostname != "n1" || fmt.Sprint(s.Nameservers) != "[10.0.2.3]" || s.Leases[0].Server != "10.0.2.2" || s.Leases[0].RemainingSeconds == 0 {
		t.Errorf("status: %v", s)
	}
	kernelHas(t, "10.0.2.15/24 eth0 dhcp", "default via 10.0.2.2 dev eth0 metric 1024 dhcp")
	checkFiles(t, dir)

	p.kill()
	kernelHas(t, "10.0.2.15/24 eth0 dhcp", "default via 10.0.2.2 dev eth0 metric 1024 dhcp") // while it is down
	p = spawn(t, dir)
	p.await(t, "after a restart", func(s *networkv1.Status) bool { return leased("10.0.2.15/24")(s) && s.Generation == 1 })
	kernelHas(t, "10.0.2.15/24 eth0 dhcp")
	for range 2 { // the second one is sent only if the first was answered: else the client waits for a minute
		select {
		case <-dhcpd.renewed:
		case <-time.After(20 * time.Second):
			t.Fatal("no renewal")
		}
	}
	// The server gives the address away: the next renewal is refused, and the new address comes.
	dhcpd.move(net.IPv4(10, 0, 2, 16))
	p.await(t, "another address", leased("10.0.2.16/24"))
	if heard := dhcpd.take(); !strings.HasPrefix(heard, "REQUEST") || !strings.HasSuffix(heard, "DISCOVER REQUEST") {
		t.Errorf("after the restart the server heard %q, want a check of the old lease, a refused renewal, and a new lease", heard)
	}
	if _, err := p.control.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 2, Documents: []byte("kind: Nonsense")}}); !errs.Is(err, errs.Invalid) {
		t.Errorf("nonsense: %v", err)
	}
	set(2, document+"    addresses: [10.0.0.3/24]\n")
	s = p.await(t, "static", func(s *networkv1.Status) bool {
		return s.Converged && s.Generation == 2 && strings.Contains(fmt.Sprint(s.Addresses), "10.0.0.3/24")
	})
	if len(s.Leases) != 0 || strings.Contains(fmt.Sprint(s.Addresses), "10.0.2.") {
		t.Errorf("the lease is not gone: %v %v", s.Leases, s.Addresses)
	}
	checkMetrics(t, p)
}

func checkFiles(t *testing.T, dir string) {
	t.Helper()
	for name, want := range map[string]string{"hostname": "n1\n", "resolv.conf": "nameserver 10.0.2.3\n", "hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost\n10.0.2.15 n1\n"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != 0o644 {
			t.Errorf("%s: mode %v, %v", name, st.Mode(), err)
		}
	}
}

func checkMetrics(t *testing.T, p *process) {
	t.Helper()
	m, err := p.control.ReadMetrics(t.Context(), &controlv1.ReadMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range m.GetFamilies() {
		for _, s := range f.GetSamples() {
			values[f.GetName()] += s.GetValue()
		}
	}
	for name, want := range map[string]float64{"bulkhead_networkd_generation_desired": 2, "bulkhead_networkd_generation_observed": 2, "bulkhead_networkd_converged": 1, "bulkhead_networkd_link_carrier": 1} {
		if values[name] != want {
			t.Errorf("%s is %v, want %v", name, values[name], want)
		}
	}
}
