package etcdd

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
)

// Settings for machines that are slow or busy: an election within a second is lost under software emulation.
const (
	tickMs = 200     // and ten times as much for an election
	quota  = 2 << 30 // bytes; beyond it etcd takes only deletes
	// Entries between two of raft's own snapshots. Less means a shorter log in memory.
	snapshotCount = 5000
	catchUp       = 2500
	callTime      = 10 * time.Second
	volumeLook    = 250 * time.Millisecond // between two looks for the volume, while there is none
	addressLook   = 5 * time.Second        // between two looks at the node's addresses
)

// member is the part of the world that etcdd reads and changes: an etcd server in this process, and a few files.
type member struct {
	cfg    Config
	trust  *leaf.Trust
	leaves map[string]*leaf.Leaf // by profile

	mu      sync.Mutex
	etcd    *embed.Etcd      // guarded by mu; nil until started, and after it left
	client  *clientv3.Client // guarded by mu; root, over TLS like every other client; nil like etcd
	own     *clientv3.Client // guarded by mu; user bulkhead, for the store and the registry; nil like etcd
	hangUp  func()           // guarded by mu; ends all streams
	ended   chan struct{}    // guarded by mu; closed when this etcd has left and its files are closed
	halted  *embed.Etcd      // guarded by mu; the one that was stopped by order
	trouble error            // guarded by mu; why the member did not answer last, nil if it did
	loaded  string           // guarded by mu; digest of the authorities that this etcd was started with
	turn    clientv3.LeaseID // guarded by mu; under which this one starts anew; 0: it does not
	addr    netip.Addr       // guarded by mu; that the certificate for members must have; invalid: none

	hold  hold  // for calls while the member restarts on purpose
	slots slots // for writes

	moved   chan struct{}    // gets something at each step of the member
	swept   atomic.Bool      // the volume is there, without the rest of an interrupted restore
	name    string           // guarded by mu; of the node, "" until it is known
	started chan *embed.Etcd // the one that runs now, for awaitEnd
	changes chan struct{}    // one slot, for who changes the membership
	phases  sync.Mutex       // held while the phase is changed
	level   zap.AtomicLevel  // of etcd's log
	wait    time.Duration    // for an answer of the member; tests that break it have less patience
	tick    uint             // milliseconds between two heartbeats; the same
}

func newMember(cfg Config) *member {
	m := &member{cfg: cfg, trust: leaf.NewTrust(cfg.Signer, cfg.Env.Log), leaves: map[string]*leaf.Leaf{},
		started: make(chan *embed.Etcd, 1), changes: make(chan struct{}, 1), moved: make(chan struct{}, 1), level: zap.NewAtomicLevelAt(zapcore.WarnLevel), wait: callTime, tick: tickMs,
		slots: newSlots()}
	expiry := leaf.NewExpiry(cfg.Env.Metrics, "etcdd")
	for _, f := range files {
		if f.profile != "" {
			m.leaves[f.profile] = leaf.New(leaf.Config{Signer: cfg.Signer, Profile: f.profile, Trust: m.trust, Log: cfg.Env.Log, Expiry: expiry, Request: m.request})
		}
	}
	m.trust.Acts(m.acts)
	for _, profile := range clients {
		m.leaves[profile] = leaf.New(leaf.Config{Signer: cfg.Signer, Profile: profile, Trust: m.trust, Log: cfg.Env.Log, Expiry: expiry})
	}
	return m
}

// request asks for the addresses that are listened on, and the one that is advertised.
func (m *member) request() x509.CertificateRequest {
	r := x509.CertificateRequest{DNSNames: []string{"localhost"}}
	seen := map[string]bool{}
	m.mu.Lock()
	if m.name != "" {
		r.DNSNames = append(r.DNSNames, m.name)
	}
	if m.addr.IsValid() {
		seen[m.addr.String()] = true
		r.IPAddresses = append(r.IPAddresses, m.addr.AsSlice())
	}
	m.mu.Unlock()
	for _, a := range []string{m.cfg.Client, m.cfg.HTTP} {
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
	g.Go(func() error { return m.awaitAddress(ctx, wake) })
	g.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-m.moved:
				wake()
			}
		}
	})
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
	if err := sweep(m.cfg.DataDir); err != nil {
		m.cfg.Env.Log.Warn("rest of a restore not deleted", "err", err.Error())
	}
	m.swept.Store(true)
	wake()
	return nil
}

