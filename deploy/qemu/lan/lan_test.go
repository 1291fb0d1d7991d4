package lan

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// machine is the end of a QEMU: a socket that listens, and frames over the one connection that it has.
type machine struct {
	n    *network
	t    *testing.T
	name string
	addr mac
	l    *net.UnixListener
	conn net.Conn
}

// network is a switch that runs, and the machines that are to be plugged in.
type network struct {
	*Switch
	t       *testing.T
	dir     string
	control Control
	mu      sync.Mutex
	ports   []Port // guarded by mu
}

func (n *network) list() []Port {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.ports)
}

func (n *network) start(cfg Config) (ended <-chan error) {
	n.t.Helper()
	cfg.Dir, cfg.Ports, cfg.Log, cfg.Retry = n.dir, n.list, slog.New(slog.DiscardHandler), time.Millisecond
	s, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Switch, n.control = s, Control{n.dir}
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	over := make(chan struct{})
	go func() { done <- s.Run(ctx); close(over) }()
	n.t.Cleanup(func() { cancel(); <-over })
	return done
}

// plug adds machines, in order, and waits until the switch has them.
func (n *network) plug(names ...string) []*machine {
	n.t.Helper()
	var all []*machine
	for _, name := range names {
		m := &machine{t: n.t, n: n, name: name, addr: mac{2, 0, 0, 0, 0, name[0]}}
		path := filepath.Join(n.dir, name+".sock")
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			n.t.Fatal(err)
		}
		m.l = l
		n.t.Cleanup(func() { l.Close() })
		n.mu.Lock()
		n.ports = append(n.ports, Port{Name: name, Socket: path, Address: netip.MustParsePrefix(fmt.Sprintf("10.5.0.%d/24", 11+len(n.ports)))})
		n.mu.Unlock()
		m.accept()
		all = append(all, m)
	}
	return all
}

func (m *machine) accept() {
	m.t.Helper()
	if err := m.l.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
	c, err := m.l.Accept()
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { c.Close() })
	m.conn = c
	for !m.n.has(m.name) { // the switch dials first, and takes frames to the port a moment later
		if m.t.Context().Err() != nil {
			m.t.Fatal(m.t.Context().Err())
		}
		runtime.Gosched()
	}
}

func (n *network) has(name string) bool {
	n.Switch.mu.Lock()
	defer n.Switch.mu.Unlock()
	return n.Switch.ports[name] != nil
}

func (m *machine) frame(to mac, text string) []byte {
	f := append(append(append([]byte{}, to[:]...), m.addr[:]...), 0x88, 0xb5) // for experiments
	return append(f, text...)
}

func (m *machine) write(frame []byte) {
	m.t.Helper()
	if _, err := m.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) send(to mac, text string) { m.t.Helper(); m.write(m.frame(to, text)) }

func (m *machine) read() []byte {
	m.t.Helper()
	if err := m.conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(m.conn, head[:]); err != nil {
		m.t.Fatalf("%s: %v", m.name, err)
	}
	f := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(m.conn, f); err != nil {
		m.t.Fatalf("%s: %v", m.name, err)
	}
	return f
}

// wants reads the next frame, which must be this one: nothing else came before it.
func (m *machine) wants(text string) {
	m.t.Helper()
	if got := string(m.read()[14:]); got != text {
		m.t.Errorf("%s got %.40q, want %.40q", m.name, got, text)
	}
}

var everyone = mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func aNetwork(t *testing.T) *network { return &network{t: t, dir: t.TempDir()} }

func TestFramesGoWhereTheyBelong(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b", "c")
	a, b, c := m[0], m[1], m[2]
	a.send(everyone, "who is b")
	b.wants("who is b")
	c.wants("who is b")
	b.send(a.addr, "it is I")
	a.wants("it is I")
	a.send(b.addr, "for b alone") // both are known by now
	b.wants("for b alone")
	a.send(everyone, "again for all")
	c.wants("again for all") // and nothing before that
	big := strings.Repeat("x", maxFrame-14)
	a.send(b.addr, big)
	b.wants("again for all")
	b.wants(big)
	// A machine that has moved to another port is found there.
	c.addr = a.addr
	c.send(everyone, "a lives here now")
	a.wants("a lives here now")
	b.wants("a lives here now")
	b.send(a.addr, "hello there")
	c.wants("hello there")
}

