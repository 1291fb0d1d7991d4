package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	maxControlPlanes = 7
	maxWorkers       = 100
)

// A place is what one machine is to be in a local cluster. Its names and addresses follow from its number, so that a cluster can grow.
type place struct {
	name    string
	role    string
	address netip.Prefix
}

// places are the machines of a local cluster, the first control plane first. It is pure.
func places(cluster string, controlPlanes, workers int) ([]place, error) {
	switch {
	case controlPlanes < 1 || controlPlanes > maxControlPlanes:
		return nil, fmt.Errorf("--controlplanes: %d is not in 1 to %d", controlPlanes, maxControlPlanes)
	case workers < 0 || workers > maxWorkers:
		return nil, fmt.Errorf("--workers: %d is not in 0 to %d", workers, maxWorkers)
	}
	at := func(n int) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, 0, byte(n)}), 24) }
	var all []place
	for i := range controlPlanes {
		all = append(all, place{fmt.Sprintf("%s-%d", cluster, i+1), "controlplane", at(11 + i)})
	}
	for i := range workers {
		all = append(all, place{fmt.Sprintf("%s-w%d", cluster, i+1), "worker", at(101 + i)})
	}
	return all, nil
}

// clusterDocuments is what each machine of a local cluster gets. The first interface leads to this host, for the forwards; the second to the other machines. Without
// udev the kernel counts them in the order of their slots.
const clusterDocuments = `apiVersion: bulkhead.dev/v1
kind: Machine
hostname: %s
role: %s
---
apiVersion: bulkhead.dev/v1
kind: Network
interfaces:
  - {name: eth0, dhcp: true}
  - {name: eth1, addresses: [%s]}
---
apiVersion: bulkhead.dev/v1
kind: Cluster
name: %s
endpoint: https://%s:6443
names: [localhost, 127.0.0.1]
`

// documents are those of one place: first is where the first control plane is, more what the user gave.
func (p place) documents(cluster string, first place, more string) string {
	text := fmt.Sprintf(clusterDocuments, p.name, p.role, p.address, cluster, first.address.Addr())
	if more != "" {
		text += "---\n" + more
	}
	return text
}

// A localCluster is what "up" builds, and how far it is.
type localCluster struct {
	f        upFlags
	places   []place
	machines []*qemu.Machine // of places, in the same order
	more     string          // the user's documents
	fresh    bool            // no machine was there before
	seed     int             // the control plane through which the others join
	members  []int           // those that are in the cluster, the seed first
	token    map[string]string
}

// cluster is what the flags and the machines that are there say. It is nil for a single machine.
func (a *app) cluster(f upFlags) (*localCluster, error) {
	members, err := qemu.Members(f.name)
	if err != nil {
		return nil, err
	}
	controlPlanes, workers := highest(f.name, members) // those that are there stay
	controlPlanes, workers = max(f.controlPlanes, controlPlanes), max(f.workers, workers)
	if controlPlanes == 1 && workers == 0 && len(members) == 0 {
		return nil, nil
	}
	all, err := places(f.name, controlPlanes, workers)
	if err != nil {
		return nil, err
	}
	if _, err := qemu.Load(f.name); err == nil {
		return nil, fmt.Errorf("there is a single machine %s: give the cluster another --name, or remove the machine (bhctl down --name %s)", f.name, f.name)
	}
	switch {
	case f.install:
		return nil, errors.New("--install: is for a single machine")
	case f.noBootstrap:
		return nil, errors.New("--no-bootstrap: is for a single machine; nodes join a cluster that there is")
	case f.portsChosen || slices.ContainsFunc(f.forwards, func(s string) bool { return !strings.HasPrefix(s, "0:") }):
		return nil, errors.New("ports and forwards are for a single machine; those of a cluster's are chosen among the free ones (bhctl status). --forward 0:30080 has each of its machines forward a port of its own to 30080")
	}
	if f.slowSince = time.Now(); len(members) > 0 { // who joins them has their time
		if f.slow != 0 && f.slow != members[0].Slow {
			return nil, otherClocks(f, members[0])
		}
		f.slow, f.slowSince = members[0].Slow, members[0].SlowSince
	}
	c := &localCluster{f: f, places: all, fresh: len(members) == 0, token: map[string]string{}}
	if len(f.files) > 0 {
		var name string
		if name, c.more, err = a.readDocuments(f.files); err != nil {
			return nil, err
		}
		if _, err := config.Parse(name, []byte(all[0].documents(f.name, all[0], c.more))); err != nil {
			return nil, fmt.Errorf("the documents with those that a cluster's machines get from here (Machine, Network, Cluster): %w", err)
		}
	}
	return c, nil
}

