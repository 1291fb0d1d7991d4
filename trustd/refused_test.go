package trustd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// joinDirect is a joiner's call at a control plane, as apid passes it on.
func joinDirect(t *testing.T, token, name string) *trustv1.JoinRequest {
	t.Helper()
	id, secret, err := join.Parse(token)
	if err != nil {
		t.Fatal(err)
	}
	seal, err := join.NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	_, csr := request(t, x509.CertificateRequest{})
	r := &trustv1.JoinRequest{TokenId: id, Name: name, Csr: csr, SealKey: seal.PublicKey().Bytes(), ChannelBinding: binding, RemoteAddress: "10.5.0.9"}
	prove(r, secret)
	return r
}

func prove(r *trustv1.JoinRequest, secret []byte) {
	r.Proof = join.NodeProof(secret, r.GetChannelBinding(), r.GetName(), r.GetCsr(), r.GetSealKey())
}

// Whatever is changed in a join on its way makes it void, and nobody learns why.
func TestForgedJoin(t *testing.T) {
	n1 := newLab(t).box("n1", "1").found()
	token := n1.token("worker", "")
	c := trustv1.NewJoinClient(n1.conn[uid.Apid])
	other, _ := join.NewSealKey()
	_, csr := request(t, x509.CertificateRequest{})
	var wait sync.WaitGroup
	start, count := time.Now(), 0
	for name, spoil := range map[string]func(*trustv1.JoinRequest){
		"id":                 func(r *trustv1.JoinRequest) { r.TokenId = "0000000000" },
		"no id":              func(r *trustv1.JoinRequest) { r.TokenId = "" },
		"name":               func(r *trustv1.JoinRequest) { r.Name = "n8" },
		"key":                func(r *trustv1.JoinRequest) { r.Csr = csr },
		"seal key":           func(r *trustv1.JoinRequest) { r.SealKey = other.PublicKey().Bytes() },
		"short seal key":     func(r *trustv1.JoinRequest) { r.SealKey = r.SealKey[1:] },
		"proof":              func(r *trustv1.JoinRequest) { r.Proof[3] ^= 1 },
		"no proof":           func(r *trustv1.JoinRequest) { r.Proof = nil },
		"another connection": func(r *trustv1.JoinRequest) { r.ChannelBinding = make([]byte, join.BindingSize) },
		"no connection":      func(r *trustv1.JoinRequest) { r.ChannelBinding = nil; prove(r, nil) },
		"guessed secret":     func(r *trustv1.JoinRequest) { prove(r, make([]byte, join.SecretSize)) },
	} {
		r := joinDirect(t, token, "n9")
		spoil(r)
		count++
		wait.Go(func() {
			if _, err := c.Join(t.Context(), r); !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "the join token is wrong") {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wait.Wait()
	if d := time.Since(start); d < time.Duration(count/wrongProofs)*wrongDelay {
		t.Errorf("%d guesses took %s", count, d)
	}
	if _, err := c.Join(t.Context(), joinDirect(t, token, "n9")); err != nil {
		t.Errorf("the token was used up by forgeries: %v", err)
	}
}

// Who knows a token's secret hears what is wrong.
func TestJoinIsRefused(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	l.box("n2", "2").join(n1.token("worker", ""), n1)
	c := trustv1.NewJoinClient(n1.conn[uid.Apid])
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	weak, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p384)
	n1.must(err)
	token := n1.token("worker", "")
	_, secret, _ := join.Parse(token)
	for _, k := range []struct {
		name  string
		token string
		as    string
		spoil func(*trustv1.JoinRequest)
		err   string
		kind  errs.Kind
	}{
		{name: "another's name", as: "n2", err: `has a node called "n2"`, kind: errs.Exists},
		{name: "the first node's name", as: "n1", err: `has a node called "n1"`, kind: errs.Exists},
		{name: "for another name", token: n1.token("worker", "n7"), as: "n8", err: `called "n7", not "n8"`, kind: errs.Denied},
		{name: "the API server's name", as: "kubernetes", err: "own names", kind: errs.Invalid},
		{name: "one of the API server's names", as: "kubernetes.default.svc", err: "own names", kind: errs.Invalid},
		{name: "apid's name", as: "bulkhead", err: "own names", kind: errs.Invalid},
		{name: "control planes' name", as: join.ServerName, err: "own names", kind: errs.Invalid},
		{name: "the cluster's endpoint", as: "api.example", err: "own names", kind: errs.Invalid},
		{name: "no name", as: "", err: "RFC 1123", kind: errs.Invalid},
		{name: "an address", as: "10.5.0.1", err: "RFC 1123", kind: errs.Invalid},
		{name: "upper case", as: "N9", err: "RFC 1123", kind: errs.Invalid},
		{name: "colon", as: "node:n1", err: "RFC 1123", kind: errs.Invalid},
		{name: "no request", as: "n9", spoil: func(r *trustv1.JoinRequest) { r.Csr = []byte("x") }, err: "PKCS #10", kind: errs.Invalid},
		{name: "another kind of key", as: "n9", spoil: func(r *trustv1.JoinRequest) { r.Csr = weak }, err: "P-256", kind: errs.Invalid},
		{name: "useless seal key", as: "n9", spoil: func(r *trustv1.JoinRequest) { r.SealKey = make([]byte, join.SealKeySize) }, err: "seal key", kind: errs.Invalid},
		{name: "from nowhere", as: "n9", spoil: func(r *trustv1.JoinRequest) { r.RemoteAddress = "" }, err: "remote address", kind: errs.Invalid},
	} {
		tok, sec := token, secret
		if k.token != "" {
			tok = k.token
			_, sec, _ = join.Parse(tok)
		}
		r := joinDirect(t, tok, k.as)
		if k.spoil != nil {
			k.spoil(r)
			prove(r, sec)
		}
		if _, err := c.Join(t.Context(), r); !errs.Is(err, k.kind) || !strings.Contains(errs.Text(err), k.err) {
			t.Errorf("%s: %v (kind %d), want kind %d with %q", k.name, err, errs.Of(err), k.kind, k.err)
		}
	}
	revoked := n1.token("worker", "")
	_, err = n1.membership().RevokeJoinToken(n1.admin(), &trustv1.RevokeJoinTokenRequest{Id: revoked[:join.IDSize]})
	n1.must(err)
	if _, err := c.Join(t.Context(), joinDirect(t, revoked, "n9")); !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "was revoked") {
		t.Errorf("revoked: %v", err)
	}
	if _, err := c.Join(t.Context(), joinDirect(t, token, "n9")); err != nil {
		t.Errorf("in the end: %v", err)
	}
	if _, err := c.Join(t.Context(), joinDirect(t, token, "n10")); !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), `used by node "n9"`) {
		t.Errorf("used: %v", err)
	}
	n1.tells("a machine at 10.5.0.9 was not let in as", `has a node called`, `is for a node called \"n7\", not \"n8\"`, "was revoked", `used by node`, `joined as worker from 10.5.0.9, with join token `+token[:join.IDSize])
	list, err := n1.membership().ListJoinTokens(n1.admin(), &trustv1.ListJoinTokensRequest{})
	n1.must(err)
	states := map[string]int{}
	for _, tok := range list.GetTokens() {
		states[tok.GetState()+" "+tok.GetUsedBy()+" "+tok.GetMadeBy()]++
	}
	if got := fmt.Sprint(states); got != "map[revoked  ann:1 unused  ann:1 used n2 ann:1 used n9 ann:1]" {
		t.Errorf("tokens: %s", got)
	}
	for key, e := range l.data {
		if strings.Contains(string(e.GetValue()), strings.ReplaceAll(token[join.IDSize+1:], "-", "")) || strings.Contains(string(e.GetValue()), "PRIVATE") {
			t.Errorf("%s has a secret", key)
		}
	}
}

