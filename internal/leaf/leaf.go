// Package leaf gives a daemon its TLS certificate: the key is born here and stays in memory, trustd signs, and a new pair
// replaces the old one at two thirds of its life without dropping a connection.
//
// It may talk to trustd's Signer and must know nothing of what the certificate is for.
package leaf

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// Pauses between tries, and the longest time between two looks at the clock (which may be set meanwhile).
const (
	firstPause = 250 * time.Millisecond
	maxPause   = 10 * time.Second
	look       = 5 * time.Minute
	deadline   = 30 * time.Second // of one call to trustd
)

// Config says which certificate. All fields but Expiry and Request are required.
type Config struct {
	Signer trustv1.SignerClient
	// Profile is one of the table in trustd/profile.go.
	Profile string
	// Trust wakes a try when an authority appears, and a renewal when the one that signed is replaced. Its Run is the caller's to call.
	Trust *Trust
	Log   *slog.Logger
	// Expiry gets the end of the newest pair; see NewExpiry. nil: nobody is told.
	Expiry *metrics.Vec
	// Request returns what the request asks for (subject, DNS names, IP addresses), anew for each signing. nil: nothing, all
	// is up to the profile. trustd refuses what the profile does not allow.
	Request func() x509.CertificateRequest
}

// Pair is a certificate with its key. It must not be changed.
type Pair struct {
	// TLS has Leaf set. The chain has the leaf only; of a server, while its authority is replaced, also what leads to the old one.
	TLS *tls.Certificate
	// Certificate and CA are PEM. The key's PEM is made by KeyPEM on request.
	Certificate, CA []byte

	names string // that the document gave when it was signed
}

// KeyPEM returns the key as PKCS #8. For programs that take nothing but a file; the file belongs on a tmpfs.
func (p *Pair) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.TLS.PrivateKey)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Leaf holds the newest pair. Make it with New; Run must be called once. It is safe for concurrent use.
type Leaf struct {
	cfg  Config
	cell latest.Cell[*Pair]
	wake chan struct{}
}

// NewExpiry adds to a daemon's figures when its certificates expire, one sample for each profile that has one, in Unix seconds. All leaves of the daemon share it.
func NewExpiry(s *metrics.Set, daemon string) *metrics.Vec {
	return s.Gauge("bulkhead_"+daemon+"_certificate_expiry_timestamp_seconds", "When the newest certificate of a profile expires, Unix time. It is renewed at two thirds of its life.", "profile")
}

// New returns a Leaf without a certificate.
func New(cfg Config) *Leaf {
	l := &Leaf{cfg: cfg, wake: make(chan struct{}, 1)}
	cfg.Trust.add(l)
	return l
}

// Pair returns the newest pair, nil if there is none yet, and a channel that is closed when there is a newer one.
func (l *Leaf) Pair() (*Pair, <-chan struct{}) { return l.cell.Get() }

