package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
)

// Claim makes the caller the first administrator of a node that nobody owns. code is what the node's console shows, or the key
// it was started with; name is for the certificate's subject, "" means "admin". The key is made here and is in the result only.
//
// The node proves that it knows the code too: on a wrong proof nothing of its answer is used. Errors have the kinds of
// trust.v1.Claim: Unauthenticated (wrong code), FailedPrecondition (somebody owns the node).
func Claim(ctx context.Context, endpoint, code, name string) (Credentials, error) {
	address, err := Address(endpoint)
	if err != nil {
		return Credentials{}, err
	}
	if code, err = claim.Normalize(code); err != nil {
		return Credentials{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Credentials{}, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return Credentials{}, err
	}
	conn, binding, err := dialUnknown(ctx, address, claim.Binding, nil)
	if err != nil {
		return Credentials{}, fmt.Errorf("claim %s: %w", address, err)
	}
	defer conn.Close()
	resp, err := trustv1.NewClaimClient(conn).Claim(ctx, &trustv1.ClaimRequest{Csr: csr, Proof: claim.ClientProof(code, binding, csr), Name: name})
	if err != nil {
		return Credentials{}, fmt.Errorf("claim %s: %w", address, err)
	}
	if !claim.Equal(resp.GetProof(), claim.ServerProof(code, binding, resp.GetCa(), resp.GetCertificate())) {
		return Credentials{}, fmt.Errorf("claim %s: the answer is not from a node that knows the code: somebody may be in between; nothing of it was kept", address)
	}
	return credentialsOf(key, resp)
}

// dialUnknown opens one TLS connection to a node without knowing its authority, and returns what binds a proof to it. own may be the caller's
// certificate.
func dialUnknown(ctx context.Context, address string, bind func(tls.ConnectionState) ([]byte, error), own []tls.Certificate) (*grpc.ClientConn, []byte, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 20 * time.Second}, Config: &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: ServerName, Certificates: own,
		InsecureSkipVerify: true, // the code or key proves who it is, not the certificate
	}}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	binding, err := bind(raw.(*tls.Conn).ConnectionState())
	if err != nil {
		return nil, nil, fmt.Errorf("%w (and %v)", err, raw.Close())
	}
	var used atomic.Bool
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is below, in raw
		grpc.WithAuthority(ServerName), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used.Swap(true) { // a second connection would have another binding
				return nil, fmt.Errorf("the connection was lost; try again")
			}
			return raw, nil
		}))
	return conn, binding, err
}

// credentialsOf checks that the answer is a certificate for key by the authority in it.
func credentialsOf(key *ecdsa.PrivateKey, resp *trustv1.ClaimResponse) (Credentials, error) {
	ca, err := x509.ParseCertificate(resp.GetCa())
	if err != nil {
		return Credentials{}, fmt.Errorf("claim: the node's authority: %w", err)
	}
	cert, err := x509.ParseCertificate(resp.GetCertificate())
	if err != nil {
		return Credentials{}, fmt.Errorf("claim: the certificate: %w", err)
	}
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return Credentials{}, fmt.Errorf("claim: the certificate is not signed by the node's authority: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return Credentials{}, fmt.Errorf("claim: the certificate is for another key")
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Credentials{}, err
	}
	text := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	return Credentials{CA: text("CERTIFICATE", ca.Raw), Certificate: text("CERTIFICATE", cert.Raw), Key: text("PRIVATE KEY", der)}, nil
}
