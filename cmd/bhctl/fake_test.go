package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// fakeCluster is a control plane that answers for the nodes n1, n2, n3 and w1, over real TLS. n3 is down, and what concerns it fails as apid would make it fail.
type fakeCluster struct {
	machinev1.UnimplementedMachineServer
	trustv1.UnimplementedMembershipServer
	clusterv1.UnimplementedRegistryServer

	access  *fakeAccess
	rolling fakeRolling
	update  fakeUpdate
	late    func(ctx context.Context, node string) // before a node tells its version; nil: at once

	mu       sync.Mutex
	members  []string             // guarded by mu
	etcd     []string             // guarded by mu
	stale    bool                 // guarded by mu; trustd has not heard yet that etcd lost a member
	tokens   []*trustv1.JoinToken // guarded by mu
	alarms   []string             // guarded by mu
	turning  fakeAuthorities
	attested []*trustv1.Attestation // guarded by mu
}

// startFake returns a file of contexts for a cluster of its own.
func startFake(t testing.TB) (*fakeCluster, contexts) {
	t.Helper()
	f := &fakeCluster{access: &fakeAccess{}, members: []string{"n1", "n2", "n3", "w1"}, etcd: []string{"n1", "n2", "n3"}, alarms: []string{"NOSPACE at n2"}}
	ca := testca.New(t)
	cert, key := ca.PEM(t, "apid-server", x509.CertificateRequest{DNSNames: []string{client.ServerName}})
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	must(t, err)
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}})))
	machinev1.RegisterMachineServer(s, f)
	trustv1.RegisterMembershipServer(s, f)
	trustv1.RegisterAuthoritiesServer(s, &f.turning)
	trustv1.RegisterTrustServer(s, &f.turning)
	f.turning.ca = ca
	clusterv1.RegisterRegistryServer(s, f)
	accessv1.RegisterAccessServer(s, f.access)
	clusterv1.RegisterRollingServer(s, &f.rolling)
	updatev1.RegisterUpdateServer(s, &f.update)
	etcdv1.RegisterEtcdServer(s, fakeEtcd{f: f})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	own, ownKey := ca.PEM(t, "admin", x509.CertificateRequest{})
	c := clusterContext{Endpoint: l.Addr().String(), CA: ca.State().KubernetesCa, Certificate: own, Key: ownKey}
	return f, contexts{Current: "demo", Contexts: map[string]*clusterContext{"demo": &c}}
}

func writeContexts(t testing.TB, path string, c contexts) {
	t.Helper()
	b, err := yaml.Marshal(c)
	must(t, err)
	must(t, os.WriteFile(path, b, 0o600))
}

// at is the node that is to answer, as apid finds it out.
func (f *fakeCluster) at(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	name := "n1"
	if v := md.Get(peer.NodeKey); len(v) > 0 {
		name = v[0]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case !slices.Contains(f.members, name):
		return "", status.Errorf(codes.NotFound, "no node %q; there are %v", name, f.members)
	case name == "n3":
		return "", status.Error(codes.Unavailable, "n3 does not answer at 10.5.0.13:50000")
	}
	return name, nil
}

func (f *fakeCluster) GetVersion(ctx context.Context, _ *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	n, err := f.at(ctx)
	if f.late != nil && err == nil {
		f.late(ctx, n)
	}
	return &machinev1.GetVersionResponse{Version: "v1-" + n, Platform: "linux/amd64", Kernel: "6.1", Kubernetes: "v1.36"}, err
}

func (f *fakeCluster) GetHealth(ctx context.Context, _ *machinev1.GetHealthRequest) (*machinev1.GetHealthResponse, error) {
	n, err := f.at(ctx)
	return &machinev1.GetHealthResponse{Healthy: n != "w1", Checks: []*machinev1.Check{{Name: "kubelet", Ok: n != "w1", Detail: "at " + n}}}, err
}

// Why is not known to n2, which runs an older version.
func (f *fakeCluster) Why(ctx context.Context, r *machinev1.WhyRequest) (*machinev1.WhyResponse, error) {
	n, err := f.at(ctx)
	switch {
	case err != nil:
		return nil, err
	case n == "n2":
		return f.UnimplementedMachineServer.Why(ctx, r)
	case n != "w1":
		return &machinev1.WhyResponse{Healthy: true, Node: n, Time: timestamppb.Now()}, nil
	}
	w := notWell()
	w.Node = n
	return w, nil
}

func (f *fakeCluster) RestartService(ctx context.Context, _ *machinev1.RestartServiceRequest) (*machinev1.RestartServiceResponse, error) {
	_, err := f.at(ctx)
	return &machinev1.RestartServiceResponse{}, err
}

