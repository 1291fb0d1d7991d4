package trustd

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

const (
	tokenLife    = time.Hour
	maxTokenLife = 7 * day
	// patience is how long another daemon of this node may take to answer.
	patience = 5 * time.Second
)

type membershipServer struct {
	trustv1.UnimplementedMembershipServer
	d *Daemon
}

// roster is the cluster's list. FailedPrecondition on a node that has no cluster, or is a worker.
func (d *Daemon) roster() (roster.Roster, *keyring, error) {
	k, _ := d.keys.Get()
	switch {
	case k.worker():
		return roster.Roster{}, nil, errs.New(errs.Precondition, "node %q is a worker; ask a control plane", k.node.name)
	case k.cluster == nil:
		return roster.Roster{}, nil, errs.New(errs.Precondition, "this node is in no cluster yet: bootstrap it, or let it join one")
	}
	return roster.Roster{Store: storev1.NewStoreClient(d.etcdd)}, k, nil
}

// joinKey is the key that secrets of join tokens come from. A cluster of an older image gets one now, on the disk before it is used.
func (d *Daemon) joinKey() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k, _ := d.keys.Get()
	if k.cluster == nil || d.where != durable {
		return nil, errs.New(errs.Unavailable, "volume STATE is not mounted; see the storage status")
	}
	if len(k.cluster.joinKey) > 0 {
		return k.cluster.joinKey, nil
	}
	c := *k.cluster
	c.joinKey = make([]byte, join.KeySize)
	if _, err := io.ReadFull(d.cfg.Random, c.joinKey); err != nil {
		return nil, err
	}
	data, err := c.disk()
	if err != nil {
		return nil, err
	}
	if err := writeFile(d.cfg.StateDir, clusterFile, data); err != nil {
		return nil, err
	}
	next := *k
	next.cluster = &c
	d.keys.Set(&next)
	d.log.Info("key for join tokens made")
	return c.joinKey, nil
}

func (s membershipServer) MakeJoinToken(ctx context.Context, r *trustv1.MakeJoinTokenRequest) (*trustv1.MakeJoinTokenResponse, error) {
	list, k, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	if r.GetRole() != roster.ControlPlane && r.GetRole() != roster.Worker {
		return nil, errs.New(errs.Invalid, "role: %.64q; allowed are %q and %q", r.GetRole(), roster.ControlPlane, roster.Worker)
	}
	if r.GetName() != "" {
		if err := s.d.checkFree(k, r.GetName()); err != nil {
			return nil, err
		}
	}
	life, err := lifetime(r.GetTtlSeconds(), tokenLife, maxTokenLife)
	if err != nil {
		return nil, err
	}
	key, err := s.d.joinKey()
	if err != nil {
		return nil, err
	}
	id, err := join.NewID(s.d.cfg.Random)
	if err != nil {
		return nil, err
	}
	now := s.d.cfg.Now()
	t := roster.Token{ID: id, Role: r.GetRole(), Name: r.GetName(), Expires: now.Add(life).Truncate(time.Second), MadeBy: peer.CallerFrom(ctx).Name, State: roster.Unused}
	if err := list.AddToken(ctx, t, now); err != nil {
		return nil, err
	}
	s.d.log.Info("join token made", "id", id, "role", t.Role, "name", t.Name, "expires", t.Expires.Format(time.RFC3339))
	return &trustv1.MakeJoinTokenResponse{Token: join.Token(id, join.Secret(key, id)), Id: id, Expires: timestamppb.New(t.Expires)}, nil
}

func (s membershipServer) ListJoinTokens(ctx context.Context, _ *trustv1.ListJoinTokensRequest) (*trustv1.ListJoinTokensResponse, error) {
	state, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	out := &trustv1.ListJoinTokensResponse{}
	for _, id := range slices.Sorted(maps.Keys(state.Tokens)) {
		if t := state.Tokens[id]; t.Expires.After(s.d.cfg.Now()) {
			out.Tokens = append(out.Tokens, &trustv1.JoinToken{Id: id, Role: t.Role, Name: t.Name, Expires: timestamppb.New(t.Expires), State: t.State, UsedBy: t.UsedBy, MadeBy: t.MadeBy})
		}
	}
	return out, nil
}

func (s membershipServer) RevokeJoinToken(ctx context.Context, r *trustv1.RevokeJoinTokenRequest) (*trustv1.RevokeJoinTokenResponse, error) {
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	if err := list.RevokeToken(ctx, strings.ToUpper(r.GetId()), s.d.cfg.Now()); err != nil {
		return nil, err
	}
	s.d.log.Info("join token revoked", "id", r.GetId(), "by", peer.CallerFrom(ctx).Name)
	return &trustv1.RevokeJoinTokenResponse{}, nil
}

func (s membershipServer) ListMembers(ctx context.Context, _ *trustv1.ListMembersRequest) (*trustv1.ListMembersResponse, error) {
	state, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	return &trustv1.ListMembersResponse{Members: members(state)}, nil
}

