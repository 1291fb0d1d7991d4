package trustd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// node is a machine of temporary folders.
type machine struct {
	t       testing.TB
	cfg     Config
	console *bytes.Buffer
	log     *bytes.Buffer
	answers *answers
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, console: &bytes.Buffer{}, log: &bytes.Buffer{}, answers: &answers{all: map[string]string{}}}
	m.cfg = Config{
		Runtime: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"), ClaimKey: filepath.Join(dir, "claim-key"),
		Blocks: filepath.Join(dir, "block"), Console: m.console, Locked: filepath.Join(dir, "locked"),
		Env: daemon.Env{Name: "trustd", Log: slog.New(slog.NewTextHandler(m.log, nil)), Metrics: metrics.New("trustd"), Ready: func() {}},
	}
	for _, d := range []string{m.cfg.Runtime, m.cfg.Blocks} {
		m.must(os.Mkdir(d, 0o700))
	}
	t.Cleanup(func() { m.answers.judge(t, m.cfg.StateDir) })
	return m
}

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

// start is a start of trustd, without its socket.
func (m *machine) start() *Daemon {
	m.t.Helper()
	d, err := New(m.cfg)
	m.must(err)
	m.must(d.settle())
	return d
}

func (m *machine) mountState() { m.must(os.Mkdir(m.cfg.StateDir, 0o700)) }

// reboot loses the runtime folder.
func (m *machine) reboot() {
	m.must(os.RemoveAll(m.cfg.Runtime))
	m.must(os.Mkdir(m.cfg.Runtime, 0o700))
	m.console.Reset()
}

func (m *machine) partition(name string) {
	m.must(os.MkdirAll(filepath.Join(m.cfg.Blocks, "vda5"), 0o700))
	m.must(os.WriteFile(filepath.Join(m.cfg.Blocks, "vda5", "uevent"), []byte("DEVTYPE=partition\nPARTNAME="+name+"\n"), 0o600))
}

func (m *machine) code() string {
	_, rest, ok := strings.Cut(m.console.String(), "Claim code:")
	if !ok {
		m.t.Fatalf("no code on the console:\n%s", m.console)
	}
	code, err := claim.Normalize(strings.Fields(rest)[0])
	m.must(err)
	return code
}

func request(t testing.TB, tmpl x509.CertificateRequest) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

var binding = bytes.Repeat([]byte{7}, claim.BindingSize)

func claimRequest(t testing.TB, code string) *trustv1.ClaimRequest {
	_, csr := request(t, x509.CertificateRequest{Subject: pkix.Name{CommonName: "ignored", Organization: []string{"ignored"}}})
	return &trustv1.ClaimRequest{Csr: csr, ChannelBinding: binding, Proof: claim.ClientProof(code, binding, csr)}
}

func (m *machine) claim(d *Daemon) *trustv1.ClaimResponse {
	m.t.Helper()
	resp, err := d.claim(claimRequest(m.t, m.code()))
	m.must(err)
	return resp
}

func configure(t testing.TB, d *Daemon, generation uint64, role config.Role) {
	t.Helper()
	configureAs(t, d, "n1", generation, role)
}

func configureAs(t testing.TB, d *Daemon, name string, generation uint64, role config.Role) {
	t.Helper()
	if name != "" {
		name = "hostname: " + name + "\n"
	}
	docs := "apiVersion: bulkhead.dev/v1\nkind: Machine\n" + name + "role: " + string(role) + "\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://api.example:6443\n"
	if _, err := (controlServer{d: d}).SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: generation, Documents: []byte(docs)}}); err != nil {
		t.Fatal(err)
	}
}