func (f *fakeCluster) ListServices(ctx context.Context, _ *machinev1.ListServicesRequest) (*machinev1.ListServicesResponse, error) {
	n, err := f.at(ctx)
	return &machinev1.ListServicesResponse{Services: []*machinev1.Service{{Name: "apid", State: "up", Pid: 7}, {Name: "of-" + n, State: "up", Pid: 8}}}, err
}

func (f *fakeCluster) StreamLogs(r *machinev1.StreamLogsRequest, s grpc.ServerStreamingServer[machinev1.LogLine]) error {
	n, err := f.at(s.Context())
	for i := range 3 {
		if err == nil {
			err = s.Send(&machinev1.LogLine{Text: fmt.Sprintf("line %d of %s at %s", i, r.Name, n), Time: timestamppb.New(time.Unix(1e9, 0))})
		}
	}
	return err
}

func (f *fakeCluster) ListNodes(context.Context, *clusterv1.ListNodesRequest) (*clusterv1.ListNodesResponse, error) {
	return &clusterv1.ListNodesResponse{Nodes: []*clusterv1.Node{
		{Name: "n1", Role: "controlplane", State: "ready", Version: "v1", Addresses: []string{"10.5.0.11"}},
		{Name: "n3", Role: "controlplane", State: "lost", Version: "v1", Addresses: []string{"10.5.0.13"}, Detail: "etcd has\nno leader", Seen: timestamppb.New(time.Unix(1e9, 0))},
	}}, nil
}

