package etcdd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/etcdd/rolling"
)

// The registry of nodes: each has one key, with a lease that every report keeps alive.
const (
	nodesPrefix = "/bulkhead/nodes/"
	nodeTTL     = 24 * time.Hour
	leaseRenew  = time.Hour        // between two renewals of a node's lease by one etcdd
	lostAfter   = 30 * time.Second // without a report
	clashShown  = time.Minute      // for how long two machines of one name are told of
	keptBoots   = 4                // that a node's record remembers, to tell two machines of one name from a restart
	nodesPause  = 250 * time.Millisecond
	nodesLook   = time.Second // between two looks at who is lost
)

// record is what etcd holds of a node, as JSON.
type record struct {
	Role      string    `json:"role"`
	Key       string    `json:"key,omitempty"` // of the member that reported, as trustd.ClusterNode has it; "": not known
	Addresses []string  `json:"addresses,omitempty"`
	Version   string    `json:"version"`
	State     string    `json:"state"`
	Detail    string    `json:"detail,omitempty"`
	Boot      string    `json:"boot"`
	Seen      time.Time `json:"seen"`            // by the clock of the control plane that took the report
	Boots     []string  `json:"boots,omitempty"` // the last ones, this one too, oldest first
	Clash     time.Time `json:"clash,omitzero"`  // when a boot that was over reported again
	Other     string    `json:"other,omitempty"` // the boot that clashed with this one
	Audit     string    `json:"audit,omitempty"` // what is wrong with the end of its audit log
	Next      string    `json:"next,omitempty"`  // version that the next boot tries
	Trial     bool      `json:"trial,omitempty"` // the running one has not been found good
}

// merge makes the next record of a report. A boot that was followed by another one never comes back by itself: if it does, two machines
// have one identity, as after a disk was copied.
func merge(old record, n *clusterv1.Node, now time.Time) record {
	r := record{Role: n.GetRole(), Addresses: n.GetAddresses(), Version: n.GetVersion(), State: n.GetState(), Detail: n.GetDetail(), Boot: n.GetBootId(),
		Seen: now, Boots: old.Boots, Clash: old.Clash, Other: old.Other, Next: n.GetNextVersion(), Trial: n.GetTrial()}
	if r.Boot == old.Boot || r.Boot == "" {
		return r
	}
	if slices.Contains(old.Boots, r.Boot) {
		r.Clash, r.Other = now, old.Boot
		return r
	}
	r.Boots = append(slices.Clone(old.Boots), r.Boot)
	r.Boots = r.Boots[max(0, len(r.Boots)-keptBoots):]
	return r
}

// heard is a record, and when this etcdd heard of it, by its own clock: those of other control planes may be wrong.
type heard struct {
	record
	at time.Time
}

// registry follows all records.
type registry struct {
	member *member
	now    func() time.Time
	wake   chan struct{}
	cell   latest.Cell[listing] // changes when something but a time does

	mu      sync.Mutex
	nodes   map[string]heard     // guarded by mu
	trouble error                // guarded by mu; why nodes cannot be told, nil if they can
	renewed map[string]time.Time // guarded by mu; when this etcdd renewed a node's lease
	ends    map[string]anchored  // guarded by mu; the end of a node's audit log that this etcdd has seen anchored last
}

type listing struct {
	nodes []*clusterv1.Node
	err   error
}

func newRegistry(m *member, now func() time.Time) *registry {
	if now == nil {
		now = time.Now
	}
	r := &registry{member: m, now: now, wake: make(chan struct{}, 1), renewed: map[string]time.Time{}, ends: map[string]anchored{},
		trouble: errs.New(errs.Unavailable, "nodes: the etcd member does not answer yet")}
	r.cell.Set(listing{err: r.trouble})
	return r
}

