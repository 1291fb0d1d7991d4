// Package keyservice is both ends of keys.v1.KeyService: a server that keeps keys for nodes, in the network.
//
// Neither side trusts an authority: each knows the other by a digest. The package must not know what the keys are for.
package keyservice

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
)

// Limits, in bytes.
const (
	MaxPlaintext = 128
	MaxSealed    = 1024

	maxMessage = 8 << 10
	pinPrefix  = "sha256:"
)

// Pin is by which a node knows a server: the digest of the public key in its certificate.
func Pin(cert *x509.Certificate) string {
	d := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return pinPrefix + hex.EncodeToString(d[:])
}

// Fingerprint is by which a server knows a node: the digest of its certificate.
func Fingerprint(der []byte) string {
	d := sha256.Sum256(der)
	return pinPrefix + hex.EncodeToString(d[:])
}

// Seal has the server encrypt a key for the node whose certificate is in s.
func Seal(ctx context.Context, s *keysv1.Server, plaintext []byte) (*keysv1.SealResponse, error) {
	conn, err := dial(s)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := keysv1.NewKeyServiceClient(conn).Seal(ctx, &keysv1.SealRequest{Plaintext: plaintext})
	if err == nil && (len(r.GetSealed()) == 0 || len(r.GetSealed()) > MaxSealed) {
		return nil, fmt.Errorf("%s: the answer has %d bytes; 1 to %d are allowed", s.GetAddress(), len(r.GetSealed()), MaxSealed)
	}
	return r, err
}

// Unseal gets it back.
func Unseal(ctx context.Context, s *keysv1.Server, sealed []byte) (*keysv1.UnsealResponse, error) {
	conn, err := dial(s)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r, err := keysv1.NewKeyServiceClient(conn).Unseal(ctx, &keysv1.UnsealRequest{Sealed: sealed})
	if err == nil && (len(r.GetPlaintext()) == 0 || len(r.GetPlaintext()) > MaxPlaintext) {
		return nil, fmt.Errorf("%s: the answer has %d bytes; 1 to %d are allowed", s.GetAddress(), len(r.GetPlaintext()), MaxPlaintext)
	}
	return r, err
}

func dial(s *keysv1.Server) (*grpc.ClientConn, error) {
	key, err := x509.ParsePKCS8PrivateKey(s.GetKey())
	if err != nil {
		return nil, fmt.Errorf("this node's key: %w", err)
	}
	if !strings.HasPrefix(s.GetPin(), pinPrefix) {
		return nil, fmt.Errorf("pin %q does not begin with %s", s.GetPin(), pinPrefix)
	}
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: "keyserver", SessionTicketsDisabled: true,
		Certificates:       []tls.Certificate{{Certificate: [][]byte{s.GetCertificate()}, PrivateKey: key}},
		InsecureSkipVerify: true, // the pin is what counts
		VerifyConnection:   func(c tls.ConnectionState) error { return checkPin(c, s.GetPin()) },
	}
	return grpc.NewClient("dns:///"+s.GetAddress(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)), grpc.WithDisableServiceConfig())
}

func checkPin(c tls.ConnectionState, pin string) error {
	if len(c.PeerCertificates) == 0 {
		return errors.New("the server shows no certificate")
	}
	if got := Pin(c.PeerCertificates[0]); subtle.ConstantTimeCompare([]byte(got), []byte(pin)) != 1 {
		return fmt.Errorf("the server's key is %s, not the one that is pinned", got)
	}
	return nil
}