func TestClaim(t *testing.T) {
	m := newMachine(t)
	d := m.start()
	code := m.code()
	if again := m.start(); again.code != code {
		t.Errorf("code after a restart of trustd is %q, was %q", again.code, code)
	}
	resp := m.claim(d)
	ca, err := x509.ParseCertificate(resp.GetCa())
	m.must(err)
	cert, err := x509.ParseCertificate(resp.GetCertificate())
	m.must(err)
	m.must(cert.CheckSignatureFrom(ca))
	if got := cert.Subject.String(); got != "CN=admin,O=bulkhead:admin" {
		t.Errorf("subject %q", got)
	}
	if got := resp.GetProof(); !claim.Equal(got, claim.ServerProof(code, binding, resp.GetCa(), resp.GetCertificate())) {
		t.Error("the node's proof is wrong")
	}
	if _, err := d.claim(claimRequest(t, code)); !errs.Is(err, errs.Precondition) {
		t.Errorf("second claim: %v, want FailedPrecondition", err)
	}
	if _, err := os.Stat(filepath.Join(m.cfg.Runtime, codeFile)); !os.IsNotExist(err) {
		t.Errorf("the code is still there: %v", err)
	}
	st, err := os.Stat(filepath.Join(m.cfg.Runtime, identityFile))
	m.must(err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	d = m.start()
	if k, _ := d.keys.Get(); k.os == nil || !k.os.cert.Equal(ca) {
		t.Error("after a restart of trustd the authority is gone")
	}
	for _, secret := range []string{code, "PRIVATE"} {
		if strings.Contains(m.log.String(), secret) {
			t.Errorf("%q is in the log:\n%s", secret, m.log)
		}
	}
}

func TestClaimIsRefused(t *testing.T) {
	m := newMachine(t)
	d := m.start()
	code := m.code()
	for name, spoil := range map[string]func(*trustv1.ClaimRequest){
		"no proof":            func(r *trustv1.ClaimRequest) { r.Proof = nil },
		"wrong code":          func(r *trustv1.ClaimRequest) { r.Proof = claim.ClientProof("AAAAAAAAAAAAAAAAAAAA", binding, r.Csr) },
		"other connection":    func(r *trustv1.ClaimRequest) { r.ChannelBinding = bytes.Repeat([]byte{8}, claim.BindingSize) },
		"no binding":          func(r *trustv1.ClaimRequest) { r.ChannelBinding = nil; r.Proof = claim.ClientProof(code, nil, r.Csr) },
		"other request":       func(r *trustv1.ClaimRequest) { _, r.Csr = request(t, x509.CertificateRequest{}) },
		"garbage for request": func(r *trustv1.ClaimRequest) { r.Csr = []byte("x") },
		"the server's proof":  func(r *trustv1.ClaimRequest) { r.Proof = claim.ServerProof(code, binding, r.Csr, nil) },
	} {
		r := claimRequest(t, code)
		spoil(r)
		if _, err := d.claim(r); !errs.Is(err, errs.Unauthenticated) || errs.Text(err) != "the claim code is wrong" {
			t.Errorf("%s: %v", name, err)
		}
	}
	r := claimRequest(t, code)
	r.Name = "system:masters"
	if _, err := d.claim(r); !errs.Is(err, errs.Invalid) {
		t.Errorf("name with a colon: %v", err)
	}
	if k, _ := d.keys.Get(); k.os != nil {
		t.Error("a refused claim made an authority")
	}
	m.claim(d) // and the right one still works
}

// A wrong proof is answered after a second, four a second at most; a right one at once even then.
func TestWrongProofsAreSlow(t *testing.T) {
	m := newMachine(t)
	d := m.start()
	right := claimRequest(t, m.code())
	wrong := make([]*trustv1.ClaimRequest, 9)
	for i := range wrong {
		wrong[i] = claimRequest(t, "AAAAAAAAAAAAAAAAAAAA")
	}
	synctest.Test(t, func(t *testing.T) {
		d.slow = make(chan struct{}, wrongProofs)
		start := time.Now()
		var answered atomic.Int32
		for _, r := range wrong {
			go func() {
				if _, err := (claimServer{d: d}).Claim(context.Background(), r); !errs.Is(err, errs.Unauthenticated) {
					t.Errorf("got %v", err)
				}
				answered.Add(1)
			}()
		}
		for second, want := range []int32{0, 4, 8, 9} {
			time.Sleep(time.Until(start.Add(time.Duration(second)*time.Second + time.Millisecond)))
			synctest.Wait()
			if got := answered.Load(); got != want {
				t.Errorf("after %d s: %d answered, want %d", second, got, want)
			}
			if second == 0 {
				if _, err := (claimServer{d: d}).Claim(context.Background(), right); err != nil {
					t.Errorf("the right proof: %v", err)
				}
			}
		}
	})
}

func TestClaimKeyFromOutside(t *testing.T) {
	m := newMachine(t)
	m.must(os.WriteFile(m.cfg.ClaimKey, []byte("a-key-from-fw_cfg-0123456789\n"), 0o400))
	d := m.start()
	if strings.Contains(m.console.String(), "Claim code") || !strings.Contains(m.console.String(), "no code is shown") {
		t.Errorf("console:\n%s", m.console)
	}
	key, err := claim.Normalize("A-KEY-from-fw_cfg-0123456789")
	m.must(err)
	_, err = d.claim(claimRequest(t, key))
	m.must(err)

	m = newMachine(t)
	m.must(os.WriteFile(m.cfg.ClaimKey, []byte("short"), 0o400))
	d, err = New(m.cfg)
	m.must(err)
	if err := d.settle(); err == nil || !strings.Contains(err.Error(), "5 characters") {
		t.Errorf("a short key: %v", err)
	}
}

// What is where, and what becomes of it; every row is also what a power cut can leave.
func TestSettle(t *testing.T) {
	t.Run("state comes after the claim", func(t *testing.T) {
		m := newMachine(t)
		d := m.start()
		ca := m.claim(d).GetCa()
		m.mountState()
		m.must(d.settle())
		if _, err := os.Stat(filepath.Join(m.cfg.Runtime, identityFile)); !os.IsNotExist(err) {
			t.Errorf("runtime folder still has it: %v", err)
		}
		if !d.settled() {
			t.Error("not settled")
		}
		m.reboot()
		d = m.start()
		if k, _ := d.keys.Get(); k.os == nil || !bytes.Equal(k.os.cert.Raw, ca) {
			t.Error("the authority did not survive the reboot")
		}
		if m.console.Len() > 0 {
			t.Errorf("console of an owned node:\n%s", m.console)
		}
	})
	t.Run("power lost before state exists", func(t *testing.T) {
		m := newMachine(t)
		m.claim(m.start())
		m.reboot()
		d := m.start()
		m.code()
		if k, _ := d.keys.Get(); k.os != nil {
			t.Error("still owned")
		}
	})
	t.Run("power lost between writing and wiping", func(t *testing.T) {
		m := newMachine(t)
		m.claim(m.start())
		m.mountState()
		data, err := os.ReadFile(filepath.Join(m.cfg.Runtime, identityFile))
		m.must(err)
		m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, identityFile), data, 0o600))
		m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, ".identity.json.new"), []byte("half"), 0o600))
		if d := m.start(); !d.settled() || strings.Contains(m.log.String(), "dropped") {
			t.Errorf("log:\n%s", m.log)
		}
	})
	t.Run("state is coming", func(t *testing.T) {
		m := newMachine(t)
		m.partition("STATE")
		now := time.Now()
		m.cfg.Now = func() time.Time { return now }
		d := m.start()
		if m.console.Len() > 0 {
			t.Errorf("offered though the owner is not known:\n%s", m.console)
		}
		if _, err := d.claim(claimRequest(t, "AAAAAAAAAAAAAAAAAAAA")); !errs.Is(err, errs.Unavailable) {
			t.Errorf("claim meanwhile: %v, want Unavailable", err)
		}
		if tr, _ := d.trust.Get(); tr != nil {
			t.Error("said something about trust before it knows")
		}
		now = now.Add(stateWait + time.Second) // it was another system's
		m.must(d.settle())
		m.claim(d)
	})
	t.Run("state with an owner comes late", func(t *testing.T) {
		m := newMachine(t)
		owner := m.claim(m.start()).GetCa()
		m.mountState()
		m.start()
		away := m.cfg.StateDir + ".away"
		m.must(os.Rename(m.cfg.StateDir, away))
		m.reboot()
		d := m.start()
		thief := m.claim(d).GetCa()
		m.must(os.Rename(away, m.cfg.StateDir))
		m.must(d.settle())
		k, _ := d.keys.Get()
		if !bytes.Equal(k.os.cert.Raw, owner) || bytes.Equal(k.os.cert.Raw, thief) {
			t.Error("the owner's keys did not win")
		}
		if tr, _ := d.trust.Get(); tr.GetOsCa() != string(pemCert(owner)) {
			t.Error("others are told to trust the wrong authority")
		}
	})
	t.Run("owner's file lost, cluster's there", func(t *testing.T) {
		m := newMachine(t)
		m.mountState()
		m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, clusterFile), []byte("{}"), 0o600))
		d, err := New(m.cfg)
		m.must(err)
		if err := d.settle(); err == nil || !strings.Contains(err.Error(), "is missing") || m.console.Len() > 0 {
			t.Errorf("%v, console %q; want an error, and no offer of the cluster to whoever comes", err, m.console)
		}
	})
	t.Run("broken file", func(t *testing.T) {
		m := newMachine(t)
		m.mountState()
		m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, identityFile), []byte("{}"), 0o600))
		d, err := New(m.cfg)
		m.must(err)
		if err := d.settle(); err == nil || !strings.Contains(err.Error(), "version is 0") {
			t.Errorf("got %v", err)
		}
		if m.console.Len() > 0 {
			t.Error("a node whose keys cannot be read must not look as if nobody owned it")
		}
	})
}

