package networkd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// kernel is the part of Linux that networkd reads and changes. The DHCP clients count as a part of it: like it, they have
// state of their own that a plan starts from.
type kernel interface {
	// Read returns what there is. It may be called by several goroutines at once.
	Read(context.Context) (State, error)
	// ReadLinks returns the links, addresses and routes only, which never takes long. It may be called by several goroutines at once.
	ReadLinks() (State, error)
	// Do does one step; doing a done step succeeds.
	Do(context.Context, Step) error
	// Run calls wake after changes and runs what a step started, until ctx is done.
	Run(ctx context.Context, wake func()) error
}

// linux is the real one. Requests open their sockets when they are made, so a test may keep it in a namespace of its own by
// staying on one thread; Run takes other threads.
type linux struct {
	dir      string // networkd's runtime folder
	dhcp     *dhcp.Pool
	firewall *firewall
	events   *os.File // the netlink socket that wakes
}

// newLinux opens what is needed for good. dir must exist.
func newLinux(dir string, pool *dhcp.Pool) (*linux, error) {
	events, err := subscribe()
	if err != nil {
		return nil, err
	}
	return &linux{dir: dir, dhcp: pool, firewall: newFirewall(), events: events}, nil
}

// ReadLinks reads what the kernel says at once: no program is started for it.
func (k *linux) ReadLinks() (State, error) {
	var s State
	var err error
	if s.Links, err = readLinks(); err != nil {
		return State{}, fmt.Errorf("read links: %w", err)
	}
	byIndex := map[int]config.LinkName{}
	for _, l := range s.Links {
		byIndex[l.Index] = l.Name
	}
	if s.Addresses, err = readAddresses(byIndex); err != nil {
		return State{}, fmt.Errorf("read addresses: %w", err)
	}
	if s.Routes, err = readRoutes(byIndex); err != nil {
		return State{}, fmt.Errorf("read routes: %w", err)
	}
	s.DHCP = k.dhcp.Entries()
	return s, nil
}

func (k *linux) Read(ctx context.Context) (State, error) {
	s, err := k.ReadLinks()
	if err != nil {
		return State{}, err
	}
	for _, l := range s.Links {
		k.dhcp.Carrier(string(l.Name), l.Up && l.Carrier)
	}
	if s.Files, err = readFiles(k.dir); err != nil {
		return State{}, err
	}
	if s.Tables, s.Masquerade, err = k.firewall.read(ctx); err != nil {
		s.NoFirewall = err.Error()
	}
	s.DHCP = k.dhcp.Entries() // anew: what a carrier changed is in there
	return s, nil
}

func (k *linux) Do(ctx context.Context, s Step) error {
	switch s.Op {
	case opChainBuild, opChainDel, opJumpAdd, opJumpDel:
		return k.firewall.do(ctx, s)
	case opFileWrite:
		return writeFile(filepath.Join(k.dir, s.Name), s.Content)
	case opLinkWait, opFirewallWait:
		return errors.New(s.Content)
	case opDHCPStop:
		return k.dhcp.Stop(string(s.Link))
	}
	name := s.Link
	switch s.Op {
	case opAddrAdd, opAddrDel, opAddrHold, opAddrTell:
		name = s.Address.Link
	case opRouteAdd, opRouteDel:
		name = s.Route.Link
	}
	link, err := netlink.LinkByName(string(name))
	if err != nil {
		return err
	}
	switch s.Op {
	case opLinkUp:
		return netlink.LinkSetUp(link)
	case opLinkMTU:
		return netlink.LinkSetMTU(link, s.MTU)
	case opLinkPromote:
		return setPromote(link.Attrs().Index)
	case opDHCPStart:
		return k.dhcp.Start(string(s.Link), dhcp.Identity{Hardware: link.Attrs().HardwareAddr, Hostname: s.Content})
	case opAddrAdd:
		return addAddress(link.Attrs().Index, s.Address)
	case opAddrHold:
		return holdAddress(link.Attrs().Index, s.Address, s.Until)
	case opAddrTell:
		return announce(link.Attrs().Index, link.Attrs().HardwareAddr, s.Address.Prefix.Addr())
	case opAddrDel:
		return deleteAddress(link.Attrs().Index, s.Address)
	case opRouteAdd:
		return ignore(netlink.RouteAppend(toRoute(link.Attrs().Index, s.Route)), unix.EEXIST)
	case opRouteDel:
		return ignore(netlink.RouteDel(toRoute(link.Attrs().Index, s.Route)), unix.ESRCH)
	}
	panic(fmt.Sprintf("networkd: no way to do %q", s.Op))
}

