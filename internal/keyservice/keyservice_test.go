package keyservice

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// start runs a server on a folder and returns its address.
func start(t *testing.T, folder string) (*Server, string) {
	t.Helper()
	s, err := Load(folder, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() { cancel(); <-done })
	return s, l.Addr().String()
}

// newNode is who a node is to a server.
func newNode(t *testing.T, s *Server, address string) *keysv1.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := selfSigned(key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &keysv1.Server{Address: address, Pin: s.Pin(), Certificate: cert, Key: der}
}

func TestKeyService(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "state")
	s, address := start(t, folder)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	a, b := newNode(t, s, address), newNode(t, s, address)
	secret := []byte("a key of thirty-two bytes, or so")
	_, err := Seal(ctx, a, secret)
	if !errs.Is(err, errs.Denied) || !strings.Contains(err.Error(), Fingerprint(a.Certificate)) {
		t.Fatalf("an unknown node: %v", err)
	}
	list := "# nodes\n" + Fingerprint(a.Certificate) + "  node a\n" + Fingerprint(b.Certificate) + "\n"
	if err := os.WriteFile(filepath.Join(folder, nodesFile), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Seal(ctx, a, secret)
	if err != nil || bytes.Contains(r.Sealed, secret[:8]) {
		t.Fatalf("%x, %v", r.GetSealed(), err)
	}
	// It is there after a restart of the server, for this node and no other.
	s2, address2 := start(t, folder)
	if s2.Pin() != s.Pin() {
		t.Error("the server is another one after a restart")
	}
	a.Address, b.Address = address2, address2
	if got, err := Unseal(ctx, a, r.Sealed); err != nil || !bytes.Equal(got.Plaintext, secret) {
		t.Errorf("%x, %v", got.GetPlaintext(), err)
	}
	if _, err := Unseal(ctx, b, r.Sealed); !errs.Is(err, errs.Invalid) {
		t.Errorf("another node's: %v", err)
	}
	spoilt := bytes.Clone(r.Sealed)
	spoilt[len(spoilt)-1]++
	for what, bad := range map[string][]byte{"spoilt": spoilt, "empty": nil, "long": make([]byte, MaxSealed+1)} {
		if _, err := Unseal(ctx, a, bad); !errs.Is(err, errs.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, bad := range map[string][]byte{"empty": nil, "long": make([]byte, MaxPlaintext+1)} {
		if _, err := Seal(ctx, a, bad); !errs.Is(err, errs.Invalid) {
			t.Errorf("seal %s: %v", what, err)
		}
	}
	// A node that was taken out gets nothing any more.
	if err := os.WriteFile(filepath.Join(folder, nodesFile), []byte(Fingerprint(b.Certificate)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Unseal(ctx, a, r.Sealed); !errs.Is(err, errs.Denied) {
		t.Errorf("taken out: %v", err)
	}
}

// A server in the place of the pinned one gets nothing.
func TestPin(t *testing.T) {
	s, _ := start(t, t.TempDir())
	_, other := start(t, t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := Seal(ctx, newNode(t, s, other), []byte("x")); err == nil || !strings.Contains(err.Error(), "not the one that is pinned") {
		t.Errorf("got %v", err)
	}
	n := newNode(t, s, other)
	n.Pin = "md5:00"
	if _, err := Seal(ctx, n, []byte("x")); err == nil {
		t.Error("a pin of another form")
	}
	n.Key = nil
	if _, err := Unseal(ctx, n, []byte("x")); err == nil {
		t.Error("no key")
	}
}

func TestLoadRefuses(t *testing.T) {
	for name, content := range map[string]string{masterFile: "short", keyFile: "no key", certFile: "no certificate"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