// One token, two machines, two control planes, at the same moment: one of them is let in.
func TestTokenIsUsedOnce(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	for round := range 5 {
		token := n1.token("worker", "")
		results := make(chan error, 4)
		for i := range cap(results) {
			r, at := joinDirect(t, token, fmt.Sprintf("w%d-%d", round, i)), []*box{n1, n2}[i%2]
			go func() {
				_, err := trustv1.NewJoinClient(at.conn[uid.Apid]).Join(t.Context(), r)
				results <- err
			}()
		}
		in := 0
		for range cap(results) {
			if err := <-results; err == nil {
				in++
			} else if !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "was used by node") {
				t.Error(err)
			}
		}
		if in != 1 {
			t.Errorf("%d were let in", in)
		}
	}
}

// If the answer is lost, the node asks again, and is let in; also if trustd was killed meanwhile.
func TestAnswerToJoinIsLost(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2")
	waitSettled(t, n2.d)
	token := n1.token("controlplane", "")
	ctx, cancel := context.WithCancel(t.Context())
	n2.lost = cancel // it gets there, but nobody is left to hear the answer
	if _, err := trustv1.NewClaimClient(n2.conn[uid.Apid]).JoinCluster(ctx, n2.joinRequest("n2", token, n1)); err == nil {
		t.Fatal("the answer was not lost")
	}
	n2.lost = nil
	n2.boot()
	n2.join(token, n1)
	n1.knows("n1", "n2")
	if _, err := os.Stat(filepath.Join(n2.cfg.Runtime, joiningFile)); !os.IsNotExist(err) {
		t.Errorf("keys of the try are left: %v", err)
	}
}

