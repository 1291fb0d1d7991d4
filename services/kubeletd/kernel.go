package kubeletd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

// kubeletd's own identities towards the API server: what addons/rbac.yaml grants them, and no more.
const (
	keeperProfile = "kubeletd"      // of a control plane
	workerProfile = "kubeletd-node" // of a worker
)

// serverProfile is the only certificate whose names depend on the node's address.
const serverProfile = "kube-apiserver-server"

// adminLife is how long the certificate lives with which an add-on is applied; it is used once.
const adminLife = 10 * time.Minute

// addonLook is the longest time for which the objects of add-ons are taken to be as they were.
const addonLook = time.Minute

// system is the part of the world that kubeletd reads and changes.
type system struct {
	cfg    Config
	disk   disk
	want   func() spec
	trust  *leaf.Trust
	leaves map[string]*leaf.Leaf // by profile; kubeletd's own among them
	begin  chan struct{}         // closed when the authorities exist and the role is known
	once   sync.Once             // closes begin
	poke   chan struct{}         // one slot: the specification may have changed

	balancer *balance.Balancer
	// strangerTime is for how long a Node must have belonged to no member before it is deleted; tests have less patience.
	strangerTime time.Duration

	mu      sync.Mutex
	last    State             // guarded by mu, as all below; of the last Read
	health  map[string]string // of the probes
	etcd    bool
	version string              // of the API server; "" until it was asked
	apis    map[string]*cluster // by server
	apiKey  string              // digest of what apis were made from
	applied map[string]string
	asked   time.Time            // when applied was read
	peers   map[string]Peer      // Nodes; nil until they were listed
	strange map[string]time.Time // since when a Node has belonged to no member
	pods    podNetwork           // that networkd has taken

	unreachable []string // what networkd said of routes in pods

	begun        map[string]time.Time   // when a unit was last ordered to start
	orders       latest.Cell[time.Time] // the newest of them; wakes probes
	turn         bool                   // this node's to start units anew
	turnRevision uint64                 // of its key
	restless     bool                   // something is waited for that tells nobody when it comes: a turn, pods' and the kubelet's part of a replacement
	actsBy       string                 // the authorities by which the last Read found that this node acts; see follows
}

func newSystem(cfg Config, want func() spec) *system {
	k := &system{cfg: cfg, disk: disk{cfg.Dir, cfg.Group}, want: want, trust: leaf.NewTrust(cfg.Signer, cfg.Env.Log),
		leaves: map[string]*leaf.Leaf{}, begin: make(chan struct{}), poke: make(chan struct{}, 1),
		health: map[string]string{}, strangerTime: strangerTime, apis: map[string]*cluster{}, strange: map[string]time.Time{}, begun: map[string]time.Time{}}
	k.trust.Acts(k.follows)
	expiry := leaf.NewExpiry(cfg.Env.Metrics, "kubeletd")
	for _, p := range append(profiles(), keeperProfile, workerProfile) {
		c := leaf.Config{Signer: cfg.Signer, Profile: p, Trust: k.trust, Log: cfg.Env.Log, Expiry: expiry}
		if p == serverProfile {
			c.Request = k.serverRequest
		}
		k.leaves[p] = leaf.New(c)
	}
	return k
}

// serverRequest asks for the node's address; the other names are up to trustd.
func (k *system) serverRequest() x509.CertificateRequest {
	var r x509.CertificateRequest
	if a, err := k.where(); err == nil && a.address.IsValid() {
		r.IPAddresses = append(r.IPAddresses, a.address.AsSlice())
	}
	return r
}

// absent reports whether the image has no Kubernetes, which no boot changes.
func (k *system) absent() bool {
	_, err := os.Stat(k.cfg.Program)
	return errors.Is(err, fs.ErrNotExist)
}

// Read reads everything anew, except what the probes found last and, for a minute, the add-ons.
func (k *system) Read(ctx context.Context) (State, error) {
	want := k.want()
	select {
	case k.poke <- struct{}{}:
	default:
	}
	roots, _ := k.trust.Roots()
	s := State{Members: members(roots.State),
		Dir: k.cfg.Dir, EtcdAddress: k.cfg.EtcdAddress, Audit: k.cfg.Audit,
		Trust: trustOf(roots),
		Pairs: map[string]string{}, Files: map[string]string{}, Units: map[string]Unit{}, Health: map[string]string{}}
	if s.Trust.Bootstrapped && want.Role != "" {
		k.once.Do(func() { close(k.begin) })
	}
	s.Absent = k.absent()
	_, err := os.Stat(k.cfg.VolumeMark)
	s.Volume = err == nil
	at, err := k.where()
	if err != nil {
		return s, err
	}
	s.Address, s.Nameservers, s.Hostname = at.address, at.nameservers, at.hostname
	if err := k.readFiles(&s); err != nil {
		return s, err
	}
	units, err := k.cfg.Init.Status()
	if err != nil {
		return s, fmt.Errorf("units: %w", err)
	}
	ours := unitNames()
	for _, u := range units {
		if slices.Contains(ours, u.Name) {
			s.Units[u.Name] = Unit{State: u.State, LastExit: u.LastExit}
		}
	}
	k.mu.Lock()
	for u, h := range k.health {
		s.Health[u] = h
	}
	s.Etcd = k.etcd
	h, asked := k.health[apiProbe]
	s.API, s.Trouble = asked && h == "", h
	s.Pods, s.Peers, s.Turn = k.pods.String(), k.peers, k.turn
	if want.Role == config.ControlPlane {
		s.Strangers = k.oldStrangers(time.Now(), s.Members)
	}
	k.mu.Unlock()
	if s.API {
		k.readCluster(ctx, want, &s)
	}
	k.readKubelet(ctx, &s)
	k.settle(want, s, roots)
	return s, nil
}

