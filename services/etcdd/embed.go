package etcdd

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Bounds of what a joining member asks others for.
const (
	peersTime    = 15 * time.Second
	promotePause = 250 * time.Millisecond
	leaderLook   = time.Second // between two looks at whether there is a leader
)

// bring starts the member, in one of three ways: as it is on the disk, as the first of a new cluster, or as a learner in one that others have.
func (m *member) bring(ctx context.Context, s Step) error {
	if e, _ := m.running(); e != nil {
		return nil
	}
	f := foundation{name: s.Name, url: s.Arg, cluster: s.Name + "=" + s.Arg}
	switch s.Op {
	case "member start":
		if err := m.alone(ctx, s.Name); err != nil {
			return err
		}
		f = m.asItIs(s.Name)
	case "member join":
		// A start that failed leaves an empty database.
		if err := dropData(m.cfg.DataDir); err != nil {
			return err
		}
		resp, err := m.ask(ctx, s.Arg)
		if err != nil {
			return err
		}
		f.join, f.cluster = true, initialCluster(resp)
	}
	return m.start(f)
}

// asItIs starts a member as it is on the disk. Where it belongs stands in its log; etcd wants to be told all the same, and takes no notice.
func (m *member) asItIs(name string) foundation {
	u := "https://" + net.JoinHostPort("127.0.0.1", m.port())
	return foundation{name: name, url: u, cluster: name + "=" + u}
}

// ask asks the other control planes for a member.
func (m *member) ask(ctx context.Context, url string) (*etcdv1.AddMemberResponse, error) {
	if m.cfg.Peers == nil {
		return nil, errs.New(errs.Unavailable, "there is no way to other nodes")
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, peer.NodeKey, peer.ControlPlanes), peersTime)
	defer cancel()
	return m.cfg.Peers.AddMember(ctx, &etcdv1.AddMemberRequest{PeerUrls: []string{url}})
}

// initialCluster writes members as etcd wants to be told them: all of them, by their addresses. Those who never started have no name, and another one could
// have ours: etcd only needs names to be different.
func initialCluster(r *etcdv1.AddMemberResponse) string {
	var out []string
	for _, x := range r.GetMembers() {
		name := "member-" + x.GetId()
		if x.GetId() == r.GetMemberId() {
			name = x.GetName()
		}
		for _, u := range x.GetPeerUrls() {
			out = append(out, name+"="+u)
		}
	}
	return strings.Join(out, ",")
}

// promote asks for a vote until the member has caught up, or for a while.
func (m *member) promote(ctx context.Context, id string) error {
	if m.cfg.Peers == nil {
		return errs.New(errs.Unavailable, "there is no way to other nodes")
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, peer.NodeKey, peer.ControlPlanes), peersTime)
	defer cancel()
	for {
		_, err := m.cfg.Peers.Promote(ctx, &etcdv1.PromoteRequest{MemberId: id})
		if !errs.Is(err, errs.Precondition) || wait(ctx, promotePause) != nil {
			return err
		}
	}
}

// update tells the cluster another address of this member.
func (m *member) update(ctx context.Context, c *clientv3.Client, url string) error {
	if _, err := c.MemberUpdate(ctx, m.id(), []string{url}); err != nil {
		return memberError("give the member another address", err)
	}
	return nil
}

// goOnLeaving is Leave after a restart.
func (m *member) goOnLeaving(ctx context.Context) error {
	done, _, err := m.reconfigure(ctx)
	if err != nil {
		return err
	}
	defer done()
	return m.leave(ctx)
}

// forget is the end of leaving.
func (m *member) forget() error {
	if e, _ := m.running(); e != nil {
		return errs.New(errs.Unavailable, "the member runs still")
	}
	if err := dropData(m.cfg.DataDir); err != nil {
		return err
	}
	_, err := m.changePhase(left, leaving, abandoning, removed, left) // not if it was ordered to come back, or to be restored, meanwhile
	return err
}

