package trustd

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"strconv"
	"time"
)

const (
	authorityLife = 10 * 365 * 24 * time.Hour
	// authorityBackdate makes an authority valid though the clock was ahead when it was made.
	authorityBackdate = 24 * time.Hour
	leafBackdate      = 5 * time.Minute
)

// authority is a certificate authority with its key. It must not be changed.
type authority struct {
	name string // "os-ca", "etcd-ca", …
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte // of cert
}

// newAuthority makes the first authority of its name.
func newAuthority(name string, random io.Reader, now time.Time) (*authority, error) {
	return makeAuthority(name, 1, random, now)
}

// successor makes the authority that takes the place of a.
func (a *authority) successor(random io.Reader, now time.Time) (*authority, error) {
	return makeAuthority(a.name, generation(a.cert)+1, random, now)
}

// makeAuthority makes an authority that may sign leaves, and its successor.
func makeAuthority(name string, generation uint32, random io.Reader, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		// The serial tells the authorities of two clusters apart for people.
		Subject:               pkix.Name{CommonName: "bulkhead " + name + " " + serial.Text(16)[:8], SerialNumber: strconv.FormatUint(uint64(generation), 10)},
		NotBefore:             now.Add(-authorityBackdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: 1,
	}
	der, err := x509.CreateCertificate(random, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make authority %s: %w", name, err)
	}
	return parseAuthority(name, der, key)
}

func parseAuthority(name string, der []byte, key *ecdsa.PrivateKey) (*authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("authority %s: %w", name, err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("authority %s: key and certificate do not belong together", name)
	}
	return &authority{name: name, cert: cert, key: key, pem: pemCert(der)}, nil
}

// leaf is what sign certifies.
type leaf struct {
	subject pkix.Name
	dns     []string
	ips     []net.IP
	usage   []x509.ExtKeyUsage
	private asn1.ObjectIdentifier // a usage of our own
	life    time.Duration
	old     bool // valid since its authority is: apid knows break-glass by that
}

// sign certifies a key. A leaf never outlives its authority. A clock that is behind the making of the authority is wrong: then the leaf is of that time, so that it is
// one at all, and the owner can get in to set the clock.
func (a *authority) sign(key crypto.PublicKey, l leaf, random io.Reader, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial(random)
	if err != nil {
		return nil, err
	}
	now = later(now, a.cert.NotBefore)
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: l.subject, DNSNames: l.dns, IPAddresses: l.ips,
		NotBefore: later(now.Add(-leafBackdate), a.cert.NotBefore), NotAfter: earlier(now.Add(l.life), a.cert.NotAfter),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: l.usage, BasicConstraintsValid: true,
	}
	if l.old {
		tmpl.NotBefore = a.cert.NotBefore
	}
	if l.private != nil {
		tmpl.UnknownExtKeyUsage = []asn1.ObjectIdentifier{l.private}
	}
	der, err := x509.CreateCertificate(random, tmpl, a.cert, key, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign %q with %s: %w", l.subject.String(), a.name, err)
	}
	return x509.ParseCertificate(der)
}

// parseRequest reads a PKCS #10 request from outside: its signature proves that the sender holds the key, and the key is of a kind that is good enough.
func parseRequest(der []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxRequest {
		return nil, fmt.Errorf("csr: %d bytes, at most %d are read", len(der), maxRequest)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("csr: no PKCS #10 request in DER: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	switch k := r.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P224() {
			return r, nil
		}
	case ed25519.PublicKey:
		return r, nil
	}
	return nil, fmt.Errorf("csr: key is %s; allowed are ECDSA (P-256, P-384, P-521) and Ed25519", r.PublicKeyAlgorithm)
}

const maxRequest = 16 << 10 // bytes

// newSerial draws 127 bits (RFC 5280 section 4.1.2.2: positive, at most 20 bytes).
func newSerial(random io.Reader) (*big.Int, error) {
	raw := make([]byte, 16)
	if _, err := io.ReadFull(random, raw); err != nil {
		return nil, err
	}
	raw[0] = raw[0]&0x7f | 0x40 // never short, so that its text has 32 digits
	return new(big.Int).SetBytes(raw), nil
}

// keyID names a public key: 16 hexadecimal digits of its SHA-256.
func keyID(pkix []byte) string {
	sum := sha256.Sum256(pkix)
	return hex.EncodeToString(sum[:8])
}

func pemCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