func TestBootstrap(t *testing.T) {
	m := newMachine(t)
	d := m.start()
	refused := func(want string) {
		t.Helper()
		if _, err := d.bootstrap(); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want FailedPrecondition with %q", err, want)
		}
	}
	refused("claim it first")
	m.claim(d)
	refused("no configuration")
	configure(t, d, 1, config.Worker)
	refused("worker")
	configure(t, d, 2, config.ControlPlane)
	refused("STATE")
	m.mountState()
	m.must(d.settle())

	m.must(os.Mkdir(filepath.Join(m.cfg.StateDir, "."+clusterFile+".new"), 0o700)) // the disk says no
	if _, err := d.bootstrap(); err == nil {
		t.Fatal("written into a folder")
	}
	if k, _ := d.keys.Get(); k.cluster != nil {
		t.Error("keys that are not on the disk are used")
	}
	m.must(os.RemoveAll(filepath.Join(m.cfg.StateDir, "."+clusterFile+".new")))

	already, err := d.bootstrap()
	m.must(err)
	if already {
		t.Error("already, says the first time")
	}
	first, _ := d.trust.Get()
	if already, err = d.bootstrap(); err != nil || !already {
		t.Errorf("second time: %v, %v", already, err)
	}
	if second, _ := d.trust.Get(); second != first {
		t.Error("the second time changed something")
	}
	m.reboot()
	d = m.start()
	k, _ := d.keys.Get()
	if k.cluster == nil || string(k.cluster.etcd.pem) != first.GetEtcdCa() {
		t.Error("lost in a reboot")
	}
}

