package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
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
