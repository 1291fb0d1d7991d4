package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"testing"
	"time"
)

// maker makes certificates for tests.
type maker struct {
	t    *testing.T
	now  time.Time
	last int64
}

type signed struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// make signs a certificate for key (nil: a new one) by an authority (nil: itself).
func (m *maker) make(name string, ca bool, by *signed, key *ecdsa.PrivateKey, life time.Duration) *signed {
	m.t.Helper()
	var err error
	if key == nil {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			m.t.Fatal(err)
		}
	}
	m.last++
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(m.last), Subject: pkix.Name{CommonName: name}, NotBefore: m.now.Add(-time.Hour), NotAfter: m.now.Add(life), BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature}
	if ca {
		tmpl.IsCA, tmpl.KeyUsage, tmpl.MaxPathLenZero = true, x509.KeyUsageCertSign, true // as authorities of older images
	} else {
		tmpl.DNSNames, tmpl.ExtKeyUsage = []string{ServerName}, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	parent, signer := tmpl, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		m.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		m.t.Fatal(err)
	}
	return &signed{c, key}
}

// A new authority is believed when the old one says so, and for nothing else.
func TestVerify(t *testing.T) {
	m := &maker{t: t, now: time.Now()}
	old, next, foreign := m.make("old", true, nil, nil, time.Hour), m.make("next", true, nil, nil, time.Hour), m.make("old", true, nil, nil, time.Hour)
	cross := m.make("next", true, old, next.key, time.Hour)
	leaf := m.make("apid", false, next, nil, time.Hour)
	notCA := m.make("next", false, old, next.key, time.Hour)
	late := m.make("next", true, old, next.key, -time.Minute)
	forged := m.make("next", true, foreign, next.key, time.Hour)
	named := m.make("next", true, nil, nil, time.Hour) // has the name, not the key
	client := m.make("ann", false, old, nil, time.Hour)
	for _, c := range []struct {
		name  string
		chain []*signed
		learn bool
		ok    bool
	}{
		{name: "known authority", chain: []*signed{m.make("apid", false, old, nil, time.Hour)}, ok: true},
		{name: "vouched for", chain: []*signed{leaf, cross, next}, ok: true, learn: true},
		{name: "in another order", chain: []*signed{leaf, next, cross}, ok: true, learn: true},
		{name: "nobody vouches", chain: []*signed{leaf, next}},
		{name: "without the authority itself", chain: []*signed{leaf, cross}},
		{name: "vouched for by a stranger of that name", chain: []*signed{leaf, forged, next}},
		{name: "vouched for long ago", chain: []*signed{leaf, late, next}},
		{name: "the old one signed a server, no authority", chain: []*signed{leaf, notCA, next}},
		{name: "another authority than the one vouched for", chain: []*signed{m.make("apid", false, named, nil, time.Hour), cross, named}},
		{name: "signed by a person", chain: []*signed{m.make("apid", false, client, nil, time.Hour), client}},
		{name: "expired", chain: []*signed{m.make("apid", false, next, nil, -time.Minute), cross, next}},
	} {
		var chain []*x509.Certificate
		for _, s := range c.chain {
			chain = append(chain, s.cert)
		}
		root, err := verify([]*x509.Certificate{old.cert}, chain, ServerName, m.now)
		if (err == nil) != c.ok || (root != nil) != c.learn || root != nil && !root.Equal(next.cert) {
			t.Errorf("%s: learnt %v, error %v", c.name, root != nil, err)
		}
		if err != nil && c.name != "expired" && !errors.Is(err, ErrAuthority) {
			t.Errorf("%s: %v, want ErrAuthority", c.name, err)
		}
	}
	if _, err := verify([]*x509.Certificate{old.cert}, []*x509.Certificate{leaf.cert, cross.cert, next.cert}, "other", m.now); err == nil {
		t.Error("another name is believed")
	}
	if _, err := verify([]*x509.Certificate{old.cert}, nil, ServerName, m.now); err == nil {
		t.Error("no certificate is believed")
	}
	if _, err := TLS(Credentials{CA: []byte("x")}); err == nil {
		t.Error("credentials without an authority are taken")
	}
}
