package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

// A renewed certificate is break-glass if the old one was, and only then.
func TestBreakGlass(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	foreign, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	made := time.Now().Add(-24 * time.Hour)
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "os-ca"}, NotBefore: made, NotAfter: made.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	must(t, err)
	bundle := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	issue := func(from time.Time, by *ecdsa.PrivateKey, roles ...string) *x509.Certificate {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "ann", Organization: roles}, NotBefore: from, NotAfter: from.AddDate(1, 0, 0)}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, authority, key.Public(), by)
		must(t, err)
		c, err := x509.ParseCertificate(der)
		must(t, err)
		return c
	}
	for name, c := range map[string]struct {
		cert *x509.Certificate
		want bool
	}{
		"the owner's":                 {issue(made, key, "bulkhead:reader", "bulkhead:admin"), true},
		"an administrator's of later": {issue(made.Add(time.Minute), key, "bulkhead:admin"), false},
		"a reader's":                  {issue(made, key, "bulkhead:reader"), false},
		"of another authority":        {issue(made, foreign, "bulkhead:admin"), false},
	} {
		if got := breakGlass(c.cert, bundle); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if breakGlass(issue(made, key, "bulkhead:admin"), "") {
		t.Error("without an authority: true")
	}
}

// Who signed in at an issuer learns the authorities of now, and keeps the sign-in.
func TestRenewSignedIn(t *testing.T) {
	_, cfg := startFake(t)
	c := cfg.Contexts["demo"]
	c.Certificate, c.Key, c.SignIn = "", "", &signIn{IDToken: "x", Expires: time.Now().Add(time.Hour)}
	path := t.TempDir() + "/contexts.yaml"
	writeContexts(t, path, cfg)
	t.Setenv("BHCONFIG", path)
	a := &app{out: t.Output(), err: t.Output(), format: "table"}
	must(t, a.renew(t.Context(), true))
	after, err := loadContexts()
	must(t, err)
	if got := after.Contexts["demo"]; strings.Count(got.CA, "BEGIN") != 2 || got.SignIn == nil || got.Certificate != "" {
		t.Errorf("afterwards: %d authorities, sign-in %v, certificate %q", strings.Count(got.CA, "BEGIN"), got.SignIn != nil, got.Certificate)
	}
}