// certify asks for a certificate with an address, and the node's name.
func (m *member) certify(addr, name string) error {
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.addr, m.name = a, name
	m.mu.Unlock()
	m.leaves[peerProfile].Renew()
	return nil
}

// port is the one on which members are listened for.
func (m *member) port() string {
	_, port, err := net.SplitHostPort(m.cfg.Peer)
	if err != nil {
		return "" // New has checked it
	}
	return port
}

// foundation is how a member begins.
type foundation struct {
	name, url string
	cluster   string // all members, as etcd writes them
	join      bool   // there is a cluster already
}

// start starts the member; it does not wait for a leader. Only the loop calls it.
func (m *member) start(f foundation) error {
	streams, hangUp := context.WithCancel(context.Background())
	log := m.newZap()
	cfg, err := m.embedConfig(f, streams, log)
	if err != nil {
		hangUp()
		return err
	}
	authorities, err := os.ReadFile(filepath.Join(m.cfg.RunDir, caFile)) // nobody but this loop writes it
	if err != nil {
		hangUp()
		return err
	}
	client, err := m.dial(rootClient, log)
	if err != nil {
		hangUp()
		return err
	}
	own, err := m.dial(ownClient, log)
	if err != nil {
		hangUp()
		return errors.Join(err, client.Close())
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		hangUp()
		return errors.Join(err, client.Close(), own.Close())
	}
	m.mu.Lock()
	m.etcd, m.client, m.own, m.hangUp, m.ended, m.loaded = e, client, own, hangUp, make(chan struct{}), digest(authorities)
	m.mu.Unlock()
	m.trust.Tell()
	m.started <- e
	return nil
}

func (m *member) dial(profile string, log *zap.Logger) (*clientv3.Client, error) {
	roots, _ := m.trust.Roots()
	return clientv3.New(clientv3.Config{
		Endpoints: []string{"https://" + m.cfg.Client}, DialTimeout: callTime, Logger: log,
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots.Etcd, GetClientCertificate: m.leaves[profile].GetClientCertificate},
	})
}

// awaitEnd returns an error when etcd ends by itself: PID 1 then starts the daemon anew. One that left, or was removed, is put away instead.
func (m *member) awaitEnd(ctx context.Context, wake func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-m.started:
			if err := m.accompany(ctx, e, wake); err != nil {
				return err
			}
			if m.wasHalted(e) {
				continue
			}
			if err := m.retire(); err != nil {
				return fmt.Errorf("etcd member: %w", err)
			}
			wake()
		}
	}
}

// accompany returns nil when a member stopped by itself, or by order. It wakes when the member is ready, and when it loses or finds its leader: the
// node's health is to say so at once.
func (m *member) accompany(ctx context.Context, e *embed.Etcd, wake func()) error {
	t := time.NewTicker(leaderLook) // etcd tells of new leaders, not of there being none
	defer t.Stop()
	led := false
	for ready := e.Server.ReadyNotify(); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ready:
			m.hold.ready(e) // it has found its leader
			m.trust.Tell()
			wake()
			ready = nil
		case <-t.C:
			if now := e.Server.Leader() != 0; now != led {
				led = now
				wake()
			}
		case err := <-e.Err():
			select {
			case <-e.Server.StoppingNotify(): // those who serve only say that it stops
				return nil
			default:
			}
			if m.wasHalted(e) {
				return nil
			}
			return fmt.Errorf("etcd member: %w", err)
		case <-e.Server.StopNotify():
			return ctx.Err()
		}
	}
}

func (m *member) wasHalted(e *embed.Etcd) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.halted == e
}