// The operator's side: what a node that nobody owns says to wrong orders, and that it stays as it was.
func TestJoinClusterIsRefused(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	far := newLab(t).box("m1", "1").found()
	n2 := l.box("n2", "2")
	waitSettled(t, n2.d)
	dead, err := net.Listen("tcp", "127.0.0.1:0") // nobody answers there
	n1.must(err)
	dead.Close()
	nobody, liar := &box{machine: n1.machine, door: dead}, &box{machine: n1.machine}
	liar.ip.Set("127.0.0.8")
	liar.openWith(selfSigned(t), &far.apid)
	token := n1.token("worker", "")
	resign := func(r *trustv1.JoinClusterRequest) {
		sealed, err := claim.SealToken(n2.code(), binding, r.GetName(), r.GetEndpoints(), token, rand.Reader)
		n1.must(err)
		r.SealedToken, r.Proof = sealed, claim.JoinProof(n2.code(), binding, r.GetName(), sealed, r.GetEndpoints())
	}
	for _, c := range []struct {
		name  string
		req   *trustv1.JoinClusterRequest
		spoil func(*trustv1.JoinClusterRequest)
		err   string
		kind  errs.Kind
	}{
		{"wrong proof", n2.joinRequest("n2", token, n1), func(r *trustv1.JoinClusterRequest) { r.Proof[0] ^= 1 }, "the claim code is wrong", errs.Unauthenticated},
		{"other endpoints", n2.joinRequest("n2", token, n1), func(r *trustv1.JoinClusterRequest) { r.Endpoints = []string{liar.endpoint()} }, "the claim code is wrong", errs.Unauthenticated},
		{"other name", n2.joinRequest("n2", token, n1), func(r *trustv1.JoinClusterRequest) { r.Name = "n3" }, "the claim code is wrong", errs.Unauthenticated},
		{"other connection", n2.joinRequest("n2", token, n1), func(r *trustv1.JoinClusterRequest) { r.ChannelBinding = make([]byte, 32) }, "the claim code is wrong", errs.Unauthenticated},
		{"no endpoint", n2.joinRequest("n2", token), nil, "endpoints: 0; give 1 to 16", errs.Invalid},
		{"no port", n2.joinRequest("n2", token, n1), func(r *trustv1.JoinClusterRequest) { r.Endpoints = []string{"10.5.0.1"}; resign(r) }, `"10.5.0.1" is no host and port`, errs.Invalid},
		{"no name", n2.joinRequest("", token, n1), nil, "RFC 1123", errs.Invalid},
		{"a text for a token", n2.joinRequest("n2", "hello", n1), nil, "join token: it begins with an id", errs.Invalid},
		{"a token of another cluster", n2.joinRequest("n2", far.token("worker", ""), n1), nil, "the join token is wrong", errs.Unauthenticated},
		{"nobody there", n2.joinRequest("n2", token, nobody), nil, "connection refused", errs.Unavailable},
		{"the cluster's no, at the second endpoint", n2.joinRequest("n1", token, nobody, n1), nil, `has a node called "n1"`, errs.Exists},
	} {
		if c.spoil != nil {
			c.spoil(c.req)
		}
		if _, err := n2.tryJoin(c.req); !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%s: %v (kind %d), want kind %d with %q", c.name, err, errs.Of(err), c.kind, c.err)
		}
	}
	configureAs(t, n2.d, "n5", 1, config.Worker)
	if _, err := n2.tryJoin(n2.joinRequest("n2", token, n1)); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), `document says "n5"`) {
		t.Errorf("another name than the document's: %v", err)
	}
	configureAs(t, n2.d, "n2", 1, config.Worker)
	if s, _ := n2.d.trust.Get(); s.GetClaimed() {
		t.Error("a refused try left an owner")
	}
	n2.join(token, nobody, n1) // the second endpoint answers
	if _, err := n2.tryJoin(&trustv1.JoinClusterRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "has an owner") {
		t.Errorf("a second time: %v", err)
	}
	if _, err := n2.d.claim(&trustv1.ClaimRequest{}); !errs.Is(err, errs.Precondition) {
		t.Errorf("a claim afterwards: %v", err)
	}
}