// highest returns the greatest numbers that machines of a cluster have; one in between that is missing is to be made again.
func highest(cluster string, members []qemu.Machine) (controlPlanes, workers int) {
	for _, m := range members {
		number := strings.TrimPrefix(m.Name, cluster+"-")
		if n, err := strconv.Atoi(strings.TrimPrefix(number, "w")); err == nil && strings.HasPrefix(number, "w") {
			workers = max(workers, n)
		} else if err == nil {
			controlPlanes = max(controlPlanes, n)
		}
	}
	return controlPlanes, workers
}

// upCluster does the steps that are not done yet, as up does.
func (a *app) upCluster(ctx context.Context, c *localCluster) error {
	p := a.progress()
	p.slow = c.f.slow
	n := len(c.places)
	if err := p.step(ctx, fmt.Sprintf("start %d machines and the network between them", n), time.Duration(15*n)*time.Second, func(ctx context.Context) error { return a.startCluster(ctx, c, p.say) }); err != nil {
		return err
	}
	if err := p.step(ctx, "claim the first node", 30*time.Second, func(ctx context.Context) error { return a.claimSeed(ctx, c, p.say) }); err != nil {
		return a.withConsole(err, c.machines[c.seed])
	}
	seed := c.machines[c.seed]
	steps := []clusterStep{
		{"configure " + seed.Name, time.Minute, seed, func(ctx context.Context) error { return a.configure(ctx, c, c.seed) }},
		{"bootstrap the cluster", 20 * time.Second, seed, func(ctx context.Context) error { return a.at(c, c.seed).bootstrapLocal(ctx) }},
	}
	for i, m := range c.machines {
		if i == c.seed {
			continue
		}
		usual := time.Minute
		if c.places[i].role == "controlplane" { // which waits until those before it are well
			usual = 5 * time.Minute
		}
		steps = append(steps,
			clusterStep{"join " + m.Name, usual, m, func(ctx context.Context) error { return a.joinLocal(ctx, c, i, p.say) }},
			clusterStep{"configure " + m.Name, time.Minute, m, func(ctx context.Context) error { return a.configure(ctx, c, i) }})
	}
	for _, s := range steps {
		if err := p.step(ctx, s.name, s.usual, s.do); err != nil {
			return a.withConsole(err, s.machine)
		}
	}
	if err := c.saveEndpoints(); err != nil {
		return err
	}
	a.contextName, a.endpoint = c.f.name, ""
	if err := p.step(ctx, "wait for all nodes", 5*time.Minute, func(ctx context.Context) error { return a.waitNodes(ctx, c, p.say) }); err != nil {
		return err
	}
	a.printCluster(c)
	return nil
}

type clusterStep struct {
	name    string
	usual   time.Duration
	machine *qemu.Machine
	do      func(context.Context) error
}

// endpoint is where a machine's API is reached from here.
func (c *localCluster) endpoint(i int) string {
	return fmt.Sprintf("127.0.0.1:%d", c.machines[i].Port(50000))
}

// at is this app for one machine of a cluster, asked directly.
func (a *app) at(c *localCluster, i int) *app {
	one := *a
	one.contextName, one.endpoint, one.label = c.f.name, c.endpoint(i), c.places[i].name
	return &one
}

func (a *app) startCluster(ctx context.Context, c *localCluster, say func(string)) error {
	if err := c.enoughMemory(); err != nil {
		return err
	}
	for _, at := range c.places {
		f := c.f
		f.name, f.lan, f.lanAddress, f.files = at.name, c.f.name, at.address, nil
		f.apiPort, f.gatewayPort, f.kubernetesPort = 0, 0, 0
		say("· " + at.name)
		m, err := openMachine(f)
		if err != nil {
			return err
		}
		if err := m.Start(ctx, nil); err != nil {
			return err
		}
		c.machines = append(c.machines, m)
	}
	return startSwitch(ctx, c.f.name, c.machines)
}

