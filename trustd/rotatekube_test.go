package trustd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	externaljwtv1 "k8s.io/externaljwt/apis/v1"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	leaves "github.com/bulkhead-os/bulkhead/internal/leaf" // trustd has a leaf of its own
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// kube is the API server of a box, and a client of it, with certificates as kubeletd gets them.
type kube struct {
	*box
	trust          *leaves.Trust
	server, client *leaves.Leaf
	address        string
}

func (b *box) kube() *kube {
	b.t.Helper()
	signer, log := trustv1.NewSignerClient(b.conn[uid.Kubeletd]), slog.New(slog.DiscardHandler)
	k := &kube{box: b, trust: leaves.NewTrust(signer, log)}
	k.server = leaves.New(leaves.Config{Signer: signer, Profile: "kube-apiserver-server", Trust: k.trust, Log: log})
	k.client = leaves.New(leaves.Config{Signer: signer, Profile: "kube-scheduler", Trust: k.trust, Log: log})
	ctx, cancel := context.WithCancel(context.Background())
	var wait sync.WaitGroup
	for _, run := range []func(context.Context) error{k.trust.Run, k.server.Run, k.client.Run} {
		wait.Go(func() { _ = run(ctx) })
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		roots, _ := k.trust.Roots()
		return &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: k.server.GetCertificate, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots.Kubernetes}, nil
	}, GetCertificate: k.server.GetCertificate})
	b.must(err)
	wait.Go(func() {
		for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
			_, _ = conn.Write([]byte("ok")) // after the handshake, so if the client's certificate was taken
			conn.Close()
		}
	})
	b.t.Cleanup(func() { cancel(); l.Close(); wait.Wait() })
	k.address = l.Addr().String()
	for _, c := range []*leaves.Leaf{k.server, k.client} {
		_, err := c.Wait(b.t.Context())
		b.must(err)
	}
	return k
}

// call connects with what a client trusts and shows; nil if either side believes the other.
func (k *kube) call(roots *x509.CertPool, cert *tls.Certificate) error {
	conn, err := tls.Dial("tcp", k.address, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: "kubernetes", Certificates: []tls.Certificate{*cert}})
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 2))
	return err
}

// now is what a client has that is up to date.
func (k *kube) now() (*x509.CertPool, *tls.Certificate) {
	roots, _ := k.trust.Roots()
	p, _ := k.client.Pair()
	return roots.Kubernetes, p.TLS
}

// accounts are the ids of the keys whose service-account tokens count, the one that signs first.
func (k *kube) accounts() []string {
	k.t.Helper()
	c := externaljwtv1.NewExternalJWTSignerClient(k.conn[uid.KubeAPIServer])
	signed, err := c.Sign(k.t.Context(), &externaljwtv1.SignJWTRequest{Claims: claims("system:serviceaccount:default:web", time.Now().Add(time.Hour).Unix())})
	k.must(err)
	raw, err := base64.RawURLEncoding.DecodeString(signed.GetHeader())
	k.must(err)
	var header struct{ Kid string }
	k.must(json.Unmarshal(raw, &header))
	keys, err := c.FetchKeys(k.t.Context(), &externaljwtv1.FetchKeysRequest{})
	k.must(err)
	out := []string{header.Kid}
	for _, key := range keys.GetKeys() {
		if key.GetKeyId() != header.Kid {
			out = append(out, key.GetKeyId())
		}
	}
	return out
}

// Kubernetes' authorities are replaced: at each stage those who are up to date reach the API server; until the last one so do those who know and have only what was there before, a pod
// that never reads its files again among them; then they do not.
func TestRotateKubernetes(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	k := n1.kube()
	oldRoots, oldCert := k.now()
	n1.must(k.call(oldRoots, oldCert))
	before := k.accounts()
	start := func(now bool) {
		t.Helper()
		_, err := n1.authorities().StartRotation(n1.admin(), &trustv1.StartRotationRequest{Which: []string{"kubernetes", "front-proxy"}, SkipWait: now})
		n1.must(err)
	}
	start(false)
	// Until every daemon has said that it shows certificates of the new one.
	confirmed := func() bool {
		r, err := n1.authorities().GetRotation(n1.admin(), &trustv1.GetRotationRequest{})
		n1.must(err)
		return r.GetStage() == "issue" && len(r.GetWaiting()) == 0
	}
	for _, changed := n1.d.list.Get(); !confirmed(); _, changed = n1.d.list.Get() {
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatal("issue was never confirmed")
		}
	}
	both, cert := k.now()
	for name, err := range map[string]error{
		"up to date": k.call(both, cert), "with the old certificate": k.call(both, oldCert),
		"knows the old authority alone": k.call(oldRoots, cert), "knows and has the old alone": k.call(oldRoots, oldCert),
	} {
		if err != nil {
			t.Errorf("while both count, a client that is %s: %v", name, err)
		}
	}
	during := k.accounts()
	if len(during) != 2 || during[0] == before[0] || during[1] != before[0] {
		t.Errorf("keys for service accounts while both count: %q, before %q", during, before)
	}
	if s, _ := n1.d.trust.Get(); strings.Count(s.GetFrontProxyCa(), "BEGIN") != 2 || strings.Count(s.GetOsCa(), "BEGIN") != 1 || strings.Count(s.GetEtcdCa(), "BEGIN") != 1 {
		t.Error("of front-proxy there must be two authorities, of those that are not replaced one")
	}
	start(true)
	n1.until("was done", func(s *trustv1.TrustState) bool {
		return s.GetRotation().GetStage() == "finish" && strings.Count(s.GetKubernetesCa(), "BEGIN") == 1
	})
	for p, changed := k.server.Pair(); len(p.TLS.Certificate) > 1; p, changed = k.server.Pair() { // nothing leads to the old one any more
		<-changed
	}
	roots, cert := k.now()
	n1.must(k.call(roots, cert))
	var unknown x509.UnknownAuthorityError
	if err := k.call(oldRoots, cert); !errors.As(err, &unknown) {
		t.Errorf("who knows only the old authority: %v", err)
	}
	if err := k.call(roots, oldCert); err == nil {
		t.Error("a certificate of the old authority still counts")
	}
	if after := k.accounts(); !slices.Equal(after, during[:1]) {
		t.Errorf("keys for service accounts afterwards: %q, want %q", after, during[:1])
	}
}