// run follows etcd until ctx is done.
func (r *registry) run(ctx context.Context) error {
	for {
		err := r.follow(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		r.mu.Lock()
		r.trouble = errs.New(errs.Unavailable, "nodes: %s", errs.Text(err))
		r.mu.Unlock()
		r.poke()
		if err := wait(ctx, nodesLook); err != nil {
			return err
		}
	}
}

func (r *registry) follow(ctx context.Context) error {
	return r.member.watch(ctx, nodesPrefix, func(m *storev1.WatchResponse) error {
		r.hear(m)
		r.poke()
		return nil
	})
}

// hear takes what changed.
func (r *registry) hear(m *storev1.WatchResponse) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.nodes
	if m.GetComplete() {
		r.nodes, r.trouble = map[string]heard{}, nil
	}
	for _, e := range m.GetEntries() {
		h := heard{at: now}
		if json.Unmarshal(e.GetValue(), &h.record) != nil {
			continue // of a later version; it is not this one's to judge
		}
		name := e.GetKey()[len(nodesPrefix):]
		switch was, ok := before[name]; {
		case !m.GetComplete():
		case ok && was.Seen.Equal(h.Seen) && was.Boot == h.Boot:
			h.at = was.at // heard before the member was away
		case h.Seen.Before(now):
			h.at = h.Seen // nothing better is known of what was before
		}
		r.nodes[name] = h
	}
	for _, k := range m.GetDeleted() {
		delete(r.nodes, k[len(nodesPrefix):])
	}
}

func (r *registry) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// publish tells watchers of changes, not more often than a few times a second.
func (r *registry) publish(ctx context.Context) error {
	t := time.NewTicker(nodesLook)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		case <-r.wake:
		}
		nodes, err := r.list()
		if was, _ := r.cell.Get(); !sameListing(was, listing{nodes, err}) {
			r.cell.Set(listing{nodes, err})
			if err := wait(ctx, nodesPause); err != nil {
				return err
			}
		}
	}
}

// sameListing reports whether two are equal but for the times of reports.
func sameListing(a, b listing) bool {
	if errs.Text(a.err) != errs.Text(b.err) {
		return false
	}
	return slices.EqualFunc(a.nodes, b.nodes, func(x, y *clusterv1.Node) bool {
		z := proto.CloneOf(y)
		z.Seen = x.GetSeen()
		return proto.Equal(x, z)
	})
}

// key returns the public key of the member of that name, "" if there is none or it is not known.
func (r *registry) key(name string) string {
	roots, _ := r.member.trust.Roots()
	for _, m := range roots.State.GetNodes() {
		if m.GetName() == name {
			return m.GetKey()
		}
	}
	return ""
}

// list returns all nodes as they are now. The caller must not change them.
func (r *registry) list() ([]*clusterv1.Node, error) {
	roots, _ := r.member.trust.Roots()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.trouble != nil {
		return nil, r.trouble
	}
	return render(r.nodes, roots.State.GetNodes(), r.now()), nil
}

// render is pure. members are those of trustd (nil: not known). What reported and is not among them has been removed; what reported with another
// key was another machine of that name, and its successor has not reported yet.
func render(nodes map[string]heard, members []*trustv1.ClusterNode, now time.Time) []*clusterv1.Node {
	var out []*clusterv1.Node
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		h := nodes[name]
		n := &clusterv1.Node{Name: name, Role: h.Role, Addresses: h.Addresses, Version: h.Version, State: h.State, Detail: h.Detail, BootId: h.Boot, Seen: timestamppb.New(h.Seen),
			NextVersion: h.Next, Trial: h.Trial}
		i := slices.IndexFunc(members, func(m *trustv1.ClusterNode) bool { return m.GetName() == name })
		if i >= 0 && len(members[i].GetAddresses()) > 0 {
			n.Addresses = members[i].GetAddresses() // the cluster has seen them; a node says what it likes
		}
		switch silent := now.Sub(h.at); {
		case i < 0 && len(members) > 0, i >= 0 && h.Key != "" && members[i].GetKey() != h.Key:
			continue
		case silent >= lostAfter:
			n.State, n.Detail = "lost", "no report since "+h.Seen.UTC().Format(time.RFC3339)
		case !h.Clash.IsZero() && now.Sub(h.Clash) < clashShown:
			n.State = "not ready"
			n.Detail = "two machines report under this name (boots " + h.Boot + " and " + h.Other + "): one has a copy of the other's disk; switch one off and reset it"
		}
		if n.State != "lost" && h.Audit != "" {
			n.State, n.Detail = "not ready", h.Audit
		}
		out = append(out, n)
	}
	return out
}