func TestState(t *testing.T) {
	m := newMachine(t)
	d := m.start()
	state := func() string {
		s, _ := d.state.Get()
		return strings.Join(append(s.GetPending(), map[bool]string{true: "converged"}[s.GetConverged()], s.GetError()), "|")
	}
	if got := state(); got != "keys wait for /state/trustd to be mounted||" {
		t.Errorf("at first %q", got)
	}
	m.claim(d)
	configure(t, d, 4, config.ControlPlane)
	if got := state(); got != "keys move to /state/trustd when it is mounted||" {
		t.Errorf("claimed %q", got)
	}
	m.mountState()
	m.must(d.settle())
	if got := state(); got != "converged|" {
		t.Errorf("on STATE %q", got)
	}
	if _, err := (controlServer{d: d}).SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 3}}); !errs.Is(err, errs.Conflict) {
		t.Errorf("older generation: %v", err)
	}
	resp, err := (controlServer{d: d}).PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: &controlv1.Spec{Generation: 5,
		Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n2\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://api.example:6443\n")}})
	m.must(err)
	if got := strings.Join(resp.GetSteps(), "\n"); got != "certificate name add n2\ncertificate name delete n1" {
		t.Errorf("plan:\n%s", got)
	}
}

// serve runs the whole daemon on its socket; the returned function connects as a user of the node.
func (m *machine) serve() (*Daemon, func(uid.ID) *grpc.ClientConn) {
	m.t.Helper()
	path := filepath.Join(m.t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	m.must(err)
	var as atomic.Uint32
	m.cfg.Env.Listen = l
	m.cfg.Env.Who = func(net.Conn) (uid.ID, error) { return uid.ID(as.Load()), nil }
	d, err := New(m.cfg)
	m.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	m.t.Cleanup(func() { cancel(); <-done })
	return d, func(id uid.ID) *grpc.ClientConn {
		as.Store(uint32(id))
		c, err := peer.Dial(path, grpc.WithStatsHandler(m.answers))
		m.must(err)
		c.Connect()
		for s := c.GetState(); s.String() != "READY"; s = c.GetState() { // the user is read when the connection is made
			if s.String() == "TRANSIENT_FAILURE" || !c.WaitForStateChange(m.t.Context(), s) {
				break
			}
		}
		m.t.Cleanup(func() { c.Close() })
		return c
	}
}

// grpcAs connects as users of the node.
type grpcAs struct{ as func(uid.ID) *grpc.ClientConn }

func (g *grpcAs) conn(id uid.ID) *grpc.ClientConn { return g.as(id) }
