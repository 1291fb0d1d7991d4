package wired

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// wallet is an operator's context: what it learns it keeps.
type wallet struct {
	using sync.RWMutex // held while somebody calls with what there is
	mu    sync.Mutex
	creds client.Credentials // guarded by mu
	learn int                // guarded by mu; how often
}

func (w *wallet) get() client.Credentials {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := w.creds
	c.Learn = func(authority []byte) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !strings.Contains(string(w.creds.CA), string(authority)) {
			w.creds.CA = slices.Concat(w.creds.CA, authority)
			w.learn++
		}
	}
	return c
}

// renew gets a new certificate with the same rights.
func (w *wallet) renew(ctx context.Context, n *node) {
	n.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	n.must(err)
	conn, err := client.Dial(n.address, w.get())
	n.must(err)
	defer conn.Close()
	r, err := trustv1.NewTrustClient(conn).IssueCertificate(ctx, &trustv1.IssueCertificateRequest{Csr: csr, Name: "ann", Roles: []string{"admin"}, BreakGlass: true})
	n.must(err)
	if cert, ca := n.parse(r.GetCertificate()), n.parse(r.GetCa()); !cert.NotBefore.Equal(ca.NotBefore) {
		n.t.Errorf("break-glass is valid from %s, its authority from %s", cert.NotBefore, ca.NotBefore)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	n.must(err)
	w.using.Lock() // whoever calls with the old one has done
	defer w.using.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.creds.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.GetCertificate()})
	w.creds.Key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func (n *node) parse(der []byte) *x509.Certificate {
	n.t.Helper()
	c, err := x509.ParseCertificate(der)
	n.must(err)
	return c
}

// cluster is two control planes and a worker, as on machines, and their owner.
type cluster struct {
	n1, n2, n3 *node // n2 is the worker
	stop       map[*node]func()
	owner      *wallet
}

func (c *cluster) nodes() []*node { return []*node{c.n1, c.n2, c.n3} }

func newCluster(ctx context.Context, t *testing.T) *cluster {
	shared := &store{data: map[string]*storev1.Entry{}}
	c := &cluster{n1: newNode(t), n2: newNode(t), n3: newNode(t), stop: map[*node]func(){}}
	all := doors{"10.5.0.11": c.n1, "10.5.0.12": c.n2, "10.5.0.13": c.n3}
	for _, n := range c.nodes() {
		n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
		n.serveStore(shared)
		c.stop[n] = n.startTrustd()
		n.startDoor(all)
	}
	conn, creds := c.n1.found(ctx, "n1")
	c.owner = &wallet{creds: creds}
	for _, j := range []struct {
		n          *node
		name, role string
	}{{c.n2, "n2", "worker"}, {c.n3, "n3", "controlplane"}} {
		made, err := trustv1.NewMembershipClient(conn).MakeJoinToken(ctx, &trustv1.MakeJoinTokenRequest{Role: j.role, Name: j.name})
		c.n1.must(err)
		_, err = j.n.join(ctx, j.name, made.GetToken(), c.n1.address)
		c.n1.must(err)
	}
	for _, at := range []*node{c.n1, c.n3} { // until they have heard of each other
		for _, name := range []string{"n2", "n3"} { // without etcd nobody knows an address of n1
			_, err := c.call(ctx, at, creds, name)
			for ; status.Code(err) == codes.NotFound || status.Code(err) == codes.Unavailable; _, err = c.call(ctx, at, creds, name) {
			}
			c.n1.must(err)
		}
	}
	return c
}

// call makes one call at a node with a new connection, answered by node on.
func (c *cluster) call(ctx context.Context, n *node, creds client.Credentials, on string) (*trustv1.ListCertificatesResponse, error) {
	conn, err := client.Dial(n.address, creds)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return trustv1.NewTrustClient(conn).ListCertificates(client.OnNode(ctx, on), &trustv1.ListCertificatesRequest{})
}

// start has a node's trustd begin or go on with a replacement.
func (c *cluster) rotate(ctx context.Context, f func(trustv1.AuthoritiesClient) (*trustv1.Rotation, error)) *trustv1.Rotation {
	c.n1.t.Helper()
	conn, err := client.Dial(c.n3.address, c.owner.get())
	c.n1.must(err)
	defer conn.Close()
	r, err := f(trustv1.NewAuthoritiesClient(conn))
	c.n1.must(err)
	return r
}

