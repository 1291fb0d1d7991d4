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
	"strings"
	"sync"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
)

// ownProfile is kubeletd's own identity towards the API server: what addons/rbac.yaml grants it, and no more.
const ownProfile = "kubeletd"

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
	leaves map[string]*leaf.Leaf // by profile; ownProfile among them
	begin  chan struct{}         // closed when the authorities exist and the role is known
	once   sync.Once             // closes begin

	mu      sync.Mutex
	last    State             // guarded by mu, as all below; of the last Read
	health  map[string]string // of the probes
	etcd    bool
	version string // of the API server; "" until it was asked
	api     *cluster
	apiKey  string // digest of what api was made from
	applied map[string]string
	asked   time.Time // when applied was read
}

func newSystem(cfg Config, want func() spec) *system {
	k := &system{cfg: cfg, disk: disk{cfg.Dir, cfg.Group}, want: want, trust: leaf.NewTrust(cfg.Signer, cfg.Env.Log),
		leaves: map[string]*leaf.Leaf{}, begin: make(chan struct{}), health: map[string]string{}}
	for _, p := range append(profiles(), ownProfile) {
		c := leaf.Config{Signer: cfg.Signer, Profile: p, Trust: k.trust, Log: cfg.Env.Log}
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

// Read reads everything anew, except what the probes found last and, for a minute, the add-ons.
func (k *system) Read(ctx context.Context) (State, error) {
	want := k.want()
	roots, _ := k.trust.Roots()
	s := State{Dir: k.cfg.Dir, EtcdAddress: k.cfg.EtcdAddress, Audit: k.cfg.Audit,
		Trust: trust{Bootstrapped: roots.State.GetBootstrapped(), Kubernetes: leaf.Bundle(roots.State.GetKubernetesCa()), Etcd: leaf.Bundle(roots.State.GetEtcdCa()), FrontProxy: leaf.Bundle(roots.State.GetFrontProxyCa())},
		Pairs: map[string]string{}, Files: map[string]string{}, Units: map[string]Unit{}, Health: map[string]string{}}
	if s.Trust.Bootstrapped && want.Role != "" {
		k.once.Do(func() { close(k.begin) })
	}
	_, err := os.Stat(k.cfg.Program)
	s.Absent = errors.Is(err, fs.ErrNotExist)
	_, err = os.Stat(k.cfg.VolumeMark)
	s.Volume = err == nil
	at, err := k.where()
	if err != nil {
		return s, err
	}
	s.Address, s.Nameservers = at.address, at.nameservers
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
	h, asked := k.health["kube-apiserver"]
	s.API = asked && h == "" && s.Units["kube-apiserver"].State == "up"
	k.mu.Unlock()
	if s.API {
		k.readCluster(ctx, want, &s)
	}
	k.mu.Lock()
	k.last = s
	k.mu.Unlock()
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

// pairPEM is certificate and key in one text; nil if there is none yet.
func pairPEM(l *leaf.Leaf) ([]byte, error) {
	p, _ := l.Pair()
	if p == nil {
		return nil, nil
	}
	key, err := p.KeyPEM()
	return append(append([]byte{}, p.Certificate...), key...), err
}

// readCluster asks the API server. What it does not answer is left out and named in Trouble; the plan goes on with the rest.
func (k *system) readCluster(ctx context.Context, want spec, s *State) {
	c, err := k.cluster()
	if err != nil {
		s.API, s.Trouble = false, errs.Text(err)
		return
	}
	wanted, err := addons(want, *s)
	if err == nil {
		s.Addons, err = k.readAddons(ctx, c, wanted)
	}
	if err == nil && s.Addons["rbac"] == "" {
		return // without these rights nothing else can be read
	}
	if err == nil && want.Node != "" {
		s.Node, err = c.node(ctx, want.Node)
	}
	if err == nil {
		s.CSRs, err = c.csrs(ctx)
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

// cluster returns a client with kubeletd's own identity, made anew when certificate or authority change: a connection
// is worth no more than the certificate it was opened with.
func (k *system) cluster() (*cluster, error) {
	roots, _ := k.trust.Roots()
	pair, _ := k.leaves[ownProfile].Pair()
	if pair == nil || roots.Kubernetes == nil {
		return nil, errs.New(errs.Unavailable, "certificate %s: trustd has not signed it yet", ownProfile)
	}
	key := digest(append([]byte(roots.State.GetKubernetesCa()), pair.Certificate...))
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.apiKey != key {
		if k.api != nil {
			k.api.close()
		}
		k.api, k.apiKey = newCluster(k.cfg.APIServer, roots.Kubernetes, pair.TLS), key
	}
	return k.api, nil
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
	return newCluster(k.cfg.APIServer, roots.Kubernetes, &pair), nil
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
	case "addon apply":
		return k.apply(ctx, want, have, s.Arg)
	}
	c, err := k.cluster()
	if err != nil {
		return err
	}
	switch s.Op {
	case "csr approve":
		return c.updateCSR(ctx, s.Arg, "approval", approve(want.Node, have))
	case "csr sign":
		return c.updateCSR(ctx, s.Arg, "status", k.sign(ctx, want.Node, have))
	case "node label", "node taint", "node untaint":
		return c.patchNode(ctx, want.Node, s.Op)
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

// approve adds the condition that lets a request be signed.
func approve(node string, have State) func(CSR, map[string]any) error {
	return func(c CSR, whole map[string]any) error {
		if err := c.check(node, have.Address); err != nil {
			return errs.New(errs.Denied, "%w", err)
		}
		status, _ := whole["status"].(map[string]any)
		if status == nil {
			status = map[string]any{}
			whole["status"] = status
		}
		conditions, _ := status["conditions"].([]any)
		if !c.Approved {
			status["conditions"] = append(conditions, map[string]any{"type": "Approved", "status": "True", "reason": "KubeletdApproved",
				"message": "the request is this node's: requestor, subject, names and usages are as they must be"})
		}
		return nil
	}
}

// sign has trustd sign an approved request, which checks it once more against its own profile.
func (k *system) sign(ctx context.Context, node string, have State) func(CSR, map[string]any) error {
	return func(c CSR, whole map[string]any) error {
		if err := c.check(node, have.Address); err != nil {
			return errs.New(errs.Denied, "%w", err)
		}
		if !c.Approved {
			return reconcile.ErrSkipped
		}
		r, err := c.parse()
		if err != nil {
			return err
		}
		resp, err := k.cfg.Signer.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: signers[c.Signer], Csr: r.Raw})
		if err != nil {
			return err
		}
		status, _ := whole["status"].(map[string]any)
		if status == nil {
			return fmt.Errorf("status: it has conditions and yet is empty")
		}
		status["certificate"] = []byte(resp.GetCertificate())
		return nil
	}
}

// waiting says what is missing and who brings it.
func waiting(what string, want spec, have State) error {
	hint := "not there yet"
	switch name, _ := strings.CutPrefix(what, "certificate "); {
	case name != what:
		hint = "trustd has not signed it yet"
	case what == "bootstrap":
		hint = "the cluster has no authorities yet; run: bhctl bootstrap"
	case what == "volume VAR":
		hint = "storaged has not mounted it yet"
	case what == "address":
		hint = "no interface with a default route has an IPv4 address"
	case what == "hostname":
		hint = "the document of kind Machine names none"
	case what == "etcd":
		hint = "nobody listens on " + have.EtcdAddress
	case what == "node Ready" && have.Node == nil:
		hint = fmt.Sprintf("the kubelet has not registered %q yet", want.Node)
	case what == "node Ready":
		hint = have.Node.Reason
	default:
		if u, ok := have.Units[what]; ok {
			hint = "unit is " + u.State
			if u.LastExit != "" {
				hint += " (" + u.LastExit + ")"
			}
			if u.LastExit == ended {
				hint += "; its log says why, and bhctl service restart " + what + " tries again"
			}
			if h := have.Health[what]; h != "" {
				hint += ": " + h
			} else if what == "kube-apiserver" && have.Trouble != "" {
				hint += ": " + have.Trouble
			}
		}
	}
	return errs.New(errs.Unavailable, "%s", hint)
}
