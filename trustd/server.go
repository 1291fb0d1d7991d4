package trustd

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Of bearer tokens. apid checks the same.
const (
	tokenIssuer   = "bulkhead"
	tokenAudience = "bulkhead-api"
)

// grantable are the roles that people and programs can have: those that there always are, and those of the document.
func (d *Daemon) grantable() []string {
	sp, _ := d.spec.Get()
	return slices.Concat(config.BuiltinRoles, sp.roles)
}

// maxRoles bounds the roles in one credential.
const maxRoles = 8

type trustServer struct {
	trustv1.UnimplementedTrustServer
	d *Daemon
}

func (s trustServer) Bootstrap(context.Context, *trustv1.BootstrapRequest) (*trustv1.BootstrapResponse, error) {
	already, err := s.d.bootstrap()
	if err != nil {
		return nil, err
	}
	return &trustv1.BootstrapResponse{Already: already}, nil
}

// bootstrap makes the cluster's keys in one file: all of them or none.
func (d *Daemon) bootstrap() (already bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k, _ := d.keys.Get()
	if k.cluster != nil {
		return true, nil
	}
	sp, _ := d.spec.Get()
	switch {
	case k.worker():
		return false, errs.New(errs.Precondition, "bootstrap: this node is a worker of a cluster that there is already")
	case k.os == nil:
		return false, errs.New(errs.Precondition, "bootstrap: nobody owns this node; claim it first")
	case sp.generation == 0:
		return false, errs.New(errs.Precondition, "bootstrap: the node has no configuration; apply one first")
	case sp.role != config.ControlPlane:
		return false, errs.New(errs.Precondition, "bootstrap: the node's role is %q; the cluster is made on one of role %q", sp.role, config.ControlPlane)
	case d.where != durable:
		return false, errs.New(errs.Precondition, "bootstrap: volume STATE is not mounted; see the storage status")
	}
	c, data, err := newCluster(d.cfg.Random, d.cfg.Now())
	if err != nil {
		return false, err
	}
	if err := writeFile(d.folder(), clusterFile, data); err != nil {
		return false, err
	}
	next := *k
	next.cluster = c
	d.keys.Set(&next)
	d.publish()
	d.report()
	d.log.Info("cluster's authorities made")
	return false, nil
}

// authority says why a node cannot give credentials to people.
func (k *keyring) authority() error {
	switch {
	case k.worker():
		return errs.New(errs.Precondition, "node %q is a worker and has no authority: ask a control plane", k.node.name)
	case k.os == nil:
		return errs.New(errs.Precondition, "nobody owns this node; claim it first")
	}
	return nil
}

func (s trustServer) MintToken(ctx context.Context, r *trustv1.MintTokenRequest) (*trustv1.MintTokenResponse, error) {
	k, _ := s.d.keys.Get()
	if err := k.authority(); err != nil {
		return nil, err
	}
	if err := checkGrant(peer.CallerFrom(ctx), r.GetName(), r.GetRoles(), s.d.grantable()); err != nil {
		return nil, err
	}
	life, err := lifetime(r.GetTtlSeconds(), time.Hour, 30*day)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial(s.d.cfg.Random)
	if err != nil {
		return nil, err
	}
	now := s.d.cfg.Now()
	id, expires := serial.Text(16), now.Add(life).Truncate(time.Second)
	t := jwt.NewWithClaims(jwt.SigningMethodEdDSA, jwt.MapClaims{
		"iss": tokenIssuer, "aud": tokenAudience, "sub": r.GetName(), "roles": r.GetRoles(),
		"jti": id, "iat": now.Unix(), "exp": expires.Unix(),
	})
	t.Header["kid"] = k.tokens[0].id
	text, err := t.SignedString(k.tokens[0].private)
	if err != nil {
		return nil, err
	}
	s.d.count.tokens.Add(1)
	s.d.log.Info("token minted", "name", r.GetName(), "roles", strings.Join(r.GetRoles(), ","), "id", id, "expires", expires.Format(time.RFC3339))
	return &trustv1.MintTokenResponse{Token: text, Id: id, Expires: timestamppb.New(expires)}, nil
}

