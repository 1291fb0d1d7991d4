// Package testca is a trustd of a few lines for the tests of daemons that need certificates: authorities in memory, and names
// taken from the request where the real one takes them from its table.
//
// It is for tests only and checks nothing.
package testca

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
)

// Subjects are those of trustd's profiles that the tests need; others get their profile's name.
var Subjects = map[string]pkix.Name{
	"etcd-root":                     {CommonName: "root"},
	"etcd-client-kube-apiserver":    {CommonName: "kube-apiserver"},
	"etcd-client-bulkhead":          {CommonName: "bulkhead"},
	"kubeletd":                      {CommonName: "bulkhead:kubeletd"},
	"kubeletd-node":                 {CommonName: "bulkhead:kubeletd:bulkhead", Organization: []string{"bulkhead:kubeletd-nodes"}},
	"kubernetes-admin":              {CommonName: "kubernetes-admin", Organization: []string{"system:masters"}},
	"kube-controller-manager":       {CommonName: "system:kube-controller-manager"},
	"kube-scheduler":                {CommonName: "system:kube-scheduler"},
	"kube-proxy":                    {CommonName: "system:kube-proxy"},
	"kubelet-bootstrap":             {CommonName: "system:bootstrap:bulkhead", Organization: []string{"system:bootstrappers"}},
	"kube-apiserver-kubelet-client": {CommonName: "kube-apiserver-kubelet-client"},
}

// CA signs. It implements trustv1.SignerClient and is safe for concurrent use.
type CA struct {
	etcd, kubernetes, front authority
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

// New returns three authorities.
func New(t testing.TB) *CA {
	return &CA{etcd: newAuthority(t, "etcd", ""), kubernetes: newAuthority(t, "kubernetes", ""), front: newAuthority(t, "front-proxy", "")}
}

// Successor returns three authorities that take the place of the first ones: of generation 2.
func Successor(t testing.TB) *CA {
	return &CA{etcd: newAuthority(t, "etcd", "2"), kubernetes: newAuthority(t, "kubernetes", "2"), front: newAuthority(t, "front-proxy", "2")}
}

func newAuthority(t testing.TB, name, generation string) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, SerialNumber: generation}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(48 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

func (c *CA) of(profile string) authority {
	switch {
	case strings.HasPrefix(profile, "etcd-"):
		return c.etcd
	case strings.HasPrefix(profile, "front-proxy"):
		return c.front
	}
	return c.kubernetes
}

// State is what WatchTrust sends, once.
func (c *CA) State() *trustv1.TrustState {
	return &trustv1.TrustState{Claimed: true, Bootstrapped: true, EtcdCa: c.etcd.pem, KubernetesCa: c.kubernetes.pem, FrontProxyCa: c.front.pem}
}

// SignCertificate signs for a day whatever is asked.
func (c *CA) SignCertificate(_ context.Context, r *trustv1.SignCertificateRequest, _ ...grpc.CallOption) (*trustv1.SignCertificateResponse, error) {
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, err
	}
	name, ok := Subjects[r.GetProfile()]
	if !ok {
		name = pkix.Name{CommonName: r.GetProfile()}
		if csr.Subject.CommonName != "" {
			name = csr.Subject
		}
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	a := c.of(r.GetProfile())
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: name, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames: csr.DNSNames, IPAddresses: csr.IPAddresses}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, csr.PublicKey, a.key)
	return &trustv1.SignCertificateResponse{Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), Ca: a.pem}, err
}

// ReportTrust takes every report.
func (c *CA) ReportTrust(context.Context, *trustv1.ReportTrustRequest, ...grpc.CallOption) (*trustv1.ReportTrustResponse, error) {
	return &trustv1.ReportTrustResponse{}, nil
}

// WatchTrust sends State and then nothing until ctx is done.
func (c *CA) WatchTrust(ctx context.Context, _ *trustv1.WatchTrustRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[trustv1.TrustState], error) {
	return &stream{ctx: ctx, first: c.State()}, nil
}

type stream struct {
	grpc.ClientStream
	ctx   context.Context
	first *trustv1.TrustState
}

func (s *stream) Recv() (*trustv1.TrustState, error) {
	if m := s.first; m != nil {
		s.first = nil
		return m, nil
	}
	<-s.ctx.Done()
	return nil, s.ctx.Err()
}

// Client returns what a client with a certificate of the profile needs to speak to a server of the same authority.
func (c *CA) Client(t testing.TB, profile string) *tls.Config {
	t.Helper()
	cert, key := c.PEM(t, profile, x509.CertificateRequest{})
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c.of(profile).cert)
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, RootCAs: pool}
}

// PEM returns a certificate and its key.
func (c *CA) PEM(t testing.TB, profile string, req x509.CertificateRequest) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &req, k)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.SignCertificate(t.Context(), &trustv1.SignCertificateRequest{Profile: profile, Csr: csr})
	if err != nil {
		t.Fatal(fmt.Errorf("sign %s: %w", profile, err))
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetCertificate(), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}