// A control plane that takes connections and never answers holds nobody up for long: the next one is asked.
func TestSilentControlPlane(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	quiet, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes connections; nobody reads them
	n1.must(err)
	defer quiet.Close()
	silent := &box{machine: n1.machine, door: quiet}
	n2 := l.box("n2", "2")
	start := time.Now()
	n2.join(n1.token("worker", ""), silent, n1)
	if d := time.Since(start); d < farPatience || d > 2*farPatience {
		t.Errorf("it took %s; one that says nothing has %s", d, farPatience)
	}
	start = time.Now() // and it is not asked first any more
	if _, err := n2.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil || time.Since(start) > farPatience {
		t.Error(err, time.Since(start))
	}
	n2.knows("n1", "n2")
}

// Somebody in between, who has a certificate of his own, can neither pass the join on nor answer it.
func TestJoinThroughSomebodyInBetween(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2")
	waitSettled(t, n2.d)
	between := &box{machine: n1.machine}
	between.ip.Set("127.0.0.8")
	var answer *trustv1.JoinResponse
	between.openJoin(selfSigned(t), joinFunc{f: func(ctx context.Context, r *trustv1.JoinRequest) (*trustv1.JoinResponse, error) {
		if answer != nil {
			return answer, nil
		}
		r.ChannelBinding, r.RemoteAddress = binding, "10.5.0.8" // of his own connection to the cluster
		return trustv1.NewJoinClient(n1.conn[uid.Apid]).Join(ctx, r)
	}})
	token := n1.token("controlplane", "")
	if _, err := n2.tryJoin(n2.joinRequest("n2", token, between)); !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "the join token is wrong") {
		t.Errorf("passed on: %v", err)
	}
	ca, err := newAuthority("os-ca", rand.Reader, time.Now())
	n1.must(err)
	answer = &trustv1.JoinResponse{OsCa: ca.cert.Raw, Certificate: ca.cert.Raw, Role: "worker", Proof: make([]byte, 32)}
	if _, err := n2.tryJoin(n2.joinRequest("n2", token, between)); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "somebody is in between") {
		t.Errorf("answered: %v", err)
	}
	if s, _ := n2.d.trust.Get(); s.GetClaimed() {
		t.Error("the node believed him")
	}
	n2.join(token, n1)
}