func TestLinksAreCutAndHealed(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b", "c")
	a, b, c := m[0], m[1], m[2]
	if err := n.control.SetRules(t.Context(), Cut([]string{"a"}, []string{"b"})); err != nil {
		t.Fatal(err)
	}
	a.send(everyone, "1 from a")
	c.wants("1 from a")
	b.send(everyone, "1 from b")
	c.wants("1 from b")
	// One way only: b hears a, a does not hear b.
	if err := n.control.SetRules(t.Context(), Rule{From: []string{"b"}, To: []string{"a"}, Loss: 1}); err != nil {
		t.Fatal(err)
	}
	a.send(everyone, "2 from a")
	b.wants("2 from a")
	b.send(everyone, "2 from b")
	c.wants("2 from a")
	c.wants("2 from b")
	if err := n.control.SetRules(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.send(everyone, "3 from b")
	a.wants("3 from b") // the first that a hears of b
	st, err := n.control.Status(t.Context())
	if err != nil || len(st.Ports) != 3 || len(st.Rules) != 0 {
		t.Fatalf("%+v, %v", st, err)
	}
	for i, want := range []PortStatus{{Name: "a", Received: 2, Sent: 1, Cut: 2}, {Name: "b", Received: 3, Sent: 1, Cut: 1}} {
		got := st.Ports[i]
		if want.Learned = []string{m[i].addr.String()}; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
}

func (m mac) String() string { return net.HardwareAddr(m[:]).String() }

func TestDelayHoldsBackOneLinkOnly(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b", "c")
	a, b, c := m[0], m[1], m[2]
	if err := n.control.SetRules(t.Context(), Rule{From: []string{"a"}, Delay: 300 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	a.send(everyone, "slow 1")
	a.send(everyone, "slow 2")
	c.wants("slow 1")
	if d := time.Since(begin); d < 300*time.Millisecond {
		t.Errorf("the frame came after %s", d)
	}
	c.send(everyone, "quick")
	a.wants("quick")
	for _, want := range []string{"slow 1", "slow 2", "quick"} { // none overtakes its own sender's
		b.wants(want)
	}
}

func TestRulesThatCannotBe(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	for want, r := range map[string]Rule{"loss 2 is not in 0 to 1": {Loss: 2}, "delay 1h0m0s is not in 0s to 1m0s": {Delay: time.Hour}} {
		if err := n.control.SetRules(t.Context(), r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want …%s…", r, err, want)
		}
	}
	if _, err := n.control.do(t.Context(), order{Op: "dance"}); err == nil || !strings.Contains(err.Error(), `"dance" is none of`) {
		t.Error(err)
	}
}

func TestLossIsAShare(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b")
	if err := n.control.SetRules(t.Context(), Rule{Loss: 0.5}); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		m[0].send(everyone, "maybe")
	}
	if err := n.control.SetRules(t.Context()); err != nil { // the frames before may still be on their way in: only a bound is told
		t.Fatal(err)
	}
	m[0].send(everyone, "surely")
	got := 0
	for string(m[1].read()[14:]) != "surely" {
		got++
	}
	if got < 350 || got > 1000 {
		t.Errorf("%d of 1000 frames came with a loss of one half", got)
	}
}

func TestASlowMachineBlocksNobody(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b", "slow")
	a, b := m[0], m[1]
	text := strings.Repeat("x", 60000)
	const frames = 200 // 12 MB: more than the socket's buffer and the queue hold
	for range frames {
		a.send(everyone, text)
		b.wants(text) // b reads everything, and slow nothing at all
	}
	st := n.Status()
	if p := st.Ports[2]; p.Name != "slow" || p.Lost == 0 {
		t.Errorf("the slow machine lost nothing: %+v", p)
	}
	if q := n.queueOf("slow"); q > maxQueue {
		t.Errorf("%d bytes wait for the slow machine; %d are allowed", q, maxQueue)
	}
}

func (n *network) queueOf(name string) int {
	n.Switch.mu.Lock()
	p := n.Switch.ports[name]
	n.Switch.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes
}

func TestMachinesAndSwitchComeAndGo(t *testing.T) {
	n := aNetwork(t)
	ended := n.start(Config{})
	m := n.plug("a", "b")
	a, b := m[0], m[1]
	b.conn.Close() // b restarts
	b.accept()
	a.send(everyone, "welcome back")
	b.wants("welcome back")
	if err := n.control.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	for _, x := range m {
		if _, err := x.conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", x.name, err)
		}
	}
	if _, err := n.control.Status(t.Context()); err == nil {
		t.Error("a switch that has ended answers")
	}
	n.start(Config{}) // over what the old one left
	a.accept()
	b.accept()
	b.send(everyone, "still there")
	a.wants("still there")
}

func TestTheSwitchEndsWithItsLastMachine(t *testing.T) {
	n := aNetwork(t)
	ended := n.start(Config{Idle: 50 * time.Millisecond})
	m := n.plug("a")
	m[0].l.Close()
	m[0].conn.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// What is no QEMU is disconnected, and nobody else notices.
func TestNonsense(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b", "c")
	if _, err := m[0].conn.Write(binary.BigEndian.AppendUint32(nil, maxFrame+1)); err != nil {
		t.Fatal(err)
	}
	m[0].accept() // after the switch has hung up
	m[0].write([]byte("short"))
	m[0].write(nil)
	m[0].send(everyone, "sense")
	m[1].wants("sense")
}

func TestANameMayBeLong(t *testing.T) {
	n := aNetwork(t)
	n.dir = filepath.Join(n.dir, strings.Repeat("x", 100), strings.Repeat("y", 100))
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	n.start(Config{})
	if _, err := n.control.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// A machine without a configuration gets its address, and other machines do not see its questions.
func TestDHCP(t *testing.T) {
	n := aNetwork(t)
	n.start(Config{})
	m := n.plug("a", "b")
	a, b := m[0], m[1]
	ask := func(p *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
		t.Helper()
		f := udpFrame(everyone, net.IPv4zero, p.ToBytes())[prefix:]
		copy(f[6:], a.addr[:])
		u := f[headEthernet+headIP:]
		binary.BigEndian.PutUint16(u, clientPort)
		binary.BigEndian.PutUint16(u[2:], serverPort)
		a.write(f)
		got := a.read()
		if !bytes.Equal(got[:6], a.addr[:]) || sum(got[headEthernet:headEthernet+headIP]) != 0xffff {
			t.Errorf("to %x, header sums up to %x", got[:6], sum(got[headEthernet:headEthernet+headIP]))
		}
		answer, err := dhcpv4.FromBytes(udp(got, clientPort))
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	discover, err := dhcpv4.NewDiscovery(a.addr[:])
	if err != nil {
		t.Fatal(err)
	}
	offer := ask(discover)
	if offer.MessageType() != dhcpv4.MessageTypeOffer || offer.YourIPAddr.String() != "10.5.0.11" || offer.ServerIdentifier().String() != "10.5.0.254" ||
		offer.SubnetMask().String() != "ffffff00" || len(offer.Router()) != 0 {
		t.Errorf("offer: %s", offer.Summary())
	}
	request, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		t.Fatal(err)
	}
	if ack := ask(request); ack.MessageType() != dhcpv4.MessageTypeAck || ack.YourIPAddr.String() != "10.5.0.11" {
		t.Errorf("ack: %s", ack.Summary())
	}
	request.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 5, 0, 99)))
	if nak := ask(request); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("another's address: %s", nak.Summary())
	}
	a.send(everyone, "configured")
	b.wants("configured")
}

