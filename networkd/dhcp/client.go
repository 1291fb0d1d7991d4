package dhcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	maxSleep  = 5 * time.Minute // Go's timers stand still while the machine sleeps, leases do not
	maxPacket = 4096
)

// client carries out what one Machine says. A socket is open only while an answer is awaited.
type client struct {
	pool  *Pool
	entry *entry
	link  string
	id    Identity
	lease *Lease
	kick  <-chan struct{}

	conn    net.PacketConn // nil: none is open
	unicast bool           // conn is an ordinary socket
	packets chan []byte    // what comes in on conn; closed when it fails; nil if none is open
	failed  string         // the last error that was logged
}

func (c *client) run(ctx context.Context) {
	m := NewMachine(c.id, newRand(), c.lease, Now())
	defer c.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		c.send(m, m.Tick(Now()))
		c.pool.set(c.entry, m.Phase(), m.Lease())
		if m.Phase() == Bound {
			c.close()
		}
		timer.Reset(min(max(m.Deadline()-Now(), 0), maxSleep))
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
			m.Kick(Now())
		case <-timer.C:
		case data, ok := <-c.packets:
			if !ok {
				c.close() // the next packet to send opens another
				continue
			}
			p, err := dhcpv4.FromBytes(data)
			var reply *Message
			if err == nil {
				reply, err = m.Receive(Now(), p)
			}
			if err != nil {
				c.pool.log.Debug("dhcp packet ignored", "link", c.link, "err", err.Error())
			}
			c.send(m, reply)
		}
	}
}

// send sends a message, if there is one. The machine repeats what could not be sent, as if it had been lost.
func (c *client) send(m *Machine, msg *Message) {
	if msg == nil {
		return
	}
	err := c.open(msg.To.IsValid())
	if err == nil {
		to := &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ServerPort}
		if msg.To.IsValid() {
			to.IP = msg.To.AsSlice()
		}
		_, err = c.conn.WriteTo(msg.Packet.ToBytes(), to)
	}
	if err == nil {
		c.failed = ""
		return
	}
	c.close()
	if text := err.Error(); text != c.failed { // repeats are said once
		c.failed = text
		c.pool.log.Warn("dhcp send", "link", c.link, "phase", m.Phase().String(), "err", text)
	}
}

// receive passes on what comes in until the socket is closed or fails.
func receive(conn net.PacketConn, packets chan<- []byte) {
	defer close(packets)
	for {
		buf := make([]byte, maxPacket)
		n, _, err := conn.ReadFrom(buf)
		switch {
		case errors.Is(err, unix.ECONNREFUSED): // the server is away just now; that is what repetition is for
		case err != nil:
			return
		default:
			packets <- buf[:n]
		}
	}
}

func (c *client) close() {
	if c.conn == nil {
		return
	}
	_ = c.conn.Close()    // nothing is buffered
	for range c.packets { // until receive has ended
	}
	c.conn, c.packets = nil, nil
}

// open opens the socket that a message needs: a packet socket, which works on a link without addresses, or an ordinary one
// for the server that granted the lease.
func (c *client) open(unicast bool) error {
	if c.conn != nil && c.unicast == unicast {
		return nil
	}
	c.close()
	c.unicast = unicast
	if unicast {
		lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
			var e error
			return errors.Join(rc.Control(func(fd uintptr) {
				e = errors.Join(unix.SetsockoptString(int(fd), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, c.link),
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			}), e)
		}}
		// Not bound to the lease's address: refusals are broadcast (RFC 2131 4.1).
		conn, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf(":%d", dhcpv4.ClientPort))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		c.conn = conn
	} else {
		ifc, err := net.InterfaceByName(c.link)
		if err != nil {
			return err
		}
		raw, err := packet.Listen(ifc, packet.Datagram, unix.ETH_P_IP, &packet.Config{Filter: filter})
		if err != nil {
			return fmt.Errorf("listen on %s: %w", c.link, err)
		}
		c.conn = nclient4.NewBroadcastUDPConn(raw, &net.UDPAddr{Port: dhcpv4.ClientPort})
	}
	c.packets = make(chan []byte)
	go receive(c.conn, c.packets)
	return nil
}

// filter lets only UDP to port 68 through, so that the node's other traffic is neither copied nor parsed here.
var filter = assemble([]bpf.Instruction{
	bpf.LoadAbsolute{Off: 9, Size: 1}, // IPv4 protocol
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_UDP, SkipTrue: 5},
	bpf.LoadAbsolute{Off: 6, Size: 2}, // fragment offset
	bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 3},
	bpf.LoadMemShift{Off: 0}, // header length
	bpf.LoadIndirect{Off: 2, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: dhcpv4.ClientPort, SkipTrue: 1},
	bpf.RetConstant{Val: 0},
	bpf.RetConstant{Val: maxPacket},
})

func assemble(p []bpf.Instruction) []bpf.RawInstruction {
	raw, err := bpf.Assemble(p)
	if err != nil {
		panic(fmt.Sprintf("dhcp: filter: %v", err)) // it is a constant
	}
	return raw
}
