package trustd

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzRequest reads requests for certificates. One that is taken is signed by the key in it, and that is a good one.
func FuzzRequest(f *testing.F) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P224()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			f.Fatal(err)
		}
		for _, k := range []any{key, ed} {
			der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "n1"}, DNSNames: []string{"n1"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 7)}}, k)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(der)
		}
	}
	testfuzz.Run(f, func(t *testing.T, der []byte) {
		r, err := parseRequest(der)
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Errorf("the refusal has %d bytes", len(err.Error()))
			}
			return
		}
		if k, ok := r.PublicKey.(*ecdsa.PublicKey); r.CheckSignature() != nil || ok && k.Curve == elliptic.P224() {
			t.Errorf("%x is taken", der)
		}
	})
}