// Even the cluster's own word is checked: for this key, by the authority it shows, with keys that are its own, at this time.
func TestAnswerToJoin(t *testing.T) {
	n1 := newLab(t).box("n1", "1").found()
	n2 := newLab(t).box("n2", "2")
	n, err := n2.d.newcomer()
	n1.must(err)
	token := n1.token("controlplane", "")
	id, secret, _ := join.Parse(token)
	r := &trustv1.JoinRequest{TokenId: id, Name: "n2", Csr: n.csr, SealKey: n.seal.PublicKey().Bytes(), ChannelBinding: binding, RemoteAddress: "10.5.0.2"}
	prove(r, secret)
	right, err := trustv1.NewJoinClient(n1.conn[uid.Apid]).Join(t.Context(), r)
	n1.must(err)
	foreign, err := newAuthority("os-ca", rand.Reader, time.Now())
	n1.must(err)
	k1, _ := n1.d.keys.Get()
	stranger, err := k1.os.sign(foreign.cert.PublicKey, leaf{private: nodeUsage, life: day}, rand.Reader, time.Now())
	n1.must(err)
	ask := &trustv1.JoinClusterRequest{Name: "n2", Endpoints: []string{"10.5.0.1:50000"}}
	for _, c := range []struct {
		name  string
		now   time.Time
		spoil func(*trustv1.JoinResponse)
		err   string
	}{
		{name: "right"},
		{name: "another authority", spoil: func(r *trustv1.JoinResponse) { r.OsCa = foreign.cert.Raw }, err: "not signed by the cluster's authority"},
		{name: "no authority", spoil: func(r *trustv1.JoinResponse) { r.OsCa = r.Certificate }, err: "authority is none"},
		{name: "another key", spoil: func(r *trustv1.JoinResponse) { r.Certificate = stranger.Raw }, err: "another node than this one"},
		{name: "no keys", spoil: func(r *trustv1.JoinResponse) { r.Sealed = nil }, err: "cannot be opened"},
		{name: "spoilt keys", spoil: func(r *trustv1.JoinResponse) { r.Sealed[50] ^= 1 }, err: "cannot be opened"},
		{name: "unknown role", spoil: func(r *trustv1.JoinResponse) { r.Role = "boss" }, err: `"boss"`},
		{name: "trusts others", spoil: func(r *trustv1.JoinResponse) { r.State.OsCa = string(foreign.pem) }, err: "not what it showed"},
		{name: "ten years ahead", now: time.Now().AddDate(10, 0, 0), err: "set the clock"},
		{name: "ten years behind", now: time.Now().AddDate(-10, 0, 0), err: "set the clock"},
	} {
		resp := proto.CloneOf(right)
		if c.spoil != nil {
			c.spoil(resp)
		}
		if c.now.IsZero() {
			c.now = time.Now()
		}
		k, err := n.accept(ask, id, resp, c.now)
		if c.err == "" && (err != nil || k.cluster == nil || k.os == nil) || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
	}
	// The certificate that comes with it is none for TLS.
	cert, err := x509.ParseCertificate(right.GetCertificate())
	n1.must(err)
	pool := x509.NewCertPool()
	pool.AddCert(k1.os.cert)
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{use}}); err == nil {
			t.Errorf("the node's certificate is good for use %d", use)
		}
	}
}

