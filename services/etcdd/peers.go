package etcdd

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// peersServer is what members on other control planes call through both apids.
type peersServer struct {
	etcdv1.UnimplementedPeersServer
	d *Daemon
}

// peerTime is the longest that a call of another member takes. Its apid gives a control plane five seconds before it asks the next one.
const peerTime = 4500 * time.Millisecond

// admission is what is to be done for a node that wants a member.
type admission struct {
	have uint64 // the learner that it has already; 0: none
	drop uint64 // a learner of its own that must go first; 0: none
}

// admit decides. It is pure. seen are the addresses that the cluster saw the node call from.
//
// The caller has no data, or it would not ask. So a voter of its name is one whose data was lost, or another machine's: who is right, no
// program can know, and a vote must not be given twice. A learner has no vote; one that has started is made anew, since the leader
// believes it to have what the caller has not.
func admit(list []*etcdserverpb.Member, name string, urls []string, seen []netip.Addr) (admission, error) {
	var a admission
	for _, m := range list {
		hosts := hostsOf(m.GetPeerURLs())
		theirs := func(x netip.Addr) bool { return slices.Contains(seen, x) }
		same := slices.ContainsFunc(m.GetPeerURLs(), func(u string) bool { return slices.Contains(urls, u) })
		mine := m.GetName() == name || m.GetName() == "" && slices.ContainsFunc(hosts, theirs)
		switch {
		case mine && !m.GetIsLearner():
			return a, errs.New(errs.Precondition, "etcd has a member %q (%s, at %s) already, and this node has not got its data: either they were lost, or another machine has this name. "+
				"If no other machine has it, run at another control plane: bhctl etcd remove %s", name, hexID(m.GetID()), strings.Join(m.GetPeerURLs(), " "), hexID(m.GetID()))
		case mine && m.GetName() == "" && slices.Equal(m.GetPeerURLs(), urls):
			a.have = m.GetID()
		case mine:
			a.drop = m.GetID()
		case same:
			return a, errs.New(errs.Precondition, "address %s is that of the member %q (%s)", strings.Join(urls, " "), m.GetName(), hexID(m.GetID()))
		case m.GetIsLearner():
			return a, errs.New(errs.Precondition, "member %s is just joining, and one at a time may; it is tried again. If that one never comes, run: bhctl etcd remove %s", voice{id: m.GetID(), name: m.GetName()}, hexID(m.GetID()))
		case slices.ContainsFunc(hosts, theirs):
			return a, errs.New(errs.Precondition, "member %q says that others reach it at %s, which is an address of this node: where nodes meet in another network than that of their first interface, "+
				"give an address of that network as endpoint in the document of kind Cluster", m.GetName(), strings.Join(m.GetPeerURLs(), " "))
		case slices.ContainsFunc(hosts, netip.Addr.IsLoopback) && !slices.ContainsFunc(hostsOf(urls), netip.Addr.IsLoopback):
			return a, errs.New(errs.Precondition, "member %q has no address yet at which others reach it: its node has none", m.GetName())
		}
	}
	return a, nil
}

// caller returns the control plane that calls, and what the cluster knows of it.
func (s *peersServer) caller(ctx context.Context) (string, []netip.Addr, error) {
	name, controlPlane, ok := peer.NodeFrom(ctx)
	if !ok || !controlPlane {
		return "", nil, errs.New(errs.Denied, "etcd members are for control planes; this caller is %q", peer.CallerFrom(ctx).Name)
	}
	roots, _ := s.d.kernel.trust.Roots()
	i := slices.IndexFunc(roots.State.GetNodes(), func(n *trustv1.ClusterNode) bool { return n.GetName() == name })
	if i < 0 {
		return "", nil, errs.New(errs.Unavailable, "node %q: trustd of this control plane does not know it yet", name)
	}
	return name, nodeaddr.Parse(roots.State.GetNodes()[i].GetAddresses()), nil
}