// WatchNodes sends two states, the first one twice, and ends.
func (f *fakeCluster) WatchNodes(_ *clusterv1.WatchNodesRequest, s grpc.ServerStreamingServer[clusterv1.ListNodesResponse]) error {
	for i, state := range []string{"ready", "ready", "not ready"} {
		if err := s.Send(&clusterv1.ListNodesResponse{Nodes: []*clusterv1.Node{{Name: "n1", State: state, Seen: timestamppb.New(time.Unix(int64(i), 0))}}}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeCluster) ListMembers(context.Context, *trustv1.ListMembersRequest) (*trustv1.ListMembersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &trustv1.ListMembersResponse{}
	for _, n := range f.members {
		r.Members = append(r.Members, &trustv1.ClusterMember{Name: n, Role: "controlplane", Key: "0a1b"})
	}
	return r, nil
}

func (f *fakeCluster) RemoveMember(_ context.Context, r *trustv1.RemoveMemberRequest) (*trustv1.RemoveMemberResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.Contains(f.etcd, r.Name) || f.stale {
		f.stale = false
		return nil, status.Errorf(codes.FailedPrecondition, "etcd has %s as a member", r.Name)
	}
	f.members = slices.DeleteFunc(f.members, func(n string) bool { return n == r.Name })
	return &trustv1.RemoveMemberResponse{}, nil
}

func (f *fakeCluster) MakeJoinToken(_ context.Context, r *trustv1.MakeJoinTokenRequest) (*trustv1.MakeJoinTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	expires := timestamppb.New(time.Now().Add(time.Duration(r.TtlSeconds) * time.Second))
	id := fmt.Sprintf("TOKEN%05d", len(f.tokens))
	f.tokens = append(f.tokens, &trustv1.JoinToken{Id: id, Role: r.Role, Name: r.Name, State: "unused", Expires: expires, MadeBy: "admin"})
	return &trustv1.MakeJoinTokenResponse{Token: id + ".SECRE-T0000", Id: id, Expires: expires}, nil
}

func (f *fakeCluster) ListJoinTokens(context.Context, *trustv1.ListJoinTokensRequest) (*trustv1.ListJoinTokensResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &trustv1.ListJoinTokensResponse{Tokens: f.tokens}, nil
}

func (f *fakeCluster) RevokeJoinToken(_ context.Context, r *trustv1.RevokeJoinTokenRequest) (*trustv1.RevokeJoinTokenResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.tokens {
		if t.Id == r.Id {
			t.State = "revoked"
			return &trustv1.RevokeJoinTokenResponse{}, nil
		}
	}
	return nil, status.Errorf(codes.NotFound, "there is no join token %q", r.Id)
}

func (f *fakeCluster) Revoke(context.Context, *trustv1.RevokeRequest) (*trustv1.RevokeResponse, error) {
	return &trustv1.RevokeResponse{}, nil
}

// fakeEtcd is the member of whichever node is asked.
type fakeEtcd struct {
	etcdv1.UnimplementedEtcdServer
	f *fakeCluster
}

func (e fakeEtcd) RemoveMember(ctx context.Context, r *etcdv1.RemoveMemberRequest) (*etcdv1.RemoveMemberResponse, error) {
	if n, err := e.f.at(ctx); err != nil || n == r.Name {
		return nil, errors.Join(err, status.Error(codes.FailedPrecondition, "it is this one: bhctl etcd leave"))
	}
	return &etcdv1.RemoveMemberResponse{}, e.remove(r.Name)
}

func (e fakeEtcd) GetStatus(ctx context.Context, _ *etcdv1.GetStatusRequest) (*etcdv1.Status, error) {
	n, err := e.f.at(ctx)
	f := e.f
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &etcdv1.Status{MemberId: "id-" + n, State: "running", Alarms: f.alarms}
	for _, m := range f.etcd {
		s.Members = append(s.Members, &etcdv1.Member{Id: "id-" + m, Name: m, PeerUrls: []string{"https://" + m + ":2380"}, Learner: m == "n3"})
	}
	return s, err
}

// Removing is refused for n2, as if n3 were away.
func (e fakeEtcd) remove(name string) error {
	f := e.f
	f.mu.Lock()
	defer f.mu.Unlock()
	if name == "n2" {
		return status.Error(codes.FailedPrecondition, "n2 is one of 2 members that answer; without it 1 of 2 is no quorum")
	}
	f.etcd = slices.DeleteFunc(f.etcd, func(n string) bool { return n == name })
	f.stale = true
	return nil
}

func (e fakeEtcd) ForfeitLeadership(context.Context, *etcdv1.ForfeitLeadershipRequest) (*etcdv1.ForfeitLeadershipResponse, error) {
	return &etcdv1.ForfeitLeadershipResponse{Leader: "n2"}, nil
}

func (e fakeEtcd) Leave(ctx context.Context, r *etcdv1.LeaveRequest) (*etcdv1.LeaveResponse, error) {
	n, err := e.f.at(ctx)
	if err == nil && !r.Force {
		err = e.remove(n)
	}
	return &etcdv1.LeaveResponse{}, err
}

func (e fakeEtcd) Rejoin(ctx context.Context, _ *etcdv1.RejoinRequest) (*etcdv1.RejoinResponse, error) {
	if n, err := e.f.at(ctx); err != nil || n != "n2" {
		return nil, errors.Join(err, status.Error(codes.FailedPrecondition, "this node's etcd member neither left nor was removed"))
	}
	return &etcdv1.RejoinResponse{}, nil
}

// snapshots are what n1 has; the second one is damaged on its way.
func (e fakeEtcd) ListSnapshots(ctx context.Context, _ *etcdv1.ListSnapshotsRequest) (*etcdv1.ListSnapshotsResponse, error) {
	n, err := e.f.at(ctx)
	r := &etcdv1.ListSnapshotsResponse{EverySeconds: 6 * 3600, Keep: 5}
	if n == "n2" {
		r.Error = "volume VAR has 7 MiB free"
		return r, err
	}
	for i, name := range []string{"good.db", "bad.db"} {
		r.Snapshots = append(r.Snapshots, &etcdv1.Snapshot{Name: name, Made: timestamppb.New(time.Unix(1e9, 0)), Bytes: 2 << 20, Revision: uint64(4711 + i)})
	}
	return r, err
}

func (e fakeEtcd) StreamSnapshot(r *etcdv1.StreamSnapshotRequest, out grpc.ServerStreamingServer[etcdv1.Chunk]) error {
	data := bytes.Repeat([]byte("database"), 128)
	sum := sha256.Sum256(data)
	switch r.Name {
	case "", "good.db":
	case "bad.db":
		data[0] ^= 1
	default:
		return status.Errorf(codes.NotFound, "this node has no snapshot %q; it has good.db, bad.db", r.Name)
	}
	return errors.Join(out.Send(&etcdv1.Chunk{Data: data}), out.Send(&etcdv1.Chunk{Data: sum[:]}))
}

// Restore takes all, and is refused without force.
func (e fakeEtcd) Restore(in grpc.ClientStreamingServer[etcdv1.RestoreRequest, etcdv1.RestoreResponse]) error {
	r := &etcdv1.RestoreResponse{}
	for force := false; ; {
		m, err := in.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return in.SendAndClose(r)
		case err != nil:
			return err
		}
		if force = force || m.Force; !force {
			return status.Error(codes.FailedPrecondition, "etcd answers here")
		}
		if r.Bytes += uint64(len(m.Data)); m.Name != "" {
			r.Bytes = 2 << 20
		}
	}
}

func (e fakeEtcd) Defragment(context.Context, *etcdv1.DefragmentRequest) (*etcdv1.DefragmentResponse, error) {
	return &etcdv1.DefragmentResponse{BeforeBytes: 4 << 20, AfterBytes: 1 << 20}, nil
}

func (e fakeEtcd) DisarmAlarms(context.Context, *etcdv1.DisarmAlarmsRequest) (*etcdv1.DisarmAlarmsResponse, error) {
	f := e.f
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &etcdv1.DisarmAlarmsResponse{Disarmed: f.alarms}
	f.alarms = nil
	return r, nil
}