func (k *system) readFiles(s *State) error {
	for p, l := range k.leaves {
		data, err := pairPEM(l)
		if err != nil {
			return err
		}
		if data != nil {
			s.Pairs[p] = digest(data)
		}
	}
	for _, e := range entries {
		have, ok, err := k.disk.read(File{Path: e.file, Group: e.group, Public: e.public})
		if err != nil {
			return err
		}
		if ok {
			s.Files[e.file] = have
		}
	}
	var err error
	s.Stamps, err = k.disk.stamps(unitNames())
	return err
}

// pairPEM is certificate, what leads from it to an older authority, and key in one text; nil if there is none yet.
func pairPEM(l *leaf.Leaf) ([]byte, error) {
	p, _ := l.Pair()
	if p == nil {
		return nil, nil
	}
	key, err := p.KeyPEM()
	out := slices.Clone(p.Certificate)
	for _, der := range p.TLS.Certificate[1:] {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return append(out, key...), err
}

// readCluster asks the API server. What it does not answer is left out and named in Trouble; the plan goes on with the rest.
func (k *system) readCluster(ctx context.Context, want spec, s *State) {
	c, err := k.cluster()
	if err != nil {
		s.API, s.Trouble = false, errs.Text(err)
		return
	}
	if want.Role != config.Worker {
		var wanted []Addon
		if wanted, err = addons(want, *s); err == nil {
			s.Addons, err = k.readAddons(ctx, c, wanted)
		}
		if err == nil && s.Addons["rbac"] == "" {
			return // without these rights nothing else can be read
		}
	}
	if err == nil && want.Node != "" {
		s.Node, err = c.node(ctx, want.Node)
	}
	if err == nil && want.Role != config.Worker {
		s.CSRs, err = c.csrs(ctx)
	}
	if err == nil && want.Role != config.Worker && s.Trust.Moving {
		s.Published, err = c.published(ctx, s.Trust.Kubernetes)
	}
	if err == nil && want.Role != config.Worker && keeper(want.Node, s.Members) {
		s.Leftover, _, err = c.leftover(ctx, s.Trust)
	}
	if err != nil {
		s.Trouble = errs.Text(err)
		s.API = !errs.Is(err, errs.Unavailable)
	}
}

func (k *system) readAddons(ctx context.Context, c *cluster, wanted []Addon) (map[string]string, error) {
	k.mu.Lock()
	known, fresh := k.applied, time.Since(k.asked) < addonLook
	k.mu.Unlock()
	if fresh && known != nil {
		return known, nil
	}
	out := map[string]string{}
	for _, a := range wanted {
		var err error
		if out[a.Name], err = c.applied(ctx, a); err != nil {
			return nil, err
		}
	}
	k.mu.Lock()
	k.applied, k.asked = out, time.Now()
	k.mu.Unlock()
	return out, nil
}

// oldStrangers are the Nodes that have belonged to no member for long. The caller holds k.mu.
func (k *system) oldStrangers(now time.Time, all map[string]Member) []string {
	var out []string
	since := map[string]time.Time{}
	for _, name := range strangers(k.peers, all) {
		t, ok := k.strange[name]
		if !ok {
			t = now
		}
		since[name] = t
		if now.Sub(t) >= k.strangerTime {
			out = append(out, name)
		}
	}
	k.strange = since
	return out
}

// cluster returns a client of the cluster's API, whichever server answers.
func (k *system) cluster() (*cluster, error) { return k.client(k.local()) }

// local is the URL of the node's balancer.
func (k *system) local() string { return "https://" + k.cfg.Env.TCP.Addr().String() }

// client returns a client of one server with kubeletd's own identity, made anew when certificate or authority change: a connection
// is worth no more than the certificate it was opened with.
func (k *system) client(server string) (*cluster, error) {
	profile := ownProfile(k.want().Role)
	roots, _ := k.trust.Roots()
	pair, _ := k.leaves[profile].Pair()
	if pair == nil || roots.Kubernetes == nil {
		return nil, errs.New(errs.Unavailable, "certificate %s: trustd has not signed it yet", profile)
	}
	key := digest(append([]byte(roots.State.GetKubernetesCa()), pair.Certificate...))
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.apiKey != key {
		for _, c := range k.apis {
			c.close()
		}
		k.apis, k.apiKey = map[string]*cluster{}, key
	}
	if k.apis[server] == nil {
		k.apis[server] = newCluster(server, roots.Kubernetes, pair.TLS)
	}
	return k.apis[server], nil
}

// admin returns a client that may do everything, for the few calls that need it. Its certificate lives for minutes.
func (k *system) admin(ctx context.Context) (*cluster, error) {
	cert, key, _, err := k.adminPair(ctx, "kubeletd", adminLife)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	roots, _ := k.trust.Roots()
	return newCluster(k.local(), roots.Kubernetes, &pair), nil
}

// adminPair makes a key and has an administrator's certificate signed for it, both PEM.
func (k *system) adminPair(ctx context.Context, user string, life time.Duration) (cert, key []byte, ca string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, "", err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: user}}, private)
	if err != nil {
		return nil, nil, "", err
	}
	resp, err := k.cfg.Signer.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "kubernetes-admin", Csr: csr, TtlSeconds: uint64(life / time.Second)})
	if err != nil {
		return nil, nil, "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, "", err
	}
	return []byte(resp.GetCertificate()), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), resp.GetCa(), nil
}

