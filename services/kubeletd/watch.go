package kubeletd

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// Pauses of the probes: often until all is well, seldom then.
const (
	probeOften  = time.Second
	probeSeldom = 10 * time.Second
	probeTime   = 10 * time.Second // for one answer; a busy machine needs several
	lookPause   = 2 * time.Second
	retryPause  = time.Second
)

// A probe asks one thing how it is: "" is well.
type probe struct {
	name   string // unit, "etcd", or apiProbe
	worker bool   // a worker has it too
	ask    func(context.Context) string
}

// apiProbe asks any API server of the cluster.
const apiProbe = "API server"

func (k *system) probes() []probe {
	// The controllers' certificates are made by themselves at each start and known to nobody; nothing is sent but the question.
	anyone := &http.Client{Timeout: probeTime, Transport: &http.Transport{MaxIdleConnsPerHost: 1,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}}}
	get := func(u string) func(context.Context) string {
		return func(ctx context.Context) string {
			c := &cluster{server: u, http: anyone}
			return short(c.do(ctx, request{method: http.MethodGet, path: "/healthz"}, new(string)))
		}
	}
	return []probe{
		{"etcd", false, func(ctx context.Context) string {
			conn, err := (&net.Dialer{Timeout: probeTime}).DialContext(ctx, "tcp", k.cfg.EtcdAddress)
			if err == nil {
				conn.Close()
			}
			return short(err)
		}},
		{"containerd", true, func(context.Context) string { return askListener(k.cfg.Containerd) }},
		{"kube-apiserver", false, func(ctx context.Context) string { return k.askReady(ctx, k.cfg.APIServer) }},
		{apiProbe, true, k.askAPI},
		{"kube-controller-manager", false, get("https://127.0.0.1:10257")},
		{"kube-scheduler", false, get("https://127.0.0.1:10259")},
		{"kubelet", true, get("http://127.0.0.1:10248")},
		{"kube-proxy", true, get("http://127.0.0.1:10256")},
	}
}

// unixSockets is the kernel's table of the Unix sockets in this network namespace, which is containerd's too.
const unixSockets = "/proc/net/unix"

// askListener asks the kernel whether somebody listens at a path. Who connects to containerd's socket is root in all but name, so kubeletd may not.
func askListener(path string) string {
	table, err := os.ReadFile(unixSockets)
	if err == nil && !listens(string(table), path) {
		return "nobody listens at " + path + " yet"
	}
	return short(err)
}

// listens looks for a path in the kernel's table of Unix sockets: "Num: RefCount Protocol Flags Type St Inode Path", of which the flags, hexadecimal, say
// whether it accepts connections (__SO_ACCEPTCON of linux/net.h). It is pure.
func listens(table, path string) bool {
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) == 8 && f[7] == path {
			if flags, err := strconv.ParseUint(f[3], 16, 32); err == nil && flags&(1<<16) != 0 {
				return true
			}
		}
	}
	return false
}

// askReady asks one API server, or the balancer.
func (k *system) askReady(ctx context.Context, server string) string {
	c, err := k.client(server)
	if err == nil {
		err = c.do(ctx, request{method: http.MethodGet, path: "/readyz"}, new(string))
	}
	return short(err)
}

// askAPI asks any API server of the cluster, and for its version once.
func (k *system) askAPI(ctx context.Context) string {
	c, err := k.cluster()
	if err != nil {
		return short(err)
	}
	if err := c.do(ctx, request{method: http.MethodGet, path: "/readyz"}, new(string)); err != nil {
		return short(err)
	}
	k.mu.Lock()
	known := k.version != ""
	k.mu.Unlock()
	if !known {
		var v struct{ GitVersion string }
		if err := c.do(ctx, request{method: http.MethodGet, path: "/version"}, &v); err != nil {
			return short(err)
		}
		k.mu.Lock()
		k.version = v.GitVersion
		k.mu.Unlock()
	}
	return ""
}

