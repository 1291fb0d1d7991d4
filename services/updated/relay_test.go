package updated

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/keyservice"
)

// A key goes to the reference server and comes back; what the server says about a stranger arrives too.
func TestRelay(t *testing.T) {
	dir := t.TempDir()
	s, err := keyservice.Load(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	defer func() { cancel(); <-done }()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	place := &keysv1.Server{Address: l.Addr().String(), Pin: s.Pin(), Certificate: cert, Key: der}
	print := keyservice.Fingerprint(cert)
	if _, err := (relayServer{}).Seal(ctx, &keysv1.RelaySealRequest{Server: place, Plaintext: []byte("x")}); err == nil || !strings.Contains(err.Error(), print) {
		t.Errorf("a stranger: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "nodes"), []byte(print), 0o600); err != nil {
		t.Fatal(err)
	}
	sealed, err := relayServer{}.Seal(ctx, &keysv1.RelaySealRequest{Server: place, Plaintext: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	got, err := relayServer{}.Unseal(ctx, &keysv1.RelayUnsealRequest{Server: place, Sealed: sealed.GetSealed()})
	if err != nil || !bytes.Equal(got.GetPlaintext(), []byte("x")) {
		t.Errorf("%v, %v", got, err)
	}
	gone := &keysv1.Server{Address: "127.0.0.1:1", Pin: s.Pin(), Certificate: cert, Key: der}
	if _, err := (relayServer{}).Unseal(ctx, &keysv1.RelayUnsealRequest{Server: gone, Sealed: sealed.GetSealed()}); errs.Text(err) != "dial tcp 127.0.0.1:1: connect: connection refused" {
		t.Errorf("nobody there: %v", err)
	}
}