// claimSeed takes the first machine over, or finds the control plane of the cluster that there is: a new machine in the place of a lost one must not become a cluster of its own.
func (a *app) claimSeed(ctx context.Context, c *localCluster, say func(string)) error {
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	if c.fresh || cfg.Contexts[c.f.name] == nil {
		if err := a.claimLocal(ctx, c.machines[0], c.f.name, c.endpoint(0)); err != nil {
			return err
		}
		c.members = []int{0}
		return nil
	}
	for deadline := time.Now().Add(c.machines[0].HostTime(3 * time.Minute)); ; {
		for i, p := range c.places {
			known := *cfg.Contexts[c.f.name]
			known.Endpoint, known.Endpoints = c.endpoint(i), nil
			if _, ours := answers(ctx, c.endpoint(i), known.CA); p.role == "controlplane" && ours && askVersion(ctx, &known) == nil {
				c.seed, c.members = i, []int{i}
				return nil
			}
		}
		say("· no control plane answers to this user yet")
		if time.Now().After(deadline) {
			return fmt.Errorf("none of the control planes answers to the credentials in context %q: bhctl down --name %s removes them all", c.f.name, c.f.name)
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
}

// enoughMemory looks at all machines together: each by itself would find enough, and the host would run out of it later.
func (c *localCluster) enoughMemory() error {
	need := 0
	for _, at := range c.places {
		if m, err := qemu.Load(at.name); err != nil {
			need += c.f.memoryMiB
		} else if m.Status().State != qemu.Running {
			need += m.Memory
		}
	}
	if free, ok := qemu.FreeMemory(); ok && free < need {
		return fmt.Errorf("memory: %d MiB are free and the machines take %d: end something, give each less with --memory, or start fewer", free, need)
	}
	return nil
}

// configure gives a machine its documents, unless it has some.
func (a *app) configure(ctx context.Context, c *localCluster, i int) error {
	text := c.places[i].documents(c.f.name, c.places[0], c.more)
	return a.at(c, i).applyText(ctx, "the document of "+c.places[i].name, text, false)
}

// joinLocal makes a machine a member of the cluster with the code that it was started with, unless it is one.
func (a *app) joinLocal(ctx context.Context, c *localCluster, i int, say func(string)) error {
	m, at := c.machines[i], c.places[i]
	code, err := claimKey(m)
	if err != nil {
		return err
	}
	known, err := a.at(c, i).target()
	if err != nil {
		return err
	}
	well := false // all that are in the cluster
	for deadline := time.Now().Add(m.HostTime(5 * time.Minute)); ; {
		if m.Status().State != qemu.Running {
			return errors.New("the machine ended while it booted")
		}
		there, ours := answers(ctx, c.endpoint(i), known.CA)
		err := errors.New("its API does not answer yet")
		switch {
		case ours:
			err = askVersion(ctx, known)
		case there && at.role == "controlplane" && !well:
			if err := a.waitMembers(ctx, c, say); err != nil {
				return err
			}
			well, deadline = true, time.Now().Add(m.HostTime(5*time.Minute))
			continue
		case there:
			err = a.tryJoin(ctx, c, i, code)
		}
		if status.Code(err) == codes.AlreadyExists {
			return fmt.Errorf("%w\n  The machine %s is a new one, and the cluster has a node of that name: bhctl node remove %s, then this again", err, m.Name, m.Name)
		}
		if there && !ours && !passing(err) {
			return err
		}
		if err == nil { // it knew this user already, or has just joined
			c.members = append(c.members, i)
			return nil
		}
		say("· " + oneLine(errs.Text(err)))
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has not joined the cluster: %w", at.name, err)
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
}

// waitMembers waits until all that are in the cluster are well, before another control plane comes: API servers that make a new cluster's first objects together need
// many times as long, and each ends and begins anew when that is more than a minute. The nodes are asked themselves: what they told the cluster last may be from before.
func (a *app) waitMembers(ctx context.Context, c *localCluster, say func(string)) error {
	for _, j := range c.members {
		name := c.places[j].name
		if err := a.at(c, j).waitReady(ctx, c.machines[j], func(why string) { say("· " + name + " " + why) }); err != nil {
			return fmt.Errorf("%s, which is in the cluster already: %w", name, err)
		}
	}
	return nil
}

func (a *app) tryJoin(ctx context.Context, c *localCluster, i int, code string) error {
	at := c.places[i]
	if c.token[at.name] == "" { // etcd needs a while until there are tokens
		t, err := a.at(c, c.seed).makeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: at.role, Name: at.name})
		if err != nil {
			return err
		}
		c.token[at.name] = t.Token
	}
	var endpoints []string
	for _, j := range c.members {
		if p := c.places[j]; p.role == "controlplane" {
			endpoints = append(endpoints, net.JoinHostPort(p.address.Addr().String(), client.Port))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	_, _, err := client.Join(ctx, c.endpoint(i), client.Joining{Code: code, Token: c.token[at.name], Endpoints: endpoints, Name: at.name})
	return err
}

// passing says whether an error may go away by itself. A node that somebody else owns, or that is locked, says so and does not change by waiting.
func passing(err error) bool {
	locked := errs.Is(err, errs.Precondition) && strings.Contains(err.Error(), "bhctl unlock")
	return err == nil || !locked && (errs.Is(err, errs.Unavailable) || errs.Is(err, errs.Precondition) || status.Code(err) == codes.DeadlineExceeded)
}

// answers tells whether a node's API is there, and whether it belongs to the cluster with that authority. QEMU accepts for a guest that is not there, and such a connection
// never becomes a good one: so it is asked for a handshake, briefly.
func answers(ctx context.Context, endpoint, authority string) (there, ours bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: client.ServerName, InsecureSkipVerify: true}} // nothing is sent or believed
	conn, err := d.DialContext(ctx, "tcp", endpoint)
	if err != nil {
		return false, false
	}
	defer conn.Close()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authority))
	_, err = conn.(*tls.Conn).ConnectionState().PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, DNSName: client.ServerName})
	return true, err == nil
}