// short is an error's text without what differs from one try to the next.
func short(err error) string {
	if err == nil {
		return ""
	}
	text := errs.Text(err)
	if len(text) > 200 {
		text = text[:200] + "…"
	}
	return text
}

// Watch keeps certificates fresh, asks how the units are, and wakes the loop when anything may have changed.
func (k *system) Watch(ctx context.Context, wake func()) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return k.trust.Run(ctx) })
	g.Go(func() error { return follow(ctx, wake, func() <-chan struct{} { _, c := k.trust.Roots(); return c }) })
	g.Go(func() error { return k.runLeaves(ctx, wake) })
	g.Go(func() error { return k.followInit(ctx, wake) })
	g.Go(func() error { return k.followPlace(ctx, wake) })
	if k.absent() { // nobody will ever answer
		return g.Wait()
	}
	for _, p := range k.probes() {
		g.Go(func() error { return k.follow(ctx, p, wake) })
	}
	g.Go(func() error { return k.feed(ctx) })
	g.Go(func() error { return k.balancer.Run(ctx) })
	g.Go(func() error { return k.repeat(ctx, wake) })
	g.Go(func() error {
		return k.followCluster(ctx, wake, func(c *cluster, w spec) error {
			if w.Role == config.Worker {
				<-ctx.Done() // not a worker's business
				return ctx.Err()
			}
			return c.watch(ctx, csrPath, nil, wake)
		})
	})
	g.Go(func() error {
		return k.followCluster(ctx, wake, func(c *cluster, w spec) error {
			return c.watch(ctx, nodesPath, url.Values{"fieldSelector": {"metadata.name=" + w.Node}}, wake)
		})
	})
	g.Go(func() error {
		return k.followCluster(ctx, wake, func(c *cluster, _ spec) error {
			return c.followNodes(ctx, func(all map[string]Peer) { k.setPeers(all); wake() })
		})
	})
	return g.Wait()
}

func (k *system) setPeers(all map[string]Peer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.peers = all
}

// follow wakes at each change; next returns a channel that is closed at the next one.
func follow(ctx context.Context, wake func(), next func() <-chan struct{}) error {
	for {
		changed := next()
		wake()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// runLeaves keeps the certificates, from when there can be any.
func (k *system) runLeaves(ctx context.Context, wake func()) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-k.begin:
	}
	role := k.want().Role
	g, ctx := errgroup.WithContext(ctx)
	for profile, l := range k.leaves {
		if role == config.Worker && !ofWorker(profile) || role != config.Worker && profile == workerProfile {
			continue
		}
		g.Go(func() error { return l.Run(ctx) })
		g.Go(func() error { return follow(ctx, wake, func() <-chan struct{} { _, c := l.Pair(); return c }) })
	}
	return g.Wait()
}

func ofWorker(profile string) bool {
	return profile == workerProfile || slices.ContainsFunc(entries, func(e entry) bool { return e.profile == profile && e.worker })
}

func (k *system) followInit(ctx context.Context, wake func()) error {
	ours := unitNames()
	for {
		err := k.cfg.Init.Watch(ctx, func(s initctl.Status) {
			if s.Name == "networkd" && s.State == "up" {
				k.mu.Lock()
				k.pods = podNetwork{} // another process: it has to be told
				k.mu.Unlock()
				wake()
			}
			if slices.Contains(ours, s.Name) {
				wake()
			}
		})
		if !pause(ctx, retryPause) {
			return ctx.Err()
		}
		k.cfg.Env.Log.Warn("watching units ended", "err", short(err))
	}
}

