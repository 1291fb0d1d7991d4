// Package lan is the private Ethernet of the machines of one cluster: a switch in one process, without any part of the host's network.
//
// Each machine's QEMU listens on a Unix socket in its folder ("-netdev stream,server=on"); the switch dials them all, and dials again those that
// come back, so that machines and switch may start and end in any order. It learns addresses as a switch does, answers DHCP for machines that have no
// configuration yet, and does to frames what tests tell it: see Rule. It knows nothing of what is inside the frames besides that.
package lan

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// maxFrame is the longest frame that QEMU sends, in bytes (its NET_BUFSIZE).
	maxFrame = 4096 + 65536
	// maxQueue bounds what waits for one port, in bytes; further frames are lost.
	maxQueue = 1 << 20
	// maxAddresses bounds what the switch learns. Frames to an address that it does not know go to all ports.
	maxAddresses = 4096

	usualRetry = 200 * time.Millisecond
)

// A Port is where a machine is plugged in.
type Port struct {
	Name string
	// Socket is the path of the Unix socket that the machine's QEMU listens on.
	Socket string
	// Address is what the machine gets when it asks by DHCP, with the length of the network's prefix. The zero value answers nothing.
	Address netip.Prefix
}

// Config is fixed for the life of a switch.
type Config struct {
	// Dir is a folder of the switch's own, which must exist: its control socket is in it.
	Dir string
	// Ports returns the ports there are now. It is called from one goroutine, several times a second. Required.
	Ports func() []Port
	Log   *slog.Logger // required
	// Retry is how often machines that are not connected are looked for; 0 means 200 ms. While all are connected it is five times that.
	Retry time.Duration
	// Idle is how long no machine must have been connected for Run to end by itself; 0: it does not.
	Idle time.Duration
}

// A Switch carries frames between its ports. It is safe for concurrent use.
type Switch struct {
	cfg    Config
	listen *net.UnixListener
	stop   chan struct{} // closed when a client orders the end
	once   sync.Once     // of stop

	mu    sync.Mutex
	ports map[string]*port // guarded by mu; those that are connected
	table map[mac]*port    // guarded by mu
	rules []Rule           // guarded by mu; replaced, never changed
}

// New returns a switch whose control socket listens already. Run must be called.
func New(cfg Config) (*Switch, error) {
	if cfg.Ports == nil || cfg.Log == nil {
		return nil, errors.New("lan: Config.Ports and Config.Log are required")
	}
	if cfg.Retry == 0 {
		cfg.Retry = usualRetry
	}
	l, err := listenUnix(cfg.Dir, controlSocket)
	if err != nil {
		return nil, fmt.Errorf("lan: %w", err)
	}
	return &Switch{cfg: cfg, listen: l, stop: make(chan struct{}), ports: map[string]*port{}, table: map[mac]*port{}}, nil
}

// Run carries frames until ctx is done, a client orders it (Control.Stop), or nobody has been connected for Config.Idle: these are no errors.
func (s *Switch) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer cancel() // whatever ends the search for machines ends the rest
		return s.connect(ctx, g)
	})
	g.Go(func() error { return s.serve(ctx, g) })
	err := g.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// connect dials every port that is not connected, again and again.
func (s *Switch) connect(ctx context.Context, g *errgroup.Group) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for last := time.Now(); ; {
		connected, missing := s.dialAll(ctx, g)
		if connected > 0 {
			last = time.Now()
		}
		wait := s.cfg.Retry
		if missing == 0 {
			wait *= 5
		}
		timer.Reset(wait)
		if s.cfg.Idle > 0 && time.Since(last) > s.cfg.Idle {
			s.cfg.Log.Info("no machine is connected: the switch ends")
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stop:
			return nil
		case <-timer.C:
		}
	}
}

// dialAll returns how many ports are connected now, and how many are not.
func (s *Switch) dialAll(ctx context.Context, g *errgroup.Group) (connected, missing int) {
	for _, p := range s.cfg.Ports() {
		s.mu.Lock()
		_, there := s.ports[p.Name]
		s.mu.Unlock()
		if there {
			continue
		}
		conn, err := dialUnix(ctx, p.Socket)
		if err != nil {
			missing++ // it is off, or not there yet
			continue
		}
		np := newPort(p, conn)
		s.mu.Lock()
		s.ports[p.Name] = np
		s.mu.Unlock()
		s.cfg.Log.Info("connected", "machine", p.Name)
		g.Go(func() error { s.carry(ctx, np); return nil })
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.ports), missing
}

// carry moves a port's frames until its connection ends.
func (s *Switch) carry(ctx context.Context, p *port) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { p.write(ctx); p.conn.Close() })
	wg.Go(func() { <-ctx.Done(); p.conn.Close() }) // ends read, which knows no context
	err := p.read(func(f []byte) { s.receive(p, f) })
	cancel()
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ports, p.Name)
	for m, at := range s.table {
		if at == p {
			delete(s.table, m)
		}
	}
	s.cfg.Log.Info("disconnected", "machine", p.Name, "err", err)
}

// receive does what a switch does with a frame; f begins with its length (see port) and is not changed any more.
func (s *Switch) receive(from *port, f []byte) {
	frame := f[prefix:]
	if len(frame) < 14 {
		return // no Ethernet header
	}
	if from.Address.IsValid() {
		if answer := dhcpAnswer(from.Address, frame); answer != nil {
			from.push(answer, time.Now())
			return
		}
	}
	to, source := mac(frame[:6]), mac(frame[6:12])
	s.mu.Lock()
	defer s.mu.Unlock()
	if !source.group() && (s.table[source] != nil || len(s.table) < maxAddresses) {
		s.table[source] = from
	}
	if at := s.table[to]; at != nil && !to.group() {
		if at != from {
			s.send(from, at, f)
		}
		return
	}
	for _, p := range s.ports {
		if p != from {
			s.send(from, p, f)
		}
	}
}

// send applies the rules. The caller holds mu.
func (s *Switch) send(from, to *port, f []byte) {
	loss, delay := effect(s.rules, from.Name, to.Name)
	if loss >= 1 || loss > 0 && rand.Float64() < loss {
		to.cut.Add(1)
		return
	}
	to.push(f, time.Now().Add(delay))
}

// mac is an Ethernet address.
type mac [6]byte

func (m mac) group() bool { return m[0]&1 != 0 }

// inFolder calls f with a name for path that is short: a socket's name may have 107 bytes only.
func inFolder(path string, f func(short string) error) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

func dialUnix(ctx context.Context, path string) (conn net.Conn, err error) {
	err = inFolder(path, func(short string) (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", short)
		return err
	})
	return conn, err
}

func listenUnix(dir, name string) (l *net.UnixListener, err error) {
	path := filepath.Join(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // of a switch that was killed; the lock says that none runs
		return nil, err
	}
	err = inFolder(path, func(short string) (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
		if err == nil {
			l.SetUnlinkOnClose(false) // the short name is void by then
		}
		return err
	})
	return l, err
}