func (s trustServer) IssueCertificate(ctx context.Context, r *trustv1.IssueCertificateRequest) (*trustv1.IssueCertificateResponse, error) {
	k, _ := s.d.keys.Get()
	if err := k.authority(); err != nil {
		return nil, err
	}
	if err := checkGrant(peer.CallerFrom(ctx), r.GetName(), r.GetRoles(), s.d.grantable()); err != nil {
		return nil, err
	}
	if r.GetBreakGlass() && !slices.Contains(r.GetRoles(), "admin") {
		return nil, errs.New(errs.Invalid, "break_glass: is for certificates with the role admin; this one is to have %q", r.GetRoles())
	}
	life, err := lifetime(r.GetTtlSeconds(), day, ownerLife)
	if err != nil {
		return nil, err
	}
	csr, err := parseRequest(r.GetCsr())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	person := personal(r.GetName(), r.GetRoles(), life)
	person.old = r.GetBreakGlass()
	cert, err := k.os.sign(csr.PublicKey, person, s.d.cfg.Random, s.d.cfg.Now())
	if err != nil {
		return nil, err
	}
	s.d.remember("client", cert)
	return &trustv1.IssueCertificateResponse{
		Certificate: cert.Raw, Ca: k.os.cert.Raw, Serial: cert.SerialNumber.Text(16), Expires: timestamppb.New(cert.NotAfter),
	}, nil
}

// checkGrant says whether a caller may hand out these roles: an admin all of them, others what they hold. It is pure.
func checkGrant(c peer.Caller, name string, want, roles []string) error {
	if err := checkName(name); err != nil {
		return errs.New(errs.Invalid, "name: %w", err)
	}
	if len(want) == 0 || len(want) > maxRoles {
		return errs.New(errs.Invalid, "roles: %d roles; give 1 to %d of %q", len(want), maxRoles, roles)
	}
	for i, r := range want {
		if !slices.Contains(roles, r) || slices.Contains(want[:i], r) {
			return errs.New(errs.Invalid, "roles: %q; allowed are, once each, %q", r, roles)
		}
		if !slices.Contains(c.Roles, "admin") && !slices.Contains(c.Roles, r) {
			return errs.New(errs.Denied, "roles: %q: you cannot give what you do not hold; you hold %q", r, c.Roles)
		}
	}
	return nil
}

// lifetime checks a time asked for in seconds.
func lifetime(seconds uint64, standard, most time.Duration) (time.Duration, error) {
	if seconds == 0 {
		return standard, nil
	}
	if seconds > uint64(most/time.Second) {
		return 0, errs.New(errs.Invalid, "ttl_seconds: %d; allowed is at most %d (%s), 0 means %s", seconds, most/time.Second, most, standard)
	}
	return time.Duration(seconds) * time.Second, nil
}

func (s trustServer) ListCertificates(context.Context, *trustv1.ListCertificatesRequest) (*trustv1.ListCertificatesResponse, error) {
	k, _ := s.d.keys.Get()
	out := &trustv1.ListCertificatesResponse{}
	for _, a := range k.authorities() {
		out.Certificates = append(out.Certificates, describeAuthority(a.name, a.cert, true))
		if other := k.other(a); other != nil {
			out.Certificates = append(out.Certificates, describeAuthority(a.name, other.cert, false))
		}
	}
	if k.worker() {
		t, _ := s.d.trust.Get()
		out.Certificates = append(out.Certificates, trusted(t)...)
	}
	out.Certificates = append(out.Certificates, s.d.past.list()...)
	return out, nil
}

// trusted are the authorities of a node that has none of its own. What makes no sense is left out.
func trusted(t *trustv1.TrustState) []*trustv1.Certificate {
	var out []*trustv1.Certificate
	for _, a := range []struct{ name, pem string }{{"os-ca", t.GetOsCa()}, {"etcd-ca", t.GetEtcdCa()}, {"kubernetes-ca", t.GetKubernetesCa()}, {"front-proxy-ca", t.GetFrontProxyCa()}} {
		signs := true
		for rest := []byte(a.pem); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				continue
			}
			out = append(out, describeAuthority(a.name, cert, signs))
			signs = false
		}
	}
	return out
}

// describeAuthority says of an authority what it is, and whether it signs or is only trusted.
func describeAuthority(name string, cert *x509.Certificate, signs bool) *trustv1.Certificate {
	c := describe(name, cert)
	c.Pem, c.Generation, c.State = string(pemCert(cert.Raw)), generation(cert), "trusted"
	if signs {
		c.State = "signs"
	}
	return c
}

// authorities are those that sign.
func (k *keyring) authorities() []*authority {
	var out []*authority
	if k.os != nil {
		out = append(out, k.os)
	}
	if k.cluster != nil {
		out = append(out, k.cluster.etcd, k.cluster.kubernetes, k.cluster.frontProxy)
	}
	return out
}

type signerServer struct {
	trustv1.UnimplementedSignerServer
	d *Daemon
}