// Do carries out one step.
func (k *system) Do(ctx context.Context, s Step) error {
	k.mu.Lock()
	have := k.last
	k.mu.Unlock()
	want := k.want()
	switch s.Op {
	case "wait for":
		return waiting(s.Arg, want, have)
	case "write":
		return k.write(want, have, s.Arg)
	case "remove":
		return k.disk.remove(s.Arg)
	case "unit stop":
		return k.cfg.Init.Stop(s.Arg)
	case "unit start", "unit restart":
		return k.order(want, have, s)
	case "turn take", "turn keep":
		return k.takeTurn(ctx, want.Node)
	case "turn give":
		return k.giveTurn(ctx)
	case "addon apply":
		return k.apply(ctx, want, have, s.Arg)
	case "pods tell":
		pods, known := podNetworkOf(want, have)
		if !known {
			return reconcile.ErrSkipped
		}
		return k.setPods(ctx, pods)
	}
	c, err := k.cluster()
	if err != nil {
		return err
	}
	switch s.Op {
	case "extensions tell":
		return c.tellExtensions(ctx, have.Trust)
	case "csr approve":
		return c.updateCSR(ctx, s.Arg, "approval", approve(have.clients(want)))
	case "csr sign":
		return c.updateCSR(ctx, s.Arg, "status", k.sign(ctx, have.clients(want)))
	case "node label", "node taint", "node untaint":
		return c.patchNode(ctx, want.Node, s.Op)
	case "node delete":
		return c.deleteNode(ctx, s.Arg, have.Peers[s.Arg].UID)
	}
	return fmt.Errorf("no step %q", s.Op)
}

// content returns a file with what should be in it now.
func (k *system) content(f File) ([]byte, error) {
	if f.Profile == "" {
		return []byte(f.Text), nil
	}
	return pairPEM(k.leaves[f.Profile])
}

func (k *system) write(want spec, have State, path string) error {
	files, err := render(want, have)
	if err != nil {
		return err
	}
	for _, f := range files {
		if f.Path != path {
			continue
		}
		data, err := k.content(f)
		if err != nil || len(data) == 0 {
			return err
		}
		return k.disk.write(f, data)
	}
	return nil // it is not wanted any more
}

// order starts a unit, or starts it anew, once its files are in place. The stamp comes last: should we die in between, the unit
// is started once too often, never once too little.
func (k *system) order(want spec, have State, s Step) error {
	files, err := render(want, have)
	if err != nil {
		return err
	}
	for _, f := range files {
		if !slices.Contains(f.Units, s.Arg) {
			continue
		}
		data, err := k.content(f)
		if err != nil {
			return err
		}
		is, _, err := k.disk.read(f)
		if err != nil {
			return err
		}
		if is != seal(f, digest(data)) {
			return reconcile.ErrSkipped
		}
	}
	p := planner{want: want, have: have, files: files}
	inputs, _ := p.inputs(s.Arg)
	k.anew(s.Arg)
	if s.Op == "unit start" {
		err = k.cfg.Init.Start(s.Arg)
	} else {
		err = k.cfg.Init.Restart(s.Arg)
	}
	if err != nil {
		return err
	}
	return k.disk.setStamp(s.Arg, inputs)
}

func (k *system) apply(ctx context.Context, want spec, have State, name string) error {
	all, err := addons(want, have)
	if err != nil {
		return err
	}
	for _, a := range all {
		if a.Name != name {
			continue
		}
		c, err := k.admin(ctx)
		if err != nil {
			return err
		}
		defer c.close()
		k.mu.Lock()
		k.asked = time.Time{} // look again, also if this fails halfway
		k.mu.Unlock()
		return c.apply(ctx, a)
	}
	return fmt.Errorf("no add-on %q", name)
}