func (c *cluster) begin(ctx context.Context, now bool, which ...string) *trustv1.Rotation {
	c.n1.t.Helper()
	if len(which) == 0 {
		which = []string{"os"}
	}
	return c.rotate(ctx, func(a trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
		return a.StartRotation(ctx, &trustv1.StartRotationRequest{Which: which, SkipWait: now})
	})
}

// until waits for a stage that every node has confirmed.
func (c *cluster) until(ctx context.Context, stage string) *trustv1.Rotation {
	c.n1.t.Helper()
	for {
		r := c.rotate(ctx, func(a trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
			return a.GetRotation(ctx, &trustv1.GetRotationRequest{})
		})
		if r.GetStage() == stage && len(r.GetWaiting()) == 0 {
			return r
		}
		if ctx.Err() != nil {
			c.n1.t.Fatalf("stage %q never came; at last %v", stage, r)
		}
	}
}

// hammer calls every node all the time, on connections that stay and on new ones, until the function that is returned is called; that says how many calls there were, and fails for each that failed.
func (c *cluster) hammer(ctx context.Context, t *testing.T) (stop func() int64) {
	ctx, cancel := context.WithCancel(ctx)
	var wait sync.WaitGroup
	var count atomic.Int64
	check := func(what string, err error) {
		if ctx.Err() == nil && err != nil {
			t.Errorf("%s: %v", what, err)
			cancel()
		}
		count.Add(1)
	}
	for _, to := range []struct {
		n  *node
		on string
	}{{c.n1, ""}, {c.n1, "n2"}, {c.n1, "n3"}, {c.n3, "n2"}, {c.n2, ""}} {
		wait.Go(func() {
			for ctx.Err() == nil {
				c.owner.using.RLock()
				_, err := c.call(ctx, to.n, c.owner.get(), to.on)
				c.owner.using.RUnlock()
				check("new connection, answered by "+to.on, err)
			}
		})
	}
	return func() int64 { cancel(); wait.Wait(); return count.Load() }
}

func authorityLines(r *trustv1.ListCertificatesResponse, of ...string) string {
	var out []string
	if len(of) == 0 {
		of = []string{"os-ca"}
	}
	for _, c := range r.GetCertificates() {
		if c.GetPem() != "" && slices.Contains(of, c.GetProfile()) {
			out = append(out, strings.Join([]string{string(rune('0' + c.GetGeneration())), c.GetState()}, " "))
		}
	}
	return strings.Join(out, ", ")
}

