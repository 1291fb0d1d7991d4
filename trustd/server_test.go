package trustd

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func TestTokensAndCertificates(t *testing.T) {
	m := newMachine(t)
	m.mountState()
	d, as := m.serve()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	watch, err := trustv1.NewSignerClient(as(uid.Gateway)).WatchTrust(ctx, &trustv1.WatchTrustRequest{})
	m.must(err)
	first, err := watch.Recv()
	m.must(err)
	if first.GetClaimed() {
		t.Error("claimed at first")
	}
	m.claim(d)
	claimed, err := watch.Recv()
	m.must(err)
	if !claimed.GetClaimed() || len(claimed.GetTokenKeys()) != 1 {
		t.Errorf("after the claim: %v", claimed)
	}
	trust := trustv1.NewTrustClient(as(uid.Apid))
	admin := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "ann", peer.RolesKey, "admin")
	minted, err := trust.MintToken(admin, &trustv1.MintTokenRequest{Name: "prometheus", Roles: []string{"reader"}})
	m.must(err)
	public, err := x509.ParsePKIXPublicKey(claimed.GetTokenKeys()[0].GetPublicKey())
	m.must(err)
	token, err := jwt.Parse(minted.GetToken(), func(tok *jwt.Token) (any, error) {
		if tok.Header["kid"] != claimed.GetTokenKeys()[0].GetId() {
			t.Errorf("kid %v", tok.Header["kid"])
		}
		return public, nil
	}, jwt.WithAudience(tokenAudience), jwt.WithIssuer(tokenIssuer), jwt.WithValidMethods([]string{"EdDSA"}), jwt.WithExpirationRequired())
	m.must(err)
	if sub, _ := token.Claims.GetSubject(); sub != "prometheus" {
		t.Errorf("sub %q", sub)
	}
	if life := time.Until(minted.GetExpires().AsTime()); life > time.Hour || life < 59*time.Minute {
		t.Errorf("life %s, want an hour", life)
	}

	_, csr := request(t, x509.CertificateRequest{})
	issued, err := trust.IssueCertificate(admin, &trustv1.IssueCertificateRequest{Csr: csr, Name: "bob", Roles: []string{"operator", "etcd-backup"}})
	m.must(err)
	cert, err := x509.ParseCertificate(issued.GetCertificate())
	m.must(err)
	// Organisations are a set in DER, so they come back sorted.
	if got := cert.Subject.String(); got != "CN=bob,O=bulkhead:etcd-backup+O=bulkhead:operator" && got != "CN=bob,O=bulkhead:operator+O=bulkhead:etcd-backup" {
		t.Errorf("subject %q", got)
	}

	operator := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "op", peer.RolesKey, "operator")
	for _, c := range []struct {
		name string
		ctx  context.Context
		req  *trustv1.MintTokenRequest
		kind errs.Kind
	}{
		{"no role", admin, &trustv1.MintTokenRequest{Name: "x"}, errs.Invalid},
		{"unknown role", admin, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"root"}}, errs.Invalid},
		{"twice", admin, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader", "reader"}}, errs.Invalid},
		{"no name", admin, &trustv1.MintTokenRequest{Roles: []string{"reader"}}, errs.Invalid},
		{"31 days", admin, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}, TtlSeconds: 31 * 86400}, errs.Invalid},
		{"so long that it overflows", admin, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}, TtlSeconds: 1 << 63}, errs.Invalid},
		{"more than one holds", operator, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"admin"}}, errs.Denied},
	} {
		if _, err := trust.MintToken(c.ctx, c.req); !errs.Is(err, c.kind) {
			t.Errorf("%s: %v, want kind %d", c.name, err, c.kind)
		}
	}
	if _, err := trustv1.NewTrustClient(as(uid.Gateway)).MintToken(admin, &trustv1.MintTokenRequest{Name: "x", Roles: []string{"admin"}}); !errs.Is(err, errs.Denied) {
		t.Errorf("gateway mints: %v", err)
	}

	list, err := trust.ListCertificates(admin, &trustv1.ListCertificatesRequest{})
	m.must(err)
	var got []string
	for _, c := range list.GetCertificates() {
		got = append(got, c.GetProfile())
	}
	if strings.Join(got, " ") != "os-ca owner client" {
		t.Errorf("certificates: %q", got)
	}
}

func TestSigner(t *testing.T) {
	m := newMachine(t)
	m.mountState()
	d, as := m.serve()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	etcdd := trustv1.NewSignerClient(as(uid.Etcdd))
	_, csr := request(t, x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 2, 15)}})
	if _, err := etcdd.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "etcd-server", Csr: csr}); !errs.Is(err, errs.Precondition) {
		t.Errorf("before bootstrap: %v", err)
	}
	waitSettled(t, d)
	m.claim(d)
	configure(t, d, 1, config.ControlPlane)
	_, err := d.bootstrap()
	m.must(err)
	resp, err := etcdd.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "etcd-server", Csr: csr})
	m.must(err)
	block, _ := pem.Decode([]byte(resp.GetCertificate()))
	cert, err := x509.ParseCertificate(block.Bytes)
	m.must(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(resp.GetCa()))
	for _, name := range []string{"n1", "localhost", "127.0.0.1", "::1", "10.0.2.15"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := etcdd.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "apid-server", Csr: csr}); !errs.Is(err, errs.Denied) {
		t.Errorf("another's profile: %v", err)
	}
	if _, err := etcdd.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "etcd-peer", Csr: []byte("x")}); !errs.Is(err, errs.Invalid) {
		t.Errorf("garbage: %v", err)
	}
	for _, id := range []uid.ID{uid.Networkd, uid.KubeScheduler, 4711} {
		if _, err := trustv1.NewSignerClient(as(id)).SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: "etcd-server", Csr: csr}, grpc.WaitForReady(false)); err == nil {
			t.Errorf("user %d got a certificate", id)
		}
	}
}

func waitSettled(t testing.TB, d *Daemon) {
	t.Helper()
	for {
		tr, changed := d.trust.Get()
		if tr != nil {
			return
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatal("not settled")
		}
	}
}

func TestRing(t *testing.T) {
	var s signed
	for i := range maxSigned + 3 {
		s.add(&trustv1.Certificate{Serial: string(rune('a' + i%26)), NotBefore: nil, Names: []string{time.Duration(i).String()}})
	}
	l := s.list()
	if len(l) != maxSigned || l[0].GetNames()[0] != "3ns" || l[len(l)-1].GetNames()[0] != "258ns" {
		t.Errorf("%d entries from %v to %v", len(l), l[0].GetNames(), l[len(l)-1].GetNames())
	}
}
