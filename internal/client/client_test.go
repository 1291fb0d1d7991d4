package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

func authorityPEM(t *testing.T) []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.5": "10.0.0.5:50000", "10.0.0.5:1": "10.0.0.5:1", "node.example": "node.example:50000", "node.example:50000": "node.example:50000",
		"fd00::5": "[fd00::5]:50000", "[fd00::5]": "[fd00::5]:50000", "[fd00::5]:7": "[fd00::5]:7",
		"": "", ":50000": "", "a:b:c": "", "node:": "",
	} {
		got, err := Address(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("Address(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestDialRefusesHalfCredentials(t *testing.T) {
	ca := authorityPEM(t)
	for want, c := range map[string]Credentials{
		"ca: no PEM": {}, "certificate and key": {CA: ca, Certificate: []byte("x")},
	} {
		if _, err := Dial("n1", c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// With AnyTime a node's dates do not count, and all else does.
func TestAnyTime(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	sign := func(tmpl, parent *x509.Certificate) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: now.AddDate(-5, 0, 0), NotAfter: now.AddDate(5, 0, 0), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca := sign(root, root)
	pinned := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})
	lax, err := TLS(Credentials{CA: pinned, AnyTime: true})
	if err != nil {
		t.Fatal(err)
	}
	strict, err := TLS(Credentials{CA: pinned})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		years int // from now
		dns   string
		usage x509.ExtKeyUsage
		ok    bool
	}{
		{"of the past", -3, ServerName, x509.ExtKeyUsageServerAuth, true}, {"of the future", 3, ServerName, x509.ExtKeyUsageServerAuth, true},
		{"another's", 0, "gateway", x509.ExtKeyUsageServerAuth, false}, {"a client's", 0, ServerName, x509.ExtKeyUsageClientAuth, false},
		{"of before its authority", -9, ServerName, x509.ExtKeyUsageServerAuth, false},
	} {
		from := now.AddDate(c.years, 0, 0)
		leaf := sign(&x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{c.dns}, NotBefore: from, NotAfter: from.Add(24 * time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{c.usage}}, ca)
		shown := tls.ConnectionState{ServerName: ServerName, PeerCertificates: []*x509.Certificate{leaf}}
		if err := lax.VerifyConnection(shown); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		if strict.VerifyConnection(shown) == nil {
			t.Errorf("%s: taken without AnyTime", c.name)
		}
	}
}
