package apid

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	_ "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

func TestHolds(t *testing.T) {
	const reader, operator, admin, backup = authv1.Role_READER, authv1.Role_OPERATOR, authv1.Role_ADMIN, authv1.Role_ETCD_BACKUP
	for _, c := range []struct {
		roles string
		need  []authv1.Role
		want  bool
	}{
		{"reader", []authv1.Role{reader}, true},
		{"operator", []authv1.Role{reader}, true},
		{"admin", []authv1.Role{reader}, true},
		{"etcd-backup", []authv1.Role{reader}, false},
		{"reader", []authv1.Role{operator}, false},
		{"operator", []authv1.Role{operator}, true},
		{"admin", []authv1.Role{operator}, true},
		{"operator", []authv1.Role{admin}, false},
		{"admin", []authv1.Role{backup}, false},
		{"etcd-backup", []authv1.Role{backup, admin}, true},
		{"admin", []authv1.Role{backup, admin}, true},
		{"reader etcd-backup", []authv1.Role{backup}, true},
		{"admin", nil, false},
		{"admin", []authv1.Role{authv1.Role_INTERNAL}, false},
		{"admin", []authv1.Role{authv1.Role_ROLE_UNSPECIFIED}, false},
		{"", []authv1.Role{reader}, false},
		{"root", []authv1.Role{reader}, false},
	} {
		if got := holds(strings.Fields(c.roles), c.need); got != c.want {
			t.Errorf("%q for %v: %v", c.roles, c.need, got)
		}
	}
}