// Wait returns the pair once there is one, or ctx's error.
func (l *Leaf) Wait(ctx context.Context) (*Pair, error) {
	for {
		p, changed := l.cell.Get()
		if p != nil {
			return p, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

// Renew asks for a new pair soon, for example since the node's addresses changed. It never blocks.
func (l *Leaf) Renew() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// GetCertificate is for tls.Config of servers. Connections that are open keep what they were opened with.
func (l *Leaf) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return l.tls() }

// GetClientCertificate is for tls.Config of clients.
func (l *Leaf) GetClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return l.tls()
}

func (l *Leaf) tls() (*tls.Certificate, error) {
	p, _ := l.cell.Get()
	if p == nil {
		return nil, fmt.Errorf("certificate %s: trustd has not signed it yet", l.cfg.Profile)
	}
	return p.TLS, nil
}

// Run gets a pair and renews it until ctx is done; it returns ctx's error. A failed try is repeated; the old pair stays meanwhile.
func (l *Leaf) Run(ctx context.Context) error {
	pause := firstPause
	if err := l.cfg.Trust.Wait(ctx); err != nil {
		return err
	}
	timer := time.NewTimer(look)
	defer timer.Stop()
	said := ""
	force := false
	for {
		roots, changed := l.cfg.Trust.Roots()
		p, _ := l.cell.Get()
		var err error
		if force || stale(p, roots, time.Now()) {
			err = l.sign(ctx, names(roots))
		}
		next := look
		if ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil {
			// Before its authority exists there is nothing wrong, only nothing yet.
			if text := errs.Text(err); text != said && !errs.Is(err, errs.Precondition) {
				l.cfg.Log.Warn("certificate not signed", "profile", l.cfg.Profile, "err", text)
				said = text
			}
			next, pause = pause, min(2*pause, maxPause)
		} else {
			later := pause
			pause, said, force = firstPause, "", false
			p, _ = l.cell.Get()
			next = min(look, max(time.Until(renewAt(p.TLS.Leaf)), firstPause))
			if roots, _ := l.cfg.Trust.Roots(); stale(p, roots, time.Now()) { // signed by who does not know yet that another authority signs now
				next, pause = later, min(2*later, maxPause)
			}
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case <-changed:
			pause = firstPause
		case <-l.wake:
			force = true
		}
	}
}

// renewAt is two thirds into a certificate's life.
func renewAt(c *x509.Certificate) time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) * 2 / 3)
}

// stale reports whether a pair is missing, old, from the future, of old names, or signed by an authority that is not the one that signs now, the first of its bundle.
func stale(p *Pair, roots *Roots, now time.Time) bool {
	if p == nil || !now.Before(renewAt(p.TLS.Leaf)) || now.Before(p.TLS.Leaf.NotBefore) {
		return true
	}
	if p.names != names(roots) && slices.Contains(p.TLS.Leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		return true
	}
	for _, ca := range []string{roots.State.GetOsCa(), roots.State.GetEtcdCa(), roots.State.GetKubernetesCa(), roots.State.GetFrontProxyCa()} {
		if strings.HasPrefix(ca, string(p.CA)) { // once the old authority is gone, nothing is to lead to it
			return len(p.TLS.Certificate) > 1 && len(ca) == len(p.CA)
		}
	}
	return true
}

func names(r *Roots) string { return strings.Join(r.State.GetNames(), " ") }

// sign makes a key and has it certified.
func (l *Leaf) sign(ctx context.Context, names string) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	var tmpl x509.CertificateRequest
	if l.cfg.Request != nil {
		tmpl = l.cfg.Request()
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		return fmt.Errorf("request for certificate %s: %w", l.cfg.Profile, err)
	}
	resp, err := l.cfg.Signer.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: l.cfg.Profile, Csr: csr})
	if err != nil {
		return err
	}
	block, _ := pem.Decode([]byte(resp.GetCertificate()))
	if block == nil {
		return fmt.Errorf("certificate %s from trustd: no PEM", l.cfg.Profile)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return fmt.Errorf("certificate %s from trustd: %w", l.cfg.Profile, err)
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return fmt.Errorf("certificate %s from trustd: it is for another key", l.cfg.Profile)
	}
	chain := [][]byte{block.Bytes}
	for rest := []byte(resp.GetChain()); ; {
		var c *pem.Block
		if c, rest = pem.Decode(rest); c == nil {
			break
		}
		chain = append(chain, c.Bytes)
	}
	l.cell.Set(&Pair{
		TLS:         &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf},
		Certificate: []byte(resp.GetCertificate()), CA: []byte(resp.GetCa()), names: names,
	})
	if l.cfg.Expiry != nil {
		l.cfg.Expiry.Set(float64(leaf.NotAfter.Unix()), l.cfg.Profile)
	}
	l.cfg.Trust.tell()
	l.cfg.Log.Info("certificate signed", "profile", l.cfg.Profile, "serial", leaf.SerialNumber.Text(16), "expires", leaf.NotAfter.Format(time.RFC3339))
	return nil
}