// follow asks again and again.
func (k *system) follow(ctx context.Context, p probe, wake func()) error {
	for {
		if !p.worker && k.want().Role == config.Worker {
			if !pause(ctx, lookPause) { // there is none here, unless the node is configured anew
				return ctx.Err()
			}
			continue
		}
		call, cancel := context.WithTimeout(ctx, probeTime)
		start := time.Now()
		_, ordered := k.orders.Get()
		answer := p.ask(call)
		cancel()
		k.mu.Lock()
		if start.Before(k.begun[p.name]) { // its predecessor's
			k.mu.Unlock()
			continue
		}
		before, asked := k.health[p.name], true
		if p.name == "etcd" {
			asked = k.etcd != (answer == "")
			k.etcd = answer == ""
		} else {
			_, known := k.health[p.name]
			k.health[p.name], asked = answer, !known || before != answer
		}
		k.mu.Unlock()
		if asked { // there is news
			wake()
		}
		next := probeOften
		if answer == "" {
			next = probeSeldom
		}
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-ordered: // what was well may not be now
			t.Stop()
		case <-t.C:
		}
	}
}

// followCluster watches one list as long as an API server is ready.
func (k *system) followCluster(ctx context.Context, wake func(), watch func(*cluster, spec) error) error {
	for {
		k.mu.Lock()
		ready := k.last.API && (k.last.Addons["rbac"] != "" || k.want().Role == config.Worker)
		h, asked := k.health[apiProbe]
		k.mu.Unlock()
		if !ready && asked && h == "" {
			wake() // it is well, and yet the last round could not read: nothing else would tell when that is over
		}
		if ready {
			if c, err := k.cluster(); err == nil {
				if err := watch(c, k.want()); err == nil {
					continue
				}
			}
		}
		if !pause(ctx, lookPause) {
			return ctx.Err()
		}
	}
}

// place is what of the network the node's configuration depends on.
type place struct {
	address     netip.Addr
	nameservers []netip.Addr
	hostname    string
}

func (k *system) where() (place, error) {
	links, err := k.cfg.Links()
	if err != nil {
		return place{}, err
	}
	routes, err := os.ReadFile(k.cfg.Routes)
	if err != nil {
		return place{}, err
	}
	resolv, err := os.ReadFile(k.cfg.Resolv)
	if err != nil && !os.IsNotExist(err) {
		return place{}, err
	}
	hostname, err := k.cfg.Hostname()
	if err != nil {
		return place{}, err
	}
	want, known := k.want(), nodeaddr.InURL(k.want().Endpoint)
	roots, _ := k.trust.Roots()
	k.mu.Lock()
	last := k.last.Address
	k.mu.Unlock()
	return place{nodeAddress(string(routes), links, members(roots.State)[want.Node].Addresses, last, known), nameservers(string(resolv)), hostname}, nil
}

// followPlace looks for what tells nobody when it changes: mounts, addresses, name servers, the host name.
func (k *system) followPlace(ctx context.Context, wake func()) error {
	var last place
	var mounted bool
	for {
		now, err := k.where()
		_, e := os.Stat(k.cfg.VolumeMark)
		if err == nil && k.uncertified(now.address) {
			k.leaves[serverProfile].Renew() // others would not believe the API server at that address
		}
		k.mu.Lock()
		due := len(k.strange) > 0 || k.restless
		k.mu.Unlock()
		if due {
			wake() // a Node without a member, for one, is waited for before it is deleted
		}
		if err == nil && (now.address != last.address || now.hostname != last.hostname || !slices.Equal(now.nameservers, last.nameservers) || mounted != (e == nil)) {
			last, mounted = now, e == nil
			wake()
		}
		if !pause(ctx, lookPause) {
			return ctx.Err()
		}
	}
}

// uncertified reports whether the API server has a certificate that lacks an address.
func (k *system) uncertified(a netip.Addr) bool {
	p, _ := k.leaves[serverProfile].Pair()
	return p != nil && a.IsValid() && !slices.ContainsFunc(p.TLS.Leaf.IPAddresses, func(ip net.IP) bool {
		have, _ := netip.AddrFromSlice(ip)
		return have.Unmap() == a
	})
}

// pause waits, and reports whether ctx still lasts.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// trimSlash is for URLs that people write.
func trimSlash(s string) string { return strings.TrimRight(s, "/") }