func FuzzDHCP(f *testing.F) {
	f.Add([]byte("x"))
	f.Add(udpFrame(everyone, net.IPv4zero, make([]byte, 300))[prefix:])
	testfuzz.Run(f, func(_ *testing.T, frame []byte) {
		if len(frame) >= 14 {
			dhcpAnswer(netip.MustParsePrefix("10.5.0.11/24"), frame)
		}
	})
}

// The node's own client takes what the switch answers, first as one without a lease and then as one that has to renew it by broadcast.
func TestDHCPWithTheNodesClient(t *testing.T) {
	address, hardware := netip.MustParsePrefix("10.5.0.12/24"), net.HardwareAddr{2, 0, 0, 0, 0, 9}
	answer := func(m *dhcp.Message) *dhcpv4.DHCPv4 {
		t.Helper()
		f := udpFrame(everyone, net.IPv4zero, m.Packet.ToBytes())[prefix:]
		copy(f[6:], hardware)
		binary.BigEndian.PutUint16(f[headEthernet+headIP+2:], serverPort)
		p, err := dhcpv4.FromBytes(udp(dhcpAnswer(address, f)[prefix:], clientPort))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	m := dhcp.NewMachine(dhcp.Identity{Hardware: hardware}, rand.New(rand.NewPCG(1, 2)), nil, 0)
	now := m.Deadline()
	for ask := m.Tick(now); ask != nil; {
		next, err := m.Receive(now, answer(ask))
		if err != nil {
			t.Fatal(err)
		}
		ask = next
	}
	l := m.Lease()
	if m.Phase() != dhcp.Bound || l == nil || l.Address != address || len(l.Routes) != 0 || l.Expire-now != leaseTime {
		t.Fatalf("%s, %+v", m.Phase(), l)
	}
	now = l.Rebind + time.Second
	for range 10 { // renewing goes to the server's address, where nobody is; rebinding goes to all
		ask := m.Tick(now)
		if ask != nil && !ask.To.IsValid() {
			if _, err := m.Receive(now, answer(ask)); err != nil {
				t.Fatal(err)
			}
			break
		}
		now = m.Deadline()
	}
	if l := m.Lease(); m.Phase() != dhcp.Bound || l.Address != address || l.Expire <= now {
		t.Errorf("after rebinding: %s, %+v", m.Phase(), l)
	}
}