// Tokens are made by administrators of a cluster, for roles that there are.
func TestMakeJoinToken(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1")
	waitSettled(t, n1.d)
	if _, err := n1.membership().MakeJoinToken(n1.admin(), &trustv1.MakeJoinTokenRequest{Role: "worker"}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "in no cluster yet") {
		t.Errorf("without a cluster: %v", err)
	}
	n1.found()
	for _, c := range []struct {
		req  *trustv1.MakeJoinTokenRequest
		err  string
		kind errs.Kind
	}{
		{&trustv1.MakeJoinTokenRequest{}, `role: ""; allowed are "controlplane" and "worker"`, errs.Invalid},
		{&trustv1.MakeJoinTokenRequest{Role: "admin"}, `role: "admin"`, errs.Invalid},
		{&trustv1.MakeJoinTokenRequest{Role: "worker", Name: "n1"}, "has a node called", errs.Exists},
		{&trustv1.MakeJoinTokenRequest{Role: "worker", Name: "kubernetes"}, "own names", errs.Invalid},
		{&trustv1.MakeJoinTokenRequest{Role: "worker", TtlSeconds: 8 * 86400}, "at most 604800", errs.Invalid},
	} {
		if _, err := n1.membership().MakeJoinToken(n1.admin(), c.req); !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%v: %v, want %q", c.req, err, c.err)
		}
	}
	if _, err := n1.membership().RevokeJoinToken(n1.admin(), &trustv1.RevokeJoinTokenRequest{Id: "0123456789"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("a token that never was: %v", err)
	}
	w := l.box("w", "3").join(n1.token("worker", ""), n1)
	if _, err := w.membership().MakeJoinToken(w.admin(), &trustv1.MakeJoinTokenRequest{Role: "worker"}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "ask a control plane") {
		t.Errorf("at a worker: %v", err)
	}
	n1.etcdAway.Set(true)
	if _, err := n1.membership().MakeJoinToken(n1.admin(), &trustv1.MakeJoinTokenRequest{Role: "worker"}); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "no quorum") {
		t.Errorf("without etcd: %v", err)
	}
}

// A cluster that an older image made gets its key for tokens when it is first needed, on the disk.
func TestClusterOfOlderImage(t *testing.T) {
	n1 := newLab(t).box("n1", "1").found()
	path := filepath.Join(n1.cfg.StateDir, clusterFile)
	n1.stop()
	data, err := os.ReadFile(path)
	n1.must(err)
	before, _, ok := strings.Cut(string(data), `,"joinKey"`)
	if !ok {
		t.Fatal("a new cluster has no join key")
	}
	n1.must(os.WriteFile(path, []byte(before+"}"), 0o600))
	n1.boot()
	n1.knows("n1")
	token := n1.token("worker", "")
	n1.boot()
	n1.knows("n1")
	if _, err := trustv1.NewJoinClient(n1.conn[uid.Apid]).Join(t.Context(), joinDirect(t, token, "n9")); err != nil {
		t.Errorf("after a restart the token is worth nothing: %v", err)
	}
}

// Nobody gives people or programs the role of a node, or its name.
func TestNodeRolesAreNotMinted(t *testing.T) {
	n1 := newLab(t).box("n1", "1").found()
	trust := trustv1.NewTrustClient(n1.conn[uid.Apid])
	_, csr := request(t, x509.CertificateRequest{})
	for _, role := range []string{"node", "node-controlplane", "node-worker"} {
		if _, err := trust.MintToken(n1.admin(), &trustv1.MintTokenRequest{Name: "x", Roles: []string{role}}); !errs.Is(err, errs.Invalid) {
			t.Errorf("token with role %s: %v", role, err)
		}
		if _, err := trust.IssueCertificate(n1.admin(), &trustv1.IssueCertificateRequest{Csr: csr, Name: "x", Roles: []string{"admin", role}}); !errs.Is(err, errs.Invalid) {
			t.Errorf("certificate with role %s: %v", role, err)
		}
	}
	if _, err := trust.IssueCertificate(n1.admin(), &trustv1.IssueCertificateRequest{Csr: csr, Name: "node:n1", Roles: []string{"admin"}}); !errs.Is(err, errs.Invalid) {
		t.Errorf("certificate with a node's name: %v", err)
	}
	for name, p := range profiles {
		for _, s := range []*spec{{hostname: "n1", role: config.ControlPlane, member: roster.ControlPlane, key: "k"}, {hostname: "n1", member: roster.Worker, key: "k"}} {
			r := &x509.CertificateRequest{}
			l, err := p.issue(name, r, 0, s)
			if name == "apid-node" && err != nil {
				t.Error(err)
			}
			if err == nil && strings.Contains(l.subject.String(), "bulkhead:node") != (name == "apid-node") {
				t.Errorf("%s gives %s", name, l.subject)
			}
		}
	}
}

// selfSigned is a certificate that nobody vouches for.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	ca, err := newAuthority("nobody", rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{ca.cert.Raw}, PrivateKey: ca.key}
}