func TestAllow(t *testing.T) {
	read := &route{service: "s", method: "Get", need: []authv1.Role{authv1.Role_READER}}
	change := &route{service: "s", method: "Set", need: []authv1.Role{authv1.Role_OPERATOR, authv1.Role_ADMIN}}
	claim := &route{service: "trust.v1.Claim", method: "Claim", need: []authv1.Role{authv1.Role_CLAIM}}
	unlock := &route{service: "storage.v1.Unlock", method: "Unlock", need: []authv1.Role{authv1.Role_UNLOCK}}
	for _, c := range []struct {
		name    string
		route   *route
		roles   []string
		auth    error
		claimed bool
		kind    errs.Kind
		text    string // "": allowed
	}{
		{"unlock before the claim", unlock, nil, errStranger, false, errs.Unauthenticated, errStranger.Error()},
		{"unlock by a stranger", unlock, nil, errStranger, true, errs.Unauthenticated, errStranger.Error()},
		{"unlock by an operator", unlock, []string{"operator"}, nil, true, errs.Denied, `/storage.v1.Unlock/Unlock needs role admin; "ann" has operator, no other`},
		{"unlock by an administrator", unlock, []string{"admin"}, nil, true, 0, ""},
		{"reader reads", read, []string{"reader"}, nil, true, 0, ""},
		{"reader changes", change, []string{"reader"}, nil, true, errs.Denied, `/s/Set needs role operator or admin; "ann" has reader, no other`},
		{"nobody reads", read, nil, errStranger, true, errs.Unauthenticated, errStranger.Error()},
		{"nobody calls what is not there", nil, nil, errStranger, true, errs.Unauthenticated, errStranger.Error()},
		{"admin calls what is not there", nil, []string{"admin"}, nil, true, errs.Internal, "there is no such method for callers from outside of the node"},
		{"claim", claim, nil, errStranger, false, 0, ""},
		{"claim of an owned node", claim, nil, errStranger, true, errs.Precondition, "this node has an owner already; ask them for credentials"},
		{"read before the claim", read, nil, errStranger, false, errs.Unauthenticated, errStranger.Error()},
	} {
		err := allow(c.route, identity{name: "ann", roles: c.roles}, c.auth, &trustv1.TrustState{Claimed: c.claimed})
		if c.text == "" && err != nil || c.text != "" && (errs.Text(err) != c.text || errs.Of(err) != c.kind) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	locked := &trustv1.TrustState{Locked: true}
	for r, allowed := range map[*route]bool{unlock: true, claim: false, read: false, change: false, nil: false} {
		if err := allow(r, identity{}, errStranger, locked); (err == nil) != allowed || err != nil && !strings.Contains(err.Error(), "bhctl unlock") {
			t.Errorf("while STATE is locked, %v: %v", r, err)
		}
	}
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-48 * time.Hour),
		NotAfter: time.Now().Add(48 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// sign returns a certificate for a public key.
func (a *authority) sign(t testing.TB, public any, subject pkix.Name, usage x509.ExtKeyUsage, from, to time.Time, names ...string) *x509.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: subject, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, DNSNames: append([]string{"bulkhead"}, names...)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestFromCertificate(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	now := time.Now()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	subject := pkix.Name{CommonName: "ann", Organization: []string{"bulkhead:admin", "bulkhead:king", "system:masters", "reader"}}
	make := func(a *authority, usage x509.ExtKeyUsage, from, to time.Duration) []*x509.Certificate {
		return []*x509.Certificate{a.sign(t, key.Public(), subject, usage, now.Add(from), now.Add(to))}
	}
	const client, server = x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth
	many := make(ours, client, -time.Hour, time.Hour)
	for len(many) <= maxChain {
		many = append(many, many[0])
	}
	for _, c := range []struct {
		name  string
		chain []*x509.Certificate
		roots *x509.CertPool
		text  string
	}{
		{"ours", make(ours, client, -time.Hour, time.Hour), ours.pool(), ""},
		{"none", nil, ours.pool(), errStranger.Error()},
		{"nobody owns the node", make(ours, client, -time.Hour, time.Hour), nil, errStranger.Error()},
		{"foreign", make(theirs, client, -time.Hour, time.Hour), ours.pool(), errStranger.Error()},
		{"expired", make(ours, client, -2*time.Hour, -time.Hour), ours.pool(), "your certificate expired at "},
		{"foreign and expired", make(theirs, client, -2*time.Hour, -time.Hour), ours.pool(), errStranger.Error()},
		{"not yet", make(ours, client, time.Hour, 2*time.Hour), ours.pool(), "your certificate is valid from "},
		{"foreign and not yet", make(theirs, client, time.Hour, 2*time.Hour), ours.pool(), errStranger.Error()},
		{"a server's", make(ours, server, -time.Hour, time.Hour), ours.pool(), errStranger.Error()},
		{"a long chain", many, ours.pool(), errStranger.Error()},
	} {
		id, err := fromCertificate(c.chain, c.roots, now)
		if c.text != "" {
			if !errs.Is(err, errs.Unauthenticated) || !strings.HasPrefix(errs.Text(err), c.text) {
				t.Errorf("%s: %v, want %q", c.name, err, c.text)
			}
			continue
		}
		if err != nil || id.name != "ann" || fmt.Sprint(id.roles) != "[admin]" {
			t.Errorf("%s: %+v, %v", c.name, id, err)
		}
	}
}

func TestFromToken(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	keys := []*trustv1.TokenKey{{Id: "k1", PublicKey: der}}
	now := time.Now()
	good := func() jwt.MapClaims {
		return jwt.MapClaims{"iss": "bulkhead", "aud": "bulkhead-api", "sub": "ci", "roles": []string{"reader", "king", "reader"}, "exp": now.Add(time.Hour).Unix(), "jti": "1"}
	}
	without := func(k string) jwt.MapClaims { c := good(); delete(c, k); return c }
	with := func(k string, v any) jwt.MapClaims { c := good(); c[k] = v; return c }
	sign := func(m jwt.SigningMethod, kid string, c jwt.MapClaims, key any) string {
		tok := jwt.NewWithClaims(m, c)
		tok.Header["kid"] = kid
		text, err := tok.SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	eddsa := jwt.SigningMethodEdDSA
	for _, c := range []struct {
		name, token, text string
		keys              []*trustv1.TokenKey
	}{
		{"ours", sign(eddsa, "k1", good(), private), "", keys},
		{"no keys yet", sign(eddsa, "k1", good(), private), errStranger.Error(), nil},
		{"unknown key", sign(eddsa, "k2", good(), private), errStranger.Error(), keys},
		{"another's key", sign(eddsa, "k1", good(), other), errStranger.Error(), keys},
		{"another's key, expired", sign(eddsa, "k1", with("exp", now.Add(-time.Hour).Unix()), other), errStranger.Error(), keys},
		{"expired", sign(eddsa, "k1", with("exp", now.Add(-time.Hour).Unix()), private), "your token expired at ", keys},
		{"never expires", sign(eddsa, "k1", without("exp"), private), errStranger.Error(), keys},
		{"other issuer", sign(eddsa, "k1", with("iss", "https://kubernetes"), private), errStranger.Error(), keys},
		{"no issuer", sign(eddsa, "k1", without("iss"), private), errStranger.Error(), keys},
		{"other audience", sign(eddsa, "k1", with("aud", "etcd"), private), errStranger.Error(), keys},
		{"no audience", sign(eddsa, "k1", without("aud"), private), errStranger.Error(), keys},
		{"nobody", sign(eddsa, "k1", without("sub"), private), errStranger.Error(), keys},
		{"unsigned", sign(jwt.SigningMethodNone, "k1", good(), jwt.UnsafeAllowNoneSignatureType), errStranger.Error(), keys},
		{"public key as HMAC secret", sign(jwt.SigningMethodHS256, "k1", good(), []byte(public)), errStranger.Error(), keys},
		{"garbage", "a.b.c", errStranger.Error(), keys},
		{"empty", "", errStranger.Error(), keys},
		{"long", strings.Repeat("a", maxToken+1), errStranger.Error(), keys},
	} {
		id, err := fromToken(c.token, c.keys, now)
		if c.text != "" {
			if !errs.Is(err, errs.Unauthenticated) || !strings.HasPrefix(errs.Text(err), c.text) {
				t.Errorf("%s: %v, want %q", c.name, err, c.text)
			}
			continue
		}
		if err != nil || id.name != "ci" || fmt.Sprint(id.roles) != "[reader]" {
			t.Errorf("%s: %+v, %v", c.name, id, err)
		}
	}
}

// Every method of ours says who may call it; services for the inside say INTERNAL and nothing else, those for the outside never do.
func TestEveryMethodNamesItsNeed(t *testing.T) {
	routes := madeRoutes()
	n := 0
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if o := f.Options(); !strings.Contains(fmt.Sprint(o), "github.com/bulkhead-os/bulkhead") {
			return true
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				n++
				need := needOf(m)
				name := "/" + string(s.FullName()) + "/" + string(m.Name())
				if len(need) == 0 {
					t.Errorf("%s: nobody may call it: give it option (auth.v1.need)", name)
					continue
				}
				internal := 0
				for _, r := range need {
					if _, ok := authv1.Role_name[int32(r)]; !ok || r == authv1.Role_ROLE_UNSPECIFIED {
						t.Errorf("%s: needs %v, which is no role", name, r)
					}
					if r == authv1.Role_INTERNAL {
						internal++
					}
				}
				if internal != 0 && internal != len(need) {
					t.Errorf("%s: INTERNAL and something else", name)
				}
				r := routes[name]
				if (r != nil) != (internal == 0) {
					t.Errorf("%s: internal %v, but has a route: %v (a public service needs option (auth.v1.served_by))", name, internal > 0, r != nil)
				}
			}
		}
		return true
	})
	if n < 20 {
		t.Errorf("only %d methods are linked", n)
	}
}