func (s *peersServer) AddMember(ctx context.Context, r *etcdv1.AddMemberRequest) (_ *etcdv1.AddMemberResponse, err error) {
	defer func() { s.d.tellRefused("add", peer.CallerFrom(ctx).Name, err) }()
	name, seen, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkURLs(r.GetPeerUrls(), seen); err != nil {
		return nil, err
	}
	done, client, err := s.d.kernel.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	list, err := s.d.kernel.list(ctx, client)
	if err != nil {
		return nil, err
	}
	a, err := admit(list, name, r.GetPeerUrls(), seen)
	if err != nil {
		return nil, err
	}
	if a.drop != 0 {
		if _, err := client.MemberRemove(ctx, a.drop); err != nil {
			return nil, memberError("remove the learner that "+name+" was", err)
		}
		s.d.env.Log.Info("learner without data removed", "step", "member remove "+name)
	}
	if a.have == 0 {
		err := connected(ctx, func(ctx context.Context) error {
			added, err := client.MemberAddAsLearner(ctx, r.GetPeerUrls())
			if err == nil {
				a.have, list = added.Member.GetID(), added.Members
			}
			return err
		})
		if err != nil {
			return nil, memberError("add the member "+name, err)
		}
		s.d.env.Log.Info("learner added", "step", "member add "+name)
	}
	out := &etcdv1.AddMemberResponse{MemberId: hexID(a.have)}
	for _, m := range list {
		if m.GetID() == a.have {
			m.Name = name
		}
		out.Members = append(out.Members, &etcdv1.Member{Id: hexID(m.GetID()), Name: m.GetName(), PeerUrls: m.GetPeerURLs(), ClientUrls: m.GetClientURLs(), Learner: m.GetIsLearner()})
	}
	return out, nil
}

// checkURLs makes sure that a node names an address of its own: raft of all others will call it.
func checkURLs(urls []string, seen []netip.Addr) error {
	if len(urls) == 0 || len(urls) > 4 {
		return errs.New(errs.Invalid, "peer_urls: %d addresses; allowed are 1 to 4", len(urls))
	}
	for _, u := range urls {
		a := nodeaddr.InURL(u)
		if !strings.HasPrefix(u, "https://") || !a.IsValid() {
			return errs.New(errs.Invalid, `peer_urls: %.64q is not like "https://10.0.0.5:2380"`, u)
		}
		if !slices.Contains(seen, a) {
			return errs.New(errs.Denied, "peer_urls: the cluster has not seen this node at %s; it has at %s", a, addrTexts(seen))
		}
	}
	return nil
}

func addrTexts(addrs []netip.Addr) string {
	if len(addrs) == 0 {
		return "no address"
	}
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

func (s *peersServer) Promote(ctx context.Context, r *etcdv1.PromoteRequest) (*etcdv1.PromoteResponse, error) {
	name, seen, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	id, err := strconv.ParseUint(r.GetMemberId(), 16, 64)
	if err != nil {
		return nil, errs.New(errs.Invalid, "member_id: %.64q is no hexadecimal number", r.GetMemberId())
	}
	done, client, err := s.d.kernel.reconfigure(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	list, err := s.d.kernel.list(ctx, client)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(list, func(m *etcdserverpb.Member) bool { return m.GetID() == id })
	if i < 0 {
		return nil, errs.New(errs.NotFound, "etcd has no member %s", r.GetMemberId())
	}
	m := list[i]
	if m.GetName() != name && !(m.GetName() == "" && slices.ContainsFunc(hostsOf(m.GetPeerURLs()), func(a netip.Addr) bool { return slices.Contains(seen, a) })) {
		return nil, errs.New(errs.Denied, "member %s is that of %q, not of %q", r.GetMemberId(), m.GetName(), name)
	}
	if !m.GetIsLearner() {
		return &etcdv1.PromoteResponse{}, nil
	}
	if _, err := client.MemberPromote(ctx, id); err != nil {
		return nil, memberError("promote the member "+name, err)
	}
	s.d.env.Log.Info("learner promoted", "step", "member promote "+name)
	return &etcdv1.PromoteResponse{}, nil
}

// memberError gives the errors of etcd's membership the kinds that callers know.
func memberError(what string, err error) error {
	kind := errs.Internal
	var far rpctypes.EtcdError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		kind = errs.Unavailable
	case errors.As(err, &far):
		switch far.Code() {
		case codes.Unavailable, codes.DeadlineExceeded:
			kind = errs.Unavailable
		case codes.FailedPrecondition:
			kind = errs.Precondition
		case codes.NotFound:
			kind = errs.NotFound
		}
	}
	return errs.New(kind, "%s: %w", what, err)
}