// members are the nodes for people, by name.
func members(state *roster.State) []*trustv1.ClusterMember {
	var out []*trustv1.ClusterMember
	for _, name := range slices.Sorted(maps.Keys(state.Nodes)) {
		n := state.Nodes[name]
		out = append(out, &trustv1.ClusterMember{Name: name, Role: n.Role, Key: n.Key, Addresses: n.Addresses, Joined: timestamppb.New(n.Joined), TokenId: n.Token, Attested: shown(n.Attested)})
	}
	return out
}

func (s membershipServer) read(ctx context.Context) (*roster.State, error) {
	list, _, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	return list.Read(ctx)
}

// departureServer is for nodes that end their own membership.
type departureServer struct {
	trustv1.UnimplementedDepartureServer
	d *Daemon
}

// Leave takes the name from the caller's certificate alone.
func (s departureServer) Leave(ctx context.Context, _ *trustv1.LeaveRequest) (*trustv1.LeaveResponse, error) {
	name, _, ok := peer.NodeFrom(ctx)
	if !ok {
		return nil, errs.New(errs.Denied, "only a node leaves the cluster so; to take one out, run: bhctl node remove NAME")
	}
	return &trustv1.LeaveResponse{}, s.d.removeMember(ctx, name)
}

func (s membershipServer) RemoveMember(ctx context.Context, r *trustv1.RemoveMemberRequest) (*trustv1.RemoveMemberResponse, error) {
	return &trustv1.RemoveMemberResponse{}, s.d.removeMember(ctx, r.GetName())
}

func (d *Daemon) removeMember(ctx context.Context, name string) error {
	list, _, err := d.roster()
	if err != nil {
		return err
	}
	by := peer.CallerFrom(ctx).Name
	if err := list.Remove(ctx, name, by, d.cfg.Now(), func(n roster.Node) error { return d.checkNoMember(ctx, n) }); err != nil {
		return err
	}
	d.log.Info("node removed", "name", name, "by", by)
	daemon.Tell(d.log, daemon.EventCluster, "removed: "+name+" at "+d.cfg.Now().UTC().Format(time.RFC3339), fmt.Sprintf("node %q was removed from the cluster by %q", name, by))
	return nil
}

// checkNoMember says whether etcd has left a node behind.
func (d *Daemon) checkNoMember(ctx context.Context, n roster.Node) error {
	if n.Role != roster.ControlPlane {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	st, err := etcdv1.NewEtcdClient(d.etcdd).GetStatus(ctx, &etcdv1.GetStatusRequest{})
	if err != nil {
		return errs.New(errs.Unavailable, "it is not known whether node %q is still a member of etcd, so it is not removed: %s", n.Name, errs.Text(err))
	}
	if len(st.GetMembers()) == 0 {
		return errs.New(errs.Unavailable, "it is not known whether node %q is still a member of etcd, so it is not removed: etcd's state here is %q", n.Name, st.GetState())
	}
	for _, m := range st.GetMembers() {
		if m.GetName() == n.Name {
			return errs.New(errs.Precondition, "node %q is still a member of etcd: first bhctl etcd remove %s (or, on the node itself, bhctl etcd leave)", n.Name, n.Name)
		}
	}
	return nil
}

func (s membershipServer) Revoke(ctx context.Context, r *trustv1.RevokeRequest) (*trustv1.RevokeResponse, error) {
	list, k, err := s.d.roster()
	if err != nil {
		return nil, err
	}
	id := strings.ToLower(r.GetId())
	if len(id) < 8 || len(id) > 64 || strings.Trim(id, "0123456789abcdef") != "" {
		return nil, errs.New(errs.Invalid, "id: %.80q is neither a certificate's serial nor a token's id: 8 to 64 hexadecimal digits, as bhctl get certificates shows them", r.GetId())
	}
	for _, a := range k.authorities() {
		if a.cert.SerialNumber.Text(16) == id {
			return nil, errs.New(errs.Invalid, "id: %s is the authority %s itself; it cannot be revoked, only replaced", id, a.name)
		}
	}
	by := peer.CallerFrom(ctx).Name
	if err := list.Revoke(ctx, id, by, s.d.cfg.Now()); err != nil {
		return nil, err
	}
	s.d.log.Info("revoked", "id", id, "by", by)
	daemon.Tell(s.d.log, daemon.EventAccess, "revoked: "+id, fmt.Sprintf("credentials %s were revoked by %q", id, by))
	return &trustv1.RevokeResponse{}, nil
}

// checkFree refuses names for nodes that are names of something else in certificates: whoever got such a one could pass for it.
func (d *Daemon) checkFree(k *keyring, name string) error {
	if !isNodeName(name) {
		return errs.New(errs.Invalid, "name: %w", checkNode(name, ""))
	}
	sp, _ := d.spec.Get()
	own := *k.spec(sp)
	own.hostname = "" // that one is on the list of nodes
	if slices.Contains(own.allNames(), name) || name == "bulkhead" || name == "kubernetes" || strings.HasPrefix(name, "kubernetes.") || name == join.ServerName {
		return errs.New(errs.Invalid, "name: %q is one of the cluster's own names, so no node can be called so", name)
	}
	return nil
}