// saveEndpoints writes all control planes into the context.
func (c *localCluster) saveEndpoints() error {
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	known := cfg.Contexts[c.f.name]
	if known == nil {
		return fmt.Errorf("the context %q is gone: somebody removed it meanwhile", c.f.name)
	}
	var more []string
	for i, p := range c.places[1:] {
		if p.role == "controlplane" {
			more = append(more, c.endpoint(i+1))
		}
	}
	next := *known
	next.Endpoint, next.Endpoints = c.endpoint(0), more
	next.Gateway, next.Kubernetes = localURLs(c.machines[0])
	if reflect.DeepEqual(next, *known) {
		return nil
	}
	cfg.Contexts[c.f.name] = &next
	return cfg.save()
}

// waitNodes waits until every node has said that it is ready.
func (a *app) waitNodes(ctx context.Context, c *localCluster, say func(string)) error {
	deadline := time.Now().Add(c.machines[0].HostTime(15*time.Minute + time.Duration(len(c.places))*5*time.Minute))
	for {
		var nodes []*clusterv1.Node
		err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			r, err := clusterv1.NewRegistryClient(conn).ListNodes(ctx, &clusterv1.ListNodesRequest{})
			nodes = r.GetNodes()
			return err
		})
		missing := missingNode(c.places, nodes)
		if err != nil {
			missing = oneLine(errs.Text(err))
		}
		if missing == "" {
			return nil
		}
		say("· " + missing)
		if time.Now().After(deadline) {
			return fmt.Errorf("the cluster is not well in time: %s; bhctl get nodes shows what becomes of it", missing)
		}
		if err := pause(ctx, 2*time.Second); err != nil {
			return err
		}
	}
}

// missingNode names the first place whose node is not ready, and why; "" if all are. It is pure.
func missingNode(want []place, nodes []*clusterv1.Node) string {
	for _, p := range want {
		i := slices.IndexFunc(nodes, func(n *clusterv1.Node) bool { return n.GetName() == p.name })
		switch {
		case i < 0:
			return p.name + " has not reported yet"
		case nodes[i].GetState() != "ready":
			return strings.TrimSpace(fmt.Sprintf("%s is %s: %s", p.name, nodes[i].GetState(), oneLine(nodes[i].GetDetail())))
		}
	}
	return ""
}

func (a *app) printCluster(c *localCluster) {
	fmt.Fprintf(a.out, `
The cluster %q is up: %d nodes. Next:

  bhctl get nodes                                 who is in it, and how they are
  bhctl --all health                              each node's checks; -n %s asks one
  bhctl etcd members                              who votes
  bhctl kubeconfig --file kubeconfig              a kubeconfig, good for a day; then:
  kubectl --kubeconfig kubeconfig get nodes       the same nodes, as Kubernetes sees them
  bhctl down --name %s                         remove all its machines
`, c.f.name, len(c.places), c.places[len(c.places)-1].name, c.f.name)
}