func (s signerServer) WatchTrust(_ *trustv1.WatchTrustRequest, out grpc.ServerStreamingServer[trustv1.TrustState]) error {
	if who, ok := peer.From(out.Context()); ok {
		done, err := s.d.ears.open(who)
		if err != nil {
			s.d.log.Warn("who listens is not kept", "err", err.Error())
		}
		defer done()
	}
	return s.d.trust.Watch(out.Context(), func(t *trustv1.TrustState) error {
		if t == nil {
			return nil
		}
		return out.Send(t)
	})
}

func (s signerServer) SignCertificate(ctx context.Context, r *trustv1.SignCertificateRequest) (*trustv1.SignCertificateResponse, error) {
	who, _ := peer.From(ctx) // the socket's list has let it in
	csr, err := parseRequest(r.GetCsr())
	if err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	if r.GetTtlSeconds() > uint64(ownerLife/time.Second) {
		return nil, errs.New(errs.Invalid, "ttl_seconds: %d is more than any profile allows", r.GetTtlSeconds())
	}
	k, _ := s.d.keys.Get()
	sp, err := s.d.specFor(k)
	if err != nil {
		return nil, err
	}
	if profiles[r.GetProfile()].kubelet && !k.worker() {
		list, _ := s.d.list.Get()
		sp, err = forKubelet(r.GetProfile(), csr, list, sp)
	}
	var l leaf
	if err == nil {
		l, err = decide(r.GetProfile(), who, csr, time.Duration(r.GetTtlSeconds())*time.Second, sp)
	}
	if errs.Is(err, errs.Precondition) { // too early is no offence
		return nil, err
	} else if err != nil {
		s.d.count.refused.Add(1)
		s.d.log.Warn("certificate refused", "user", who.Name(), "err", err.Error())
		return nil, err
	}
	if k.worker() {
		return s.d.signFar(ctx, k, r, csr.PublicKey)
	}
	if r.GetProfile() == "etcd-peer" {
		s.d.own.Set(ownAddresses(csr.IPAddresses))
	}
	ca := profiles[r.GetProfile()].ca(k)
	if ca == nil {
		return nil, errs.New(errs.Precondition, "profile %q: its authority does not exist yet; claim and bootstrap the node", r.GetProfile())
	}
	cert, err := ca.sign(csr.PublicKey, l, s.d.cfg.Random, s.d.cfg.Now())
	if err != nil {
		return nil, err
	}
	s.d.remember(r.GetProfile(), cert)
	return &trustv1.SignCertificateResponse{Certificate: string(pemCert(cert.Raw)), Ca: string(ca.pem), Chain: k.chain(ca)}, nil
}

// specFor is what the node's certificates are made from, or why none can be.
func (d *Daemon) specFor(k *keyring) (*spec, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	sp, _ := d.spec.Get()
	if err := misplaced(k.node, sp, d.others(k.node)); err != nil {
		return nil, err
	}
	return k.spec(sp), nil
}

// signed is the newest certificates that were signed, oldest overwritten first. The zero value is empty.
type signed struct {
	mu   sync.Mutex
	ring []*trustv1.Certificate // guarded by mu
	next int                    // guarded by mu
}

const maxSigned = 256

func (s *signed) add(c *trustv1.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ring) < maxSigned {
		s.ring = append(s.ring, c)
		return
	}
	s.ring[s.next] = c
	s.next = (s.next + 1) % maxSigned
}

// list returns them oldest first. The certificates must not be changed.
func (s *signed) list() []*trustv1.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Concat(s.ring[s.next:], s.ring[:s.next])
}

// remember notes a signed certificate for ListCertificates, the log and the figures.
func (d *Daemon) remember(profile string, c *x509.Certificate) {
	d.past.add(describe(profile, c))
	d.count.signed.Add(1, profile)
	d.log.Info("certificate signed", "profile", profile, "subject", c.Subject.String(), "serial", c.SerialNumber.Text(16), "expires", c.NotAfter.Format(time.RFC3339))
}

func describe(profile string, c *x509.Certificate) *trustv1.Certificate {
	sum := sha256.Sum256(c.Raw)
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return &trustv1.Certificate{
		Profile: profile, Subject: c.Subject.String(), Issuer: c.Issuer.String(), Serial: c.SerialNumber.Text(16),
		NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Sha256: hex.EncodeToString(sum[:]), Names: names,
	}
}

// folder is where keys are written. The caller holds d.mu.
func (d *Daemon) folder() string {
	if d.where == durable {
		return d.cfg.StateDir
	}
	return d.cfg.Runtime
}

// forgetCode removes the code once it is of no use. The caller holds d.mu.
func (d *Daemon) forgetCode() {
	if err := wipe(filepath.Join(d.cfg.Runtime, codeFile)); err != nil {
		d.log.Warn("claim code not wiped", "err", err.Error())
	}
}
