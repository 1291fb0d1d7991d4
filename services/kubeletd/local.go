package kubeletd

import (
	"context"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"time"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

const (
	// newest is how many of a control plane's addresses are tried for its API server.
	newest = 3
	// repeatPods is how often networkd hears the same again: it forgets it with its process.
	repeatPods = time.Minute
	podsTime   = 10 * time.Second
)

// targets says where the API servers are: own is that of this node, if it has one; those of others have the same port. It is pure.
func targets(want spec, own netip.AddrPort, all map[string]Member) balance.Targets {
	var t balance.Targets
	if want.Role == config.ControlPlane {
		t.Preferred = own
	}
	for _, name := range controlPlanes(all) {
		if name == want.Node && t.Preferred.IsValid() {
			continue
		}
		addresses := all[name].Addresses
		for _, a := range addresses[:min(len(addresses), newest)] {
			t.Backends = append(t.Backends, netip.AddrPortFrom(a, own.Port()))
		}
	}
	return t
}

// feed tells the balancer where the API servers are, again at each change of the cluster, of the authority and of kubeletd's certificate.
func (k *system) feed(ctx context.Context) error {
	own := addrPort(k.cfg.APIServer)
	for {
		roots, c1 := k.trust.Roots()
		want := k.want()
		pair, c2 := k.leaves[ownProfile(want.Role)].Pair()
		if want.Role != "" {
			t := targets(want, own, members(roots.State))
			t.Roots = roots.State.GetKubernetesCa()
			if pair != nil {
				t.Client = pair.TLS
			}
			if err := k.balancer.Set(t); err != nil {
				k.cfg.Env.Log.Warn("API servers not taken over", "err", errs.Text(err))
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c1:
		case <-c2:
		case <-k.poke: // the specification may be another one
		}
	}
}

// addrPort reads the address of a URL like "https://127.0.0.1:6443"; zero if there is none.
func addrPort(text string) netip.AddrPort {
	u, err := url.Parse(text)
	if err != nil {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddr(u.Hostname())
	port, e := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil || e != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, uint16(port))
}

// setPods tells networkd the ways to other nodes' pods.
func (k *system) setPods(ctx context.Context, n podNetwork) error {
	ctx, cancel := context.WithTimeout(ctx, podsTime)
	defer cancel()
	r := &networkv1.SetPodNetworkRequest{}
	if n.Local.IsValid() {
		r.PodSubnets, r.LocalPrefixes = []string{n.Subnet.String()}, []string{n.Local.String()}
	}
	for _, w := range n.Routes {
		r.Routes = append(r.Routes, &networkv1.PodRoute{Prefix: w.Prefix.String(), Via: w.Via.String()})
	}
	resp, err := k.cfg.Pods.SetPodNetwork(ctx, r)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		k.pods = podNetwork{}
		return err
	}
	if !slices.Equal(k.unreachable, resp.GetUnreachable()) && len(resp.GetUnreachable()) > 0 {
		k.cfg.Env.Log.Warn("other nodes' pods cannot be reached", "err", resp.GetUnreachable()[0], "count", len(resp.GetUnreachable()))
	}
	k.pods, k.unreachable = n, resp.GetUnreachable()
	return nil
}

// repeat tells networkd the same every minute.
func (k *system) repeat(ctx context.Context, wake func()) error {
	for pause(ctx, repeatPods) {
		k.mu.Lock()
		last := k.pods
		k.mu.Unlock()
		if last.Local.IsValid() && k.setPods(ctx, last) != nil {
			wake() // the loop tells it, and says why it cannot
		}
	}
	return ctx.Err()
}

// ownProfile is kubeletd's identity towards the API server: a control plane's approves certificates and keeps add-ons, a worker's only looks.
func ownProfile(r config.Role) string {
	if r == config.Worker {
		return workerProfile
	}
	return keeperProfile
}