// Read reads everything anew.
func (m *member) Read(ctx context.Context) (State, error) {
	roots, _ := m.trust.Roots()
	s := State{
		Bootstrapped: roots.State.GetBootstrapped() && roots.State.GetEtcdCa() != "",
		Volume:       isDir(m.cfg.DataDir),
		Want:         map[string]string{}, Have: map[string]string{}, Nodes: map[string]place{}, Port: m.port(),
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
	for _, profile := range clients {
		if p, _ := m.leaves[profile].Pair(); p != nil {
			s.Want[profile] = digest(p.Certificate)
		}
	}
	if err := m.readPlace(&s, roots.State); err != nil {
		return s, err
	}
	return s, m.readMember(ctx, &s)
}

// readMember adds what the member says of itself.
func (m *member) readMember(ctx context.Context, s *State) error {
	e, client := m.running()
	if e == nil {
		return nil
	}
	m.mu.Lock()
	s.Loaded, s.Turn, s.Held = m.loaded, m.turn != 0, m.hold.held()
	m.mu.Unlock()
	s.Running, s.ID = true, hexID(uint64(e.Server.MemberID()))
	own := e.Server.Cluster().Member(e.Server.MemberID())
	if own != nil {
		s.Listed, s.Learner = own.PeerURLs, own.IsLearner
	}
	select {
	case <-e.Server.ReadyNotify():
	default:
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	var ask sync.WaitGroup
	m.mu.Lock()
	if m.trouble != nil { // it was in trouble at the last look: who of the others is there is asked meanwhile
		ask.Go(func() { s.Voters, s.Silent = m.silent(ctx, e) })
	}
	m.mu.Unlock()
	// A member that does not answer is a finding and no failure to read: the cause may be a file that the plan repairs.
	var err error
	if !s.Learner {
		err = m.repeat(ctx, func(ctx context.Context, _ lent) (err error) { s.Auth, err = readAuth(ctx, client); return err })
		s.Ready = err == nil
	}
	if err == nil {
		s.Member, err = readFigures(ctx, client, e)
		s.Ready = s.Ready && err == nil
	}
	ask.Wait()
	if !s.Ready {
		s.Auth = auth{}
	} else {
		s.Voters, s.Silent = 0, nil
	}
	m.mu.Lock()
	m.trouble = err
	m.mu.Unlock()
	return nil
}

// readPlace adds what is known of this node and of others.
func (m *member) readPlace(s *State, trust *trustv1.TrustState) error {
	for _, n := range trust.GetNodes() {
		s.Nodes[n.GetName()] = place{ControlPlane: n.GetRole() == "controlplane", Seen: nodeaddr.Parse(n.GetAddresses())}
	}
	if p, _ := m.leaves[peerProfile].Pair(); p != nil {
		for _, ip := range p.TLS.Leaf.IPAddresses {
			if a, ok := netip.AddrFromSlice(ip); ok {
				s.Certified = append(s.Certified, a.Unmap())
			}
		}
	}
	var err error
	if s.Own, err = m.cfg.Addresses(); err != nil {
		return fmt.Errorf("addresses of the node: %w", err)
	}
	if !s.Volume {
		return nil
	}
	if s.Phase, err = readPhase(m.cfg.DataDir); err != nil {
		return err
	}
	s.Data, err = hasData(m.cfg.DataDir)
	return err
}

// awaitAddress wakes when the node's addresses change.
func (m *member) awaitAddress(ctx context.Context, wake func()) error {
	t := time.NewTicker(addressLook)
	defer t.Stop()
	var was []netip.Prefix
	for {
		now, err := m.cfg.Addresses()
		if err == nil && !slices.Equal(was, now) {
			was = now
			wake()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// store returns the member and the client of the store and the registry, or why nothing can be read there now. Who calls it waits for no restart: see use.
func (m *member) store() (*embed.Etcd, *clientv3.Client, error) {
	m.mu.Lock()
	e, c := m.etcd, m.own
	m.mu.Unlock()
	if e == nil {
		return nil, nil, errs.New(errs.Unavailable, "store: this node has no etcd member that runs")
	}
	select {
	case <-e.Server.ReadyNotify():
	default:
		return nil, nil, errs.New(errs.Unavailable, "store: the etcd member is starting")
	}
	if isLearner(e) {
		return nil, nil, errs.New(errs.Unavailable, "store: the etcd member of this node is only joining")
	}
	return e, c, nil
}

func isLearner(e *embed.Etcd) bool {
	own := e.Server.Cluster().Member(e.Server.MemberID())
	return own != nil && own.IsLearner
}

// content returns what a file should hold; nothing if it is not known yet.
func (m *member) content(name string) ([]byte, error) {
	for _, f := range files {
		if f.name != name {
			continue
		}
		if f.profile == "" {
			roots, _ := m.trust.Roots()
			return []byte(leaf.Bundle(roots.State.GetEtcdCa())), nil
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

// Do carries out one step. Steps of the member follow one another: each has the loop look again, before its pause is over.
func (m *member) Do(ctx context.Context, s Step) error {
	err := m.do(ctx, s)
	if err == nil && strings.HasPrefix(s.Op, "member ") {
		m.move()
	}
	return err
}

// move has the loop look again.
func (m *member) move() {
	select {
	case m.moved <- struct{}{}:
	default:
	}
}

func (m *member) do(ctx context.Context, s Step) error {
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
	case "certify":
		return m.certify(s.Name, s.Arg)
	case "member start", "member found", "member join":
		return m.bring(ctx, s)
	case "member promote":
		return m.promote(ctx, s.Name)
	case "member forget":
		return m.forget()
	case "member stop":
		return m.halt()
	case "member reload":
		return m.reload(ctx, s.Name)
	case "member restore":
		return m.restore(s.Name, s.Arg)
	}
	_, client := m.running()
	if client == nil {
		return errs.New(errs.Unavailable, "the member does not run")
	}
	switch s.Op {
	case "member leave":
		return m.goOnLeaving(ctx)
	case "member update":
		return m.update(ctx, client, s.Name)
	}
	ctx, cancel := context.WithTimeout(ctx, m.wait)
	defer cancel()
	if s.Op == "member reloaded" {
		return m.reloaded(ctx)
	}
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
	case "address":
		hint = "the node has no address at which other control planes have seen it"
	case "order to rejoin, since it left":
		hint = "this node's member left the cluster by order; to let it come back, run: bhctl etcd rejoin"
	case "order to rejoin, since it was removed":
		hint = "this node's member was removed from the cluster by order at another one; its data are void. To let it come back with empty data, run: bhctl etcd rejoin"
	}
	return errs.New(errs.Unavailable, "%s", hint)
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
