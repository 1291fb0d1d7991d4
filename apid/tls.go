package apid

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// identityCard is what the node shows to clients: a certificate of its own making until somebody owns it, trustd's from then on.
type identityCard struct {
	trust *leaf.Trust
	leaf  *leaf.Leaf
	now   func() time.Time

	mu   sync.Mutex
	self *tls.Certificate // guarded by mu; made when first needed, lives as long as the process
}

// wait returns when it is known which certificate to show.
func (i *identityCard) wait(ctx context.Context) error {
	for {
		roots, changed := i.trust.Roots()
		pair, signed := i.leaf.Pair()
		if roots.Known && (!roots.State.GetClaimed() || pair != nil) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-signed:
		}
	}
}

func (i *identityCard) certificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if roots, _ := i.trust.Roots(); roots.State.GetClaimed() {
		// Just after the claim the signature may take a moment; the handshake's deadline bounds it.
		pair, err := i.leaf.Wait(h.Context())
		if err != nil {
			return nil, err
		}
		return pair.TLS, nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.self == nil {
		var err error
		if i.self, err = selfSigned(i.now()); err != nil {
			return nil, err
		}
	}
	return i.self, nil
}

// selfSigned makes a certificate that nobody can trust and that says nothing about the node.
func selfSigned(now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "bulkhead unclaimed"}, DNSNames: []string{"bulkhead"},
		NotBefore: now.Add(-24 * time.Hour), NotAfter: now.Add(10 * 365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// config is that of the TCP listener. Client certificates are checked with each call and not in the handshake: who comes with an
// old or foreign one gets an answer that says so, and a connection does not outlive its certificate.
func (i *identityCard) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: i.certificate, ClientAuth: tls.RequestClientCert,
		NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
	}
}

// tlsConn is the grpc.AuthInfo of a connection over TCP.
type tlsConn struct {
	credentials.CommonAuthInfo
	state tls.ConnectionState
	conn  *gate.Conn // in the gate
	seen  atomic.Pointer[checked]
}

func (*tlsConn) AuthType() string { return "tls" }

// checked is the verdict about the connection's certificate under one state of trust.
type checked struct {
	roots *leaf.Roots
	at    time.Time
	who   identity
	err   error
}

// again is how long a certificate that was refused is not looked at again. Then it is: the clock may have been set.
const again = time.Second

// shows reports whether the client has shown a certificate, good or not. t may be nil: then there is no connection that could have one.
func (t *tlsConn) shows() bool { return t != nil && len(t.state.PeerCertificates) > 0 }

// who returns the identity in the connection's certificate. The signature is checked once, the time always.
func (t *tlsConn) who(roots *leaf.Roots, now time.Time) (identity, error) {
	c := t.seen.Load()
	if c == nil || c.roots != roots || c.err == nil && now.After(c.who.expires) || c.err != nil && now.Sub(c.at).Abs() >= again {
		c = &checked{roots: roots, at: now}
		if c.who, c.err = t.certified(roots, now); c.err == nil {
			c.err = admit(c.who, roots.State)
		}
		t.seen.Store(c)
	}
	return c.who, c.err
}

// still returns why the connection's certificate is not to be trusted any more, its age aside: nil if it is, and replaced if only its authority is another one.
func (t *tlsConn) still(roots *leaf.Roots, now time.Time) error {
	if len(t.state.PeerCertificates) == 0 {
		return nil
	}
	if end := t.state.PeerCertificates[0].NotAfter.Add(-time.Second); now.After(end) {
		now = end
	}
	who, err := t.certified(roots, now)
	if err != nil {
		return replaced{err}
	}
	return admit(who, roots.State)
}

// certified returns the identity in the connection's certificate. A clock that is behind the making of the authority is wrong, that is proved: the owner, whose
// certificate was made with the authority, must be let in to a machine whose battery is empty. It is judged by the time at which the authority was made. All
// others, nodes too, have to wait for the right time.
func (t *tlsConn) certified(roots *leaf.Roots, now time.Time) (identity, error) {
	who, err := fromCertificate(t.state.PeerCertificates, roots.OS, now)
	if err == nil || roots.OS == nil {
		return who, err
	}
	if made := authorityMade(roots.State.GetOsCa()); now.Before(made) {
		if owner, e := fromCertificate(t.state.PeerCertificates, roots.OS, made); e == nil && slices.Contains(owner.roles, "admin") {
			return owner, nil
		}
	}
	return who, err
}

// authorityMade is when the newest of the authorities (PEM) was made.
func authorityMade(text string) (made time.Time) {
	for rest := []byte(text); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return made
		}
		if c, err := x509.ParseCertificate(b.Bytes); err == nil && c.NotBefore.After(made) {
			made = c.NotBefore
		}
	}
}

// serverCreds ends TLS and ties the connection to its place in the gate.
type serverCreds struct{ config *tls.Config }

func (s serverCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c := tls.Server(raw, s.config)
	if err := c.HandshakeContext(context.Background()); err != nil { // grpc has set a deadline on the connection
		return nil, nil, errors.Join(err, raw.Close())
	}
	state := c.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		return nil, nil, errors.Join(fmt.Errorf("client speaks %q, not HTTP/2", state.NegotiatedProtocol), raw.Close())
	}
	info := &tlsConn{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, state: state}
	info.conn, _ = raw.(*gate.Conn)
	return c, info, nil
}

func (serverCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("apid: these credentials are for servers")
}
func (serverCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (s serverCreds) Clone() credentials.TransportCredentials { return s }
func (serverCreds) OverrideServerName(string) error           { return nil }