type registryServer struct {
	clusterv1.UnimplementedRegistryServer
	d *Daemon
}

// ListNodes answers from what was followed.
func (s *registryServer) ListNodes(context.Context, *clusterv1.ListNodesRequest) (*clusterv1.ListNodesResponse, error) {
	nodes, err := s.d.registry.list()
	if err != nil {
		return nil, err
	}
	return &clusterv1.ListNodesResponse{Nodes: nodes}, nil
}

// WatchNodes ends when nodes cannot be told any more, so that nobody takes an old list for a quiet cluster.
func (s *registryServer) WatchNodes(_ *clusterv1.WatchNodesRequest, out grpc.ServerStreamingServer[clusterv1.ListNodesResponse]) error {
	return s.d.registry.cell.Watch(out.Context(), func(l listing) error {
		if l.err != nil {
			return l.err
		}
		return out.Send(&clusterv1.ListNodesResponse{Nodes: l.nodes})
	})
}

// Report takes a node's word about itself, and nobody else's.
func (s *registryServer) Report(ctx context.Context, r *clusterv1.ReportRequest) (*clusterv1.ReportResponse, error) {
	if err := s.d.mayReport(ctx, r.GetNode()); err != nil {
		return nil, err
	}
	if err := checkReport(r.GetNode()); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var change []byte
	// A report that is taken twice is no other one.
	err := s.d.kernel.repeat(ctx, func(ctx context.Context, l lent) error {
		wrong, err := s.d.registry.anchor(ctx, l.client, r.GetNode())
		if err == nil {
			change, err = s.d.registry.put(ctx, l.client, r.GetNode(), wrong)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	order, soon := rolling.OrderFor(change, r.GetNode())
	return &clusterv1.ReportResponse{Clock: timestamppb.New(s.d.registry.now()), Order: order, Soon: soon}, nil
}

// mayReport: another node or this one through apid, or this node's machined.
func (d *Daemon) mayReport(ctx context.Context, n *clusterv1.Node) error {
	name, controlPlane, ok := peer.NodeFrom(ctx)
	if id, _ := peer.From(ctx); id == uid.Machined {
		want, generation := d.loop.Spec()
		if generation == 0 {
			return errs.New(errs.Precondition, "report: the node has no name yet; apply a configuration")
		}
		name, controlPlane, ok = want.Name, true, true
	}
	if !ok || n.GetName() != name {
		return errs.New(errs.Denied, "report: of node %.64q; a node reports of itself only, and this caller is %q", n.GetName(), name)
	}
	if role := map[bool]string{true: "controlplane", false: "worker"}[controlPlane]; n.GetRole() != role {
		return errs.New(errs.Denied, "report: role %.64q; node %q joined as %q", n.GetRole(), name, role)
	}
	return nil
}

func checkReport(n *clusterv1.Node) error {
	if n.GetState() != "ready" && n.GetState() != "not ready" {
		return errs.New(errs.Invalid, `report: state %.64q; allowed are "ready" and "not ready"`, n.GetState())
	}
	for what, f := range map[string]struct {
		text string
		most int
	}{"version": {n.GetVersion(), 128}, "next_version": {n.GetNextVersion(), 128}, "detail": {n.GetDetail(), 1024}, "boot_id": {n.GetBootId(), 64}, "name": {n.GetName(), 63}} {
		if len(f.text) > f.most {
			return errs.New(errs.Invalid, "report: %s has %d bytes; at most %d are allowed", what, len(f.text), f.most)
		}
	}
	if len(n.GetAddresses()) > 32 {
		return errs.New(errs.Invalid, "report: %d addresses; at most 32 are allowed", len(n.GetAddresses()))
	}
	for _, a := range n.GetAddresses() {
		if _, err := netip.ParseAddr(a); err != nil {
			return errs.New(errs.Invalid, "report: address %.64q is none", a)
		}
	}
	return checkAudit(n.GetAudit())
}

// putTries bounds how often a report is put again when another one of the same node came first: that is rare, and more is two machines.
const putTries = 4

// put writes one record, and returns that of the rolling change as it is at this very moment: what a node is told to do must not be old.
// wrong is what the report says against the node's audit log.
func (r *registry) put(ctx context.Context, c *clientv3.Client, n *clusterv1.Node, wrong string) ([]byte, error) {
	key := nodesPrefix + n.GetName()
	for range putTries {
		resp, err := c.Get(ctx, key)
		if err != nil {
			return nil, storeError("report", err)
		}
		var old record
		var lease clientv3.LeaseID
		var revision int64
		if len(resp.Kvs) > 0 {
			kv := resp.Kvs[0]
			lease, revision = clientv3.LeaseID(kv.GetLease()), kv.GetModRevision()
			if json.Unmarshal(kv.GetValue(), &old) != nil {
				old = record{} // a later version's, which this report replaces
			}
		}
		if lease, err = r.lease(ctx, c, n.GetName(), lease); err != nil {
			return nil, storeError("report: lease", err)
		}
		next := merge(old, n, r.now())
		next.Key, next.Audit = r.key(n.GetName()), wrong
		value, err := json.Marshal(next)
		if err != nil {
			return nil, err
		}
		done, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).
			Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease)), clientv3.OpGet(rolling.Current)).Commit()
		if err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return nil, storeError("report", err)
		}
		if err == nil && done.Succeeded {
			if next.Clash.After(old.Clash) {
				text := fmt.Sprintf("two machines report under the name %q (boots %s and %s): one has a copy of the other's disk; switch one off and reset it", n.GetName(), next.Boot, next.Other)
				daemon.Tell(r.member.cfg.Env.Log, daemon.EventCluster, "two machines called "+n.GetName(), text)
				// It is taken, and is an error all the same: the machine says so itself, and the audit log has from where each of the two called. Neither is told to do anything.
				return nil, errs.New(errs.Precondition, "%s", text)
			}
			for _, kv := range done.Responses[1].GetResponseRange().GetKvs() {
				return kv.GetValue(), nil
			}
			return nil, nil
		}
		if err != nil {
			r.forget(n.GetName())
		}
	}
	return nil, errs.New(errs.Conflict, "report: others report of node %q at the same time; do two machines have one name?", n.GetName())
}

// lease returns the node's lease: the one that it has, kept alive, or a new one. One for each report would be thousands a day.
func (r *registry) lease(ctx context.Context, c *clientv3.Client, name string, have clientv3.LeaseID) (clientv3.LeaseID, error) {
	r.mu.Lock()
	fresh := r.now().Sub(r.renewed[name]) < leaseRenew
	r.mu.Unlock()
	if have != 0 && fresh {
		return have, nil
	}
	if have != 0 {
		_, err := c.KeepAliveOnce(ctx, have)
		if err == nil {
			r.renew(name)
			return have, nil
		}
		if !errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return 0, err
		}
	}
	l, err := c.Grant(ctx, int64(nodeTTL/time.Second))
	if err != nil {
		return 0, err
	}
	r.renew(name)
	return l.ID, nil
}

func (r *registry) renew(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.renewed[name] = r.now()
}

func (r *registry) forget(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.renewed, name)
}

// wait waits, unless ctx is done first: then it returns ctx's error.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