// retire puts a member away that stopped by itself. etcd's server does that for one reason only: it applied its own removal, or others told it
// (etcdserver/server.go, errorc).
func (m *member) retire() error {
	m.mu.Lock()
	ended := m.ended
	m.mu.Unlock()
	p, err := m.changePhase(removed, inCluster, removed) // before its files are closed: a restart from here on knows
	if errs.Is(err, errs.Precondition) {                 // by order: that goes on
		err = nil
	}
	m.Stop()
	if err == nil && p == leaving {
		err = m.forget()
	}
	m.cfg.Env.Log.Warn("member ended: it is in the cluster no more", "step", "member "+string(p))
	close(ended)
	return err
}

// halt stops the member by order; awaitEnd takes no notice.
func (m *member) halt() error {
	m.mu.Lock()
	e, ended := m.etcd, m.ended
	m.halted = e
	m.mu.Unlock()
	if e == nil {
		return nil
	}
	m.Stop()
	close(ended)
	return nil
}

// Stop ends the member, if there is one, and returns when its files are closed.
func (m *member) Stop() {
	m.mu.Lock()
	e, client, own, hangUp := m.etcd, m.client, m.own, m.hangUp
	m.etcd, m.client, m.own = nil, nil, nil
	m.mu.Unlock()
	if e == nil {
		return
	}
	level := m.level.Level()
	m.level.SetLevel(zapcore.FatalLevel) // it calls each listener that we close an error
	defer m.level.SetLevel(level)
	client.Close()
	own.Close()
	hangUp()
	select {
	case <-e.Server.ReadyNotify():
	default:
		// Close would wait for servers that wait for a member without quorum to become ready.
		e.Server.HardStop()
	}
	e.Close()
}

func (m *member) embedConfig(f foundation, streams context.Context, log *zap.Logger) (*embed.Config, error) {
	client, members := url.URL{Scheme: "https", Host: m.cfg.Client}, url.URL{Scheme: "https", Host: m.cfg.Peer}
	advertised, err := url.Parse(f.url)
	if err != nil {
		return nil, err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = f.name, m.cfg.DataDir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	// On one port HTTP and gRPC would share Go's HTTP/2 server, which starves watches under load.
	cfg.ListenClientHttpUrls = []url.URL{{Scheme: "https", Host: m.cfg.HTTP}}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{members}, []url.URL{*advertised}
	cfg.InitialCluster = f.cluster
	// A cluster that is founded again, after all its data were lost, has another identity: members of the old one that are still there will not speak to it.
	cfg.InitialClusterToken = "bulkhead-" + rand.Text()
	if f.join {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	in := func(f string) string { return filepath.Join(m.cfg.RunDir, f) }
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = in(serverFile), in(serverFile)
	cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = in(caFile), true
	cfg.PeerTLSInfo.CertFile, cfg.PeerTLSInfo.KeyFile = in(peerFile), in(peerFile)
	cfg.PeerTLSInfo.TrustedCAFile, cfg.PeerTLSInfo.ClientCertAuth = in(caFile), true
	// A node has several addresses, and calls from any; the certificate has the one at which it is called.
	cfg.PeerTLSInfo.SkipClientSANVerify = true
	cfg.PeerTLSInfo.AllowedCNs = []string{"etcd-peer"} // users have certificates of the same authority, and raft asks for no rights
	cfg.TlsMinVersion = "TLS1.3"
	cfg.TickMs, cfg.ElectionMs = m.tick, 10*m.tick
	cfg.QuotaBackendBytes = quota
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = snapshotCount, catchUp
	cfg.EnableGRPCGateway = false // it would call in the server's name
	cfg.WarningApplyDuration, cfg.WarningUnaryRequestDuration = time.Second, 2*time.Second
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(log)
	// Watches last as long as their client; a clean stop must end them itself.
	cfg.GRPCAdditionalServerOptions = []grpc.ServerOption{grpc.ChainStreamInterceptor(
		func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			ctx, cancel := context.WithCancel(ss.Context())
			defer cancel()
			defer context.AfterFunc(streams, cancel)()
			return h(srv, &stream{ss, ctx})
		})}
	return cfg, nil
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }
