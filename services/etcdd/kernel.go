package etcdd

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// Settings for machines that are slow or busy: an election within a second is lost under software emulation.
const (
	tickMs     = 200
	electionMs = 2000
	quota      = 2 << 30 // bytes; beyond it etcd takes only deletes
	// Entries between two of raft's own snapshots. Less means a shorter log in memory.
	snapshotCount = 5000
	catchUp       = 2500
	callTime      = 10 * time.Second
	volumeLook    = 250 * time.Millisecond // between two looks for the volume, while there is none
)

// member is the part of the world that etcdd reads and changes: an etcd server in this process, and a few files.
type member struct {
	cfg    Config
	trust  *leaf.Trust
	leaves map[string]*leaf.Leaf // by profile

	mu      sync.Mutex
	etcd    *embed.Etcd      // guarded by mu; nil until started
	client  *clientv3.Client // guarded by mu; root, over TLS like every other client; nil until started
	hangUp  func()           // guarded by mu; ends all streams
	trouble error            // guarded by mu; why the member did not answer last, nil if it did
	started chan struct{}    // closed when etcd is set
	level   zap.AtomicLevel  // of etcd's log
	wait    time.Duration    // for an answer of the member; tests that break it have less patience
}

func newMember(cfg Config) *member {
	m := &member{cfg: cfg, trust: leaf.NewTrust(cfg.Signer, cfg.Env.Log), leaves: map[string]*leaf.Leaf{},
		started: make(chan struct{}), level: zap.NewAtomicLevelAt(zapcore.WarnLevel), wait: callTime}
	for _, f := range files {
		if f.profile != "" {
			m.leaves[f.profile] = leaf.New(leaf.Config{Signer: cfg.Signer, Profile: f.profile, Trust: m.trust, Log: cfg.Env.Log, Request: m.request})
		}
	}
	m.leaves[rootClient] = leaf.New(leaf.Config{Signer: cfg.Signer, Profile: rootClient, Trust: m.trust, Log: cfg.Env.Log})
	return m
}

// request asks for the addresses that are listened on.
func (m *member) request() x509.CertificateRequest {
	r := x509.CertificateRequest{DNSNames: []string{"localhost"}}
	seen := map[string]bool{}
	for _, a := range []string{m.cfg.Client, m.cfg.Peer, m.cfg.HTTP} {
		host, _, err := net.SplitHostPort(a)
		if ip := net.ParseIP(host); err == nil && ip != nil && !seen[host] {
			seen[host] = true
			r.IPAddresses = append(r.IPAddresses, ip)
		}
	}
	return r
}

// Watch keeps certificates fresh and wakes the loop; it returns an error when the member has failed.
func (m *member) Watch(ctx context.Context, wake func()) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return m.trust.Run(ctx) })
	for _, l := range m.leaves {
		g.Go(func() error { return l.Run(ctx) })
		g.Go(func() error { return follow(ctx, wake, func() <-chan struct{} { _, c := l.Pair(); return c }) })
	}
	g.Go(func() error { return follow(ctx, wake, func() <-chan struct{} { _, c := m.trust.Roots(); return c }) })
	g.Go(func() error { return m.awaitVolume(ctx, wake) })
	g.Go(func() error { return m.awaitEnd(ctx, wake) })
	g.Go(func() error { return m.compact(ctx) })
	return g.Wait()
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

func (m *member) awaitVolume(ctx context.Context, wake func()) error {
	t := time.NewTicker(volumeLook)
	defer t.Stop()
	for !isDir(m.cfg.DataDir) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	wake()
	return nil
}

// awaitEnd returns an error when etcd ends by itself: PID 1 then starts the daemon anew.
func (m *member) awaitEnd(ctx context.Context, wake func()) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-m.started:
	}
	m.mu.Lock()
	e := m.etcd
	m.mu.Unlock()
	for ready := e.Server.ReadyNotify(); ; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ready:
			wake()
			ready = nil
		case err := <-e.Err():
			return fmt.Errorf("etcd member: %w", err)
		case <-e.Server.StopNotify():
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return errors.New("etcd member: stopped by itself")
		}
	}
}