func ignore(err error, done unix.Errno) error {
	if errors.Is(err, done) {
		return nil
	}
	return err
}

// marks are the protocol numbers that the kernel keeps with networkd's routes and addresses (rtm_protocol, IFA_PROTO); nobody in
// /etc/iproute2/rt_protos uses them. They are how networkd knows its own after a restart.
var marks = map[Origin]uint8{OriginStatic: 66, OriginDHCP: 67, OriginPod: 68, OriginVirtual: 69}

func toRoute(index int, r Route) *netlink.Route {
	n := &netlink.Route{
		LinkIndex: index, Priority: r.Metric, Protocol: netlink.RouteProtocol(marks[r.Origin]),
		Dst: &net.IPNet{IP: r.To.Addr().AsSlice(), Mask: net.CIDRMask(r.To.Bits(), r.To.Addr().BitLen())},
	}
	if r.Via.IsValid() {
		n.Gw = r.Via.AsSlice()
	} else if r.To.Addr().Is4() {
		n.Scope = netlink.SCOPE_LINK
	}
	return n
}

func readRoutes(byIndex map[int]config.LinkName) ([]Route, error) {
	list, err := again(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	var out []Route
	for _, n := range list {
		if n.Type != unix.RTN_UNICAST {
			continue
		}
		r := Route{Metric: n.Priority, Origin: OriginOther, Link: byIndex[n.LinkIndex], Via: addr(n.Gw)}
		switch uint8(n.Protocol) {
		case marks[OriginStatic]:
			r.Origin = OriginStatic
		case marks[OriginDHCP]:
			r.Origin = OriginDHCP
		case marks[OriginPod]:
			r.Origin = OriginPod
		case unix.RTPROT_KERNEL, unix.RTPROT_RA:
			r.Origin = OriginKernel
		}
		if r.To = prefix(n.Dst); !r.To.IsValid() {
			r.To = unspecified(n.Family)
		}
		if len(n.MultiPath) == 0 {
			out = append(out, r)
		}
		for _, hop := range n.MultiPath { // IPv6 folds routes of the same metric into one
			r.Link, r.Via = byIndex[hop.LinkIndex], addr(hop.Gw)
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Route) int { return strings.Compare(a.String(), b.String()) })
	return out, nil
}

// again repeats a dump that changed while it was read.
func again[T any](read func() ([]T, error)) (out []T, err error) {
	for range 5 {
		if out, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, err
}

var fileNames = []string{fileHostname, fileHosts, fileResolver}

const maxFile = 64 << 10

func readFiles(dir string) (map[string]string, error) {
	out := map[string]string{}
	for _, n := range fileNames {
		data, err := os.ReadFile(filepath.Join(dir, n))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[n] = string(data[:min(len(data), maxFile)])
	}
	return out, nil
}

// writeFile replaces a file that everybody may read; a reader finds the old or the new one, whole.
func writeFile(path, content string) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(content), 0o644); err != nil {
		return err
	}
	if err := os.Chmod(tmp, 0o644); err != nil { // umask is 0077
		return err
	}
	return os.Rename(tmp, path)
}

// settle is how long Run waits after an event for more of the same: a pod's start alone makes a dozen.
const settle = 20 * time.Millisecond

// Run wakes after every change of links, addresses and routes, and runs the DHCP clients.
func (k *linux) Run(ctx context.Context, wake func()) error {
	stop := context.AfterFunc(ctx, func() { _ = k.events.SetReadDeadline(time.Unix(1, 0)) }) // ends the Read below
	defer stop()
	defer k.events.Close()
	clients := make(chan error, 1)
	go func() { clients <- k.dhcp.Run(ctx) }()
	defer func() { <-clients }()
	buf := make([]byte, 4096) // what does not fit is lost, and nobody misses it: events only wake
	for {
		n, err := k.events.Read(buf)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) { // ENOBUFS: there were more than fit
			return fmt.Errorf("receive network events: %w", err)
		}
		if err == nil && prolonged(buf[:n]) {
			continue
		}
		t := time.NewTimer(settle)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		wake()
	}
}

// subscribe opens a socket that becomes readable when a link, an address or a route changes.
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open network events: %w", err)
	}
	var groups uint32
	for _, g := range []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
		groups |= 1 << (g - 1)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return nil, errors.Join(fmt.Errorf("subscribe to network events: %w", err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "netlink events"), nil
}
