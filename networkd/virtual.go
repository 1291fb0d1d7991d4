package networkd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// maxHold is the longest time for which virtual addresses may be held at once.
const maxHold = 10 * time.Second

// planHold returns the steps that put addresses on this node until a moment of CLOCK_BOOTTIME, and take others away, and a sentence for each that
// cannot be here. It is no part of plan, whose rounds may wait for programs: the time of an address is short. What plan does leaves
// virtual addresses alone.
func planHold(want Spec, have State, addresses []netip.Addr, until time.Duration) (steps []Step, unreachable []string, err error) {
	t := resolve(want, have)
	near := t.nearby(have)
	kept := map[Address]bool{}
	for _, a := range addresses {
		if !slices.Contains(want.VirtualIPs, a) {
			return nil, nil, errs.New(errs.Invalid, "addresses: %s is not among the document's Cluster.virtualIPs %s", a, want.VirtualIPs)
		}
		if at := slices.IndexFunc(have.Addresses, func(h Address) bool { return h.Prefix.Addr() == a && h.Origin != OriginVirtual }); at >= 0 {
			return nil, nil, errs.New(errs.Invalid, "addresses: %s is on %s anyway; a virtual address belongs to no node for good: choose another one for Cluster.virtualIPs", a, have.Addresses[at].Link)
		}
		link := near.subnet(a)
		if link == "" {
			unreachable = append(unreachable, fmt.Sprintf("%s is on no link's subnet: Cluster.virtualIPs must be in a network that all control planes are in", a))
			continue
		}
		at := Address{Link: link, Prefix: netip.PrefixFrom(a, a.BitLen()), Origin: OriginVirtual}
		kept[at] = true
		steps = append(steps, Step{Op: opAddrHold, Address: at, Until: until}, Step{Op: opAddrTell, Address: at})
	}
	for _, h := range have.Addresses {
		if h.Origin == OriginVirtual && !kept[h] {
			steps = append(steps, Step{Op: opAddrDel, Address: h})
		}
	}
	return steps, unreachable, nil
}

// subnet returns the link in whose subnet an address is; "" if it is in none.
func (n neighbourhood) subnet(a netip.Addr) config.LinkName {
	for _, s := range n.subnets {
		if s.To.Contains(a) {
			return s.Link
		}
	}
	return ""
}

// virtual is network.v1.Virtual.
type virtual struct {
	networkv1.UnimplementedVirtualServer
	d *Daemon
}

func (s *virtual) Hold(ctx context.Context, r *networkv1.HoldRequest) (*networkv1.HoldResponse, error) {
	want, generation := s.d.loop.Spec()
	if generation == 0 {
		return nil, errs.New(errs.Precondition, "the node has no configuration yet; run: bhctl apply")
	}
	until := time.Duration(min(r.GetUntilMilliseconds(), math.MaxInt64/uint64(time.Millisecond))) * time.Millisecond
	if left := until - dhcp.Now(); left > maxHold {
		return nil, errs.New(errs.Invalid, "until_milliseconds: %s from now; at most %s", left, maxHold)
	}
	var addresses []netip.Addr
	for _, text := range r.GetAddresses() {
		a, err := netip.ParseAddr(text)
		if err != nil || slices.Contains(addresses, a) {
			return nil, errs.New(errs.Invalid, "addresses: %.64q is not an address like 10.0.0.100, or is there twice", text)
		}
		addresses = append(addresses, a)
	}
	s.d.holding.Lock()
	defer s.d.holding.Unlock()
	have, err := s.d.kernel.ReadLinks()
	if err != nil {
		return nil, err
	}
	steps, unreachable, err := planHold(want, have, addresses, until)
	if err != nil {
		return nil, err
	}
	for _, step := range steps {
		if e := s.d.kernel.Do(ctx, step); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", step, e))
		}
	}
	for _, a := range addresses {
		if !slices.ContainsFunc(have.Addresses, func(h Address) bool { return h.Prefix.Addr() == a }) {
			s.d.loop.Wake() // the status is to show it
		}
	}
	if err == nil && len(addresses) > 0 && len(unreachable) == len(addresses) {
		err = errs.New(errs.Precondition, "addresses: %s", strings.Join(unreachable, "; "))
	}
	return &networkv1.HoldResponse{Unreachable: unreachable}, err
}