// Read reads everything anew.
func (m *member) Read(ctx context.Context) (State, error) {
	roots, _ := m.trust.Roots()
	s := State{
		Bootstrapped: roots.State.GetBootstrapped() && roots.State.GetEtcdCa() != "",
		Volume:       isDir(m.cfg.DataDir),
		Want:         map[string]string{}, Have: map[string]string{},
	}
	for _, f := range files {
		want, err := m.content(f.name)
		if err != nil {
			return s, err
		}
		s.Want[f.name] = digest(want)
		have, err := os.ReadFile(filepath.Join(m.cfg.RunDir, f.name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return s, err
		}
		s.Have[f.name] = digest(have)
	}
	if p, _ := m.leaves[rootClient].Pair(); p != nil {
		s.Want[rootClient] = digest(p.Certificate)
	}
	e, client := m.running()
	if e == nil {
		return s, nil
	}
	s.Running = true
	select {
	case <-e.Server.ReadyNotify():
	default:
		return s, nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	// A member that does not answer is a finding and no failure to read: the cause may be a file that the plan repairs.
	have, err := readAuth(ctx, client)
	if err == nil {
		s.Member, err = readFigures(ctx, client, e)
	}
	if err == nil {
		s.Auth, s.Ready = have, true
	}
	m.mu.Lock()
	m.trouble = err
	m.mu.Unlock()
	return s, nil
}

// content returns what a file should hold; nothing if it is not known yet.
func (m *member) content(name string) ([]byte, error) {
	for _, f := range files {
		if f.name != name {
			continue
		}
		if f.profile == "" {
			roots, _ := m.trust.Roots()
			return []byte(roots.State.GetEtcdCa()), nil
		}
		p, _ := m.leaves[f.profile].Pair()
		if p == nil {
			return nil, nil
		}
		key, err := p.KeyPEM()
		return append(append([]byte{}, p.Certificate...), key...), err
	}
	return nil, fmt.Errorf("no file %q", name)
}

func (m *member) running() (*embed.Etcd, *clientv3.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.etcd, m.client
}

// Do carries out one step.
func (m *member) Do(ctx context.Context, s Step) error {
	switch s.Op {
	case "wait for":
		m.mu.Lock()
		defer m.mu.Unlock()
		return waiting(s.Name, m.trouble)
	case "write":
		data, err := m.content(s.Name)
		if err != nil {
			return err
		}
		return writeFile(filepath.Join(m.cfg.RunDir, s.Name), data)
	case "member start":
		return m.start(s.Name)
	}
	_, client := m.running()
	if client == nil {
		return errs.New(errs.Unavailable, "the member does not run")
	}
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	return doAuth(ctx, client, s)
}

// waiting says what is missing and who brings it.
func waiting(what string, trouble error) error {
	hint := "not there yet"
	switch what {
	case "member":
		if hint = "it has no leader yet"; trouble != nil {
			hint = errs.Text(trouble)
		}
	case "bootstrap":
		hint = "the cluster has no authorities yet; run: bhctl bootstrap"
	case "volume VAR":
		hint = "storaged has not mounted it yet"
	}
	return errs.New(errs.Unavailable, "%s", hint)
}

// start starts the member; it does not wait for a leader.
func (m *member) start(name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.etcd != nil {
		return nil
	}
	streams, hangUp := context.WithCancel(context.Background())
	log := m.newZap()
	cfg := m.embedConfig(name, streams, log)
	roots, _ := m.trust.Roots()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"https://" + m.cfg.Client}, DialTimeout: callTime, Logger: log,
		TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots.Etcd, GetClientCertificate: m.leaves[rootClient].GetClientCertificate},
	})
	if err != nil {
		hangUp()
		return err
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		hangUp()
		return errors.Join(err, client.Close())
	}
	m.etcd, m.client, m.hangUp = e, client, hangUp
	close(m.started)
	return nil
}

func (m *member) embedConfig(name string, streams context.Context, log *zap.Logger) *embed.Config {
	client, peer := url.URL{Scheme: "https", Host: m.cfg.Client}, url.URL{Scheme: "https", Host: m.cfg.Peer}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = name, m.cfg.DataDir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	// On one port HTTP and gRPC would share Go's HTTP/2 server, which starves watches under load.
	cfg.ListenClientHttpUrls = []url.URL{{Scheme: "https", Host: m.cfg.HTTP}}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(name)
	cfg.InitialClusterToken = "bulkhead"
	in := func(f string) string { return filepath.Join(m.cfg.RunDir, f) }
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = in(serverFile), in(serverFile)
	cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = in(caFile), true
	cfg.PeerTLSInfo.CertFile, cfg.PeerTLSInfo.KeyFile = in(peerFile), in(peerFile)
	cfg.PeerTLSInfo.TrustedCAFile, cfg.PeerTLSInfo.ClientCertAuth = in(caFile), true
	cfg.PeerTLSInfo.AllowedCNs = []string{"etcd-peer"} // users have certificates of the same authority, and raft asks for no rights
	cfg.TlsMinVersion = "TLS1.3"
	cfg.TickMs, cfg.ElectionMs = tickMs, electionMs
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
	return cfg
}

type stream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *stream) Context() context.Context { return s.ctx }

// Stop ends the member, if there is one, and returns when its files are closed.
func (m *member) Stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.etcd == nil {
		return
	}
	m.level.SetLevel(zapcore.FatalLevel) // it calls each listener that we close an error
	m.client.Close()
	m.hangUp()
	m.etcd.Close()
}

// newZap writes etcd's warnings like our own log's lines.
func (m *member) newZap() *zap.Logger {
	enc := zap.NewProductionEncoderConfig()
	enc.TimeKey = "" // PID 1 adds the time
	enc.EncodeLevel = zapcore.CapitalLevelEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(enc), zapcore.Lock(os.Stderr), m.level)).With(zap.String("daemon", "etcdd"))
}

// writeFile replaces a file whole; a reader sees the old or the new one.
func writeFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

func digest(data []byte) string {
	if len(data) == 0 {
		return ""
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}
