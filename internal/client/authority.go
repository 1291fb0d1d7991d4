package client

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// ErrAuthority is that a node's certificate is of no authority that the credentials know.
var ErrAuthority = errors.New("the node's certificate is not signed by an authority that these credentials know")

// maxChain bounds what a node may show, in certificates.
const maxChain = 8

// pinned are the authorities in credentials.
func pinned(text []byte) []*x509.Certificate {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
}

// verify checks who a node is. While its cluster replaces its authority, the node shows with its certificate that the old authority vouches for the new one: then it returns the
// new one, which is to be known from then on, since the old one will be gone. nil: what is known is enough. x509 alone does not do: authorities of older images may sign leaves only.
func verify(known []*x509.Certificate, chain []*x509.Certificate, name string, now time.Time) (*x509.Certificate, error) {
	if len(chain) == 0 || len(chain) > maxChain {
		return nil, fmt.Errorf("the node shows %d certificates; allowed are 1 to %d", len(chain), maxChain)
	}
	under := func(roots ...*x509.Certificate) error {
		pool := x509.NewCertPool()
		for _, r := range roots {
			pool.AddCert(r)
		}
		_, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: name, CurrentTime: now})
		return err
	}
	err := under(known...)
	var unknown x509.UnknownAuthorityError
	if err == nil || !errors.As(err, &unknown) {
		return nil, err
	}
	for _, cross := range chain[1:] {
		if !vouched(known, cross, now) {
			continue
		}
		for _, root := range chain[1:] {
			if bytes.Equal(root.RawSubject, cross.RawSubject) && bytes.Equal(root.RawSubjectPublicKeyInfo, cross.RawSubjectPublicKeyInfo) && root.CheckSignatureFrom(root) == nil && under(root) == nil {
				return root, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: %w", ErrAuthority, err)
}

// vouched reports whether a known authority says that another one is as good.
func vouched(known []*x509.Certificate, cross *x509.Certificate, now time.Time) bool {
	if !cross.IsCA || now.Before(cross.NotBefore) || now.After(cross.NotAfter) {
		return false
	}
	for _, k := range known {
		if cross.CheckSignatureFrom(k) == nil && !now.After(k.NotAfter) {
			return true
		}
	}
	return false
}

// recognise makes a configuration check nodes by verify.
func recognise(cfg *tls.Config, c Credentials) error {
	known := pinned(c.CA)
	if len(known) == 0 {
		return errors.New("credentials: ca: no PEM certificate in it")
	}
	cfg.InsecureSkipVerify = true // VerifyConnection does it
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		now := time.Now()
		if cfg.Time != nil {
			now = cfg.Time()
		}
		if c.AnyTime {
			now = withinDates(s.PeerCertificates[0], now) // a server always has one
		}
		name := s.ServerName
		if name == "" { // an address, which is not sent
			name = cfg.ServerName
		}
		root, err := verify(known, s.PeerCertificates, name, now)
		if err == nil && root != nil && c.Learn != nil {
			c.Learn(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}))
		}
		return err
	}
	return nil
}