// An authority is replaced while people and nodes call all the time; nobody who looks now and then notices, and who has slept meanwhile is told what to do.
func TestRotateAuthority(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c := newCluster(ctx, t)
	asleep := c.owner.get()
	asleep.Learn = nil
	stop := c.hammer(ctx, t)
	if r := c.begin(ctx, false); r.GetStage() == "" || r.GetBy() != "ann" {
		t.Errorf("begun: %v", r)
	}
	if r := c.until(ctx, "issue"); time.Until(r.GetFinish().AsTime()) < 23*time.Hour {
		t.Errorf("the old authority goes at %s, want a day from now", r.GetFinish().AsTime())
	}
	// The overlap: who knows only the old authority is still served, and hears of the new one.
	if _, err := c.call(ctx, c.n2, asleep, ""); err != nil {
		t.Errorf("with the old authority alone, during the overlap: %v", err)
	}
	for _, n := range []string{"n1", "n2", "n3"} {
		r, err := c.call(ctx, c.n1, c.owner.get(), n)
		c.n1.must(err)
		if got := authorityLines(r); got != "2 signs, 1 trusted" {
			t.Errorf("authorities of %s during the overlap: %q", n, got)
		}
	}
	c.owner.renew(ctx, c.n1)
	c.begin(ctx, true)
	c.until(ctx, "done")
	if n := stop(); n < 20 {
		t.Errorf("%d calls during the replacement, want many", n)
	}
	if c.owner.learn != 1 {
		t.Errorf("the owner learnt %d authorities, want 1", c.owner.learn)
	}
	for _, n := range []string{"n1", "n2", "n3"} {
		r, err := c.call(ctx, c.n1, c.owner.get(), n)
		c.n1.must(err)
		if got := authorityLines(r); got != "2 signs" {
			t.Errorf("authorities of %s afterwards: %q", n, got)
		}
	}
	// Certificates of the old authority are worth nothing any more, on either side.
	stale := asleep
	stale.CA = c.owner.get().CA
	for _, n := range c.nodes() {
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		if _, err := c.call(short, n, stale, ""); status.Code(err) != codes.Unauthenticated {
			t.Errorf("with a certificate of the old authority: %v", err)
		}
		cancel()
		cfg, err := client.TLS(asleep)
		n.must(err)
		cfg.NextProtos = []string{"h2"}
		if _, err := tls.Dial("tcp", n.address, cfg); !errors.Is(err, client.ErrAuthority) {
			t.Errorf("with the old authority alone: %v", err)
		}
	}
	for _, n := range c.nodes() {
		files, err := os.ReadDir(filepath.Join(n.dir, "state"))
		n.must(err)
		for _, f := range files {
			data, err := os.ReadFile(filepath.Join(n.dir, "state", f.Name()))
			n.must(err)
			if f.Name() == "rotation.json" && strings.Contains(string(data), "PRIVATE") {
				t.Errorf("%s still has keys", f.Name())
			}
		}
	}
	// Other authorities are another replacement.
	c.begin(ctx, true, "etcd", "kubernetes", "front-proxy")
	c.until(ctx, "done")
	for _, n := range []string{"n1", "n2", "n3"} {
		r, err := c.call(ctx, c.n1, c.owner.get(), n)
		c.n1.must(err)
		if got := authorityLines(r, "os-ca", "etcd-ca", "kubernetes-ca", "front-proxy-ca"); got != "2 signs, 2 signs, 2 signs, 2 signs" {
			t.Errorf("authorities of %s in the end: %q", n, got)
		}
	}
}

// Whatever is restarted while authorities are replaced, it goes on; and until the old ones are gone there is a way back.
func TestRotationGoesOnAfterRestarts(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c := newCluster(ctx, t)
	stop := c.hammer(ctx, t)
	defer stop()
	restart := func() {
		for _, n := range c.nodes() {
			c.stop[n]()
			c.stop[n] = n.startTrustd()
		}
	}
	abort := func() {
		r := c.rotate(ctx, func(a trustv1.AuthoritiesClient) (*trustv1.Rotation, error) {
			return a.AbortRotation(ctx, &trustv1.AbortRotationRequest{})
		})
		if r.GetStage() != "abort" && r.GetStage() != "aborted" {
			t.Errorf("aborted: stage %q", r.GetStage())
		}
		c.until(ctx, "aborted")
		for _, n := range []string{"n1", "n2", "n3"} {
			r, err := c.call(ctx, c.n1, c.owner.get(), n)
			for err == nil && authorityLines(r) != "1 signs" { // the last step is each node's own
				r, err = c.call(ctx, c.n1, c.owner.get(), n)
			}
			c.n1.must(err)
		}
	}
	c.begin(ctx, false)
	restart()
	abort()
	c.begin(ctx, false)
	c.until(ctx, "issue")
	restart()
	abort()
	first := c.begin(ctx, false)
	restart()
	if r := c.until(ctx, "issue"); r.GetId() != first.GetId() {
		t.Errorf("replacement %s goes on as %s", first.GetId(), r.GetId())
	}
	restart()
	c.owner.renew(ctx, c.n3)
	c.begin(ctx, true)
	restart()
	c.until(ctx, "done")
	restart()
	for _, n := range []string{"n1", "n2", "n3"} {
		r, err := c.call(ctx, c.n1, c.owner.get(), n)
		c.n1.must(err)
		if got := authorityLines(r); got != "2 signs" {
			t.Errorf("authorities of %s: %q", n, got)
		}
	}
	// What is over is over.
	conn, err := client.Dial(c.n1.address, c.owner.get())
	c.n1.must(err)
	defer conn.Close()
	_, err = trustv1.NewAuthoritiesClient(conn).AbortRotation(ctx, &trustv1.AbortRotationRequest{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "removed already") {
		t.Errorf("abort after the end: %v", err)
	}
}
