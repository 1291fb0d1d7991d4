package apid

import (
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// identity is a caller whose credentials were checked.
type identity struct {
	name    string
	roles   []string  // "admin", "operator", "reader", "etcd-backup", or a node's; with grants.resolve the document's too. Others are dropped
	expires time.Time // of the credentials
	id      string    // serial of the certificate, or id of the token
	node    string    // the node that it is; "" for people and programs
	key     string    // digest of that node's own key, so that another node that gets its name later is not taken for it
	control bool      // that node is a control plane

	how    string    // how it showed who it is
	groups []string  // of who signed in at the issuer
	custom []string  // names in the credentials that may be roles of the document
	may    []*custom // those that are, see grants.resolve
}

// How callers show who they are, as access.v1.WhoAmIResponse has it.
const (
	howCertificate = "certificate"
	howToken       = "token"
	howIssuer      = "oidc"
	howForwarded   = "forwarded"
)

// Of certificates and tokens; trustd makes them.
const (
	rolePrefix    = "bulkhead:"
	tokenIssuer   = "bulkhead"
	tokenAudience = "bulkhead-api"
	maxToken      = 4 << 10 // bytes
	maxChain      = 4       // certificates from a client
	tokenLeeway   = 10 * time.Second
)

// roleNames are the roles as credentials write them.
var roleNames = map[authv1.Role]string{
	authv1.Role_ADMIN: "admin", authv1.Role_OPERATOR: "operator", authv1.Role_READER: "reader", authv1.Role_ETCD_BACKUP: "etcd-backup", authv1.Role_UNLOCK: "admin",
	authv1.Role_NODE: peer.RoleNode, authv1.Role_KNOWN: "of people and programs",
}

// personal are the roles that people and programs can have.
var personal = config.BuiltinRoles

// holders lists, for a role that a method needs, who holds it. What is not in it is held by nobody.
var holders = map[authv1.Role][]string{
	authv1.Role_READER:      {"reader", "operator", "admin"},
	authv1.Role_OPERATOR:    {"operator", "admin"},
	authv1.Role_ADMIN:       {"admin"},
	authv1.Role_ETCD_BACKUP: {"etcd-backup"},
	authv1.Role_UNLOCK:      {"admin"}, // while the owner is known
	authv1.Role_NODE:        {peer.RoleNode},
}

// holds reports whether one of the caller's roles is among those that a method needs.
func holds(roles []string, need []authv1.Role) bool {
	for _, n := range need {
		for _, h := range holders[n] {
			if slices.Contains(roles, h) {
				return true
			}
		}
	}
	return false
}

// errStranger is the only thing that callers without credentials learn.
var errStranger = errs.New(errs.Unauthenticated, "no valid credentials: call with a client certificate or a bearer token of this cluster")

// errLocked is what everybody learns while STATE is locked.
var errLocked = errs.New(errs.Precondition, "the node's volume STATE is locked, so it is not known who may call; unlock it with its recovery key: bhctl unlock")

// errNoMethod is what callers with credentials get for methods that are not there, or for daemons only.
var errNoMethod = status.Error(codes.Unimplemented, "there is no such method for callers from outside of the node")

// allow decides about one call. r is nil for methods without a route. It is pure.
func allow(r *route, who identity, authErr error, trust *trustv1.TrustState) error {
	if r != nil && slices.Contains(r.need, authv1.Role_CLAIM) {
		switch {
		case trust.GetClaimed():
			return errs.New(errs.Precondition, "this node has an owner already; ask them for credentials")
		case trust.GetLocked():
			return errs.New(errs.Precondition, "the node's volume STATE is locked, so its owner is not known; unlock it with its recovery key: bhctl unlock")
		}
		return nil
	}
	if r != nil && slices.Contains(r.need, authv1.Role_JOIN) && !trust.GetLocked() {
		if !trust.GetClaimed() {
			return errs.New(errs.Precondition, "nobody owns this node: it is in no cluster that could be joined")
		}
		return nil // the method itself checks the proof
	}
	if trust.GetLocked() { // nobody can be recognised, but who has the key
		if r != nil && slices.Contains(r.need, authv1.Role_UNLOCK) {
			return nil
		}
		return errLocked
	}
	if r != nil && trust.GetClaimed() && slices.Contains(r.need, authv1.Role_ANYBODY) {
		return nil
	}
	if authErr != nil {
		return authErr
	}
	if r == nil {
		return errNoMethod
	}
	if slices.Contains(r.need, authv1.Role_KNOWN) && !slices.Contains(who.roles, peer.RoleNode) {
		return nil
	}
	if !holds(who.roles, r.need) && !who.mayCall(r) {
		var names []string
		for _, n := range r.need {
			names = append(names, roleNames[n])
		}
		return errs.New(errs.Denied, "%s needs role %s; %q has %s", r.name(), strings.Join(names, " or "), who.name, strings.Join(append(slices.Clone(who.roles), "no other"), ", "))
	}
	return nil
}

// fromCertificate checks a client's chain. Texts of errors name nothing but what the caller sent. It is pure.
func fromCertificate(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) (identity, error) {
	if len(chain) == 0 || roots == nil {
		return identity{}, errStranger
	}
	if len(chain) > maxChain {
		return identity{}, errStranger
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		// Only the holder of a certificate that was valid once is told that it expired.
		late := chain[0].NotAfter.Add(-time.Second)
		if _, e := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: late, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); e == nil && now.After(late) {
			return identity{}, errExpired(chain[0].NotAfter, now)
		}
		// And that it is not valid yet: then one of the two clocks is wrong, which nobody would guess.
		early := chain[0].NotBefore.Add(time.Second)
		if _, e := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: early, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); e == nil && now.Before(early) {
			return identity{}, errNotYet(chain[0].NotBefore, now)
		}
		return identity{}, errStranger
	}
	id := identity{how: howCertificate, name: chain[0].Subject.CommonName, key: chain[0].Subject.SerialNumber, expires: chain[0].NotAfter, id: chain[0].SerialNumber.Text(16)}
	var roles []string
	for _, o := range chain[0].Subject.Organization {
		if role, ok := strings.CutPrefix(o, rolePrefix); ok {
			roles = append(roles, role)
		}
	}
	return id, id.take(roles)
}

// take gives an identity the roles of its certificate: a node's or a person's, never some of both.
func (id *identity) take(roles []string) error {
	node, named := strings.CutPrefix(id.name, peer.NodePrefix)
	if !named && !slices.ContainsFunc(roles, nodeRole) {
		id.roles, id.custom = known(roles), unknown(roles)
		return nil
	}
	slices.Sort(roles)
	switch {
	case !named || node == "":
		return errStranger
	case slices.Equal(roles, []string{peer.RoleNode, peer.RoleControlPlane}):
		id.control = true
	case !slices.Equal(roles, []string{peer.RoleNode, peer.RoleWorker}):
		return errStranger
	}
	id.node, id.roles = node, roles
	return nil
}

// nodeRole reports whether a role is for nodes.
func nodeRole(role string) bool {
	return role == peer.RoleNode || strings.HasPrefix(role, peer.RoleNode+"-")
}

// admit decides about somebody whose credentials are good by themselves: they may be revoked, and a node must be one of this cluster's.
// Who had good credentials may know why they are not. It is pure.
func admit(id identity, trust *trustv1.TrustState) error {
	if slices.Contains(trust.GetRevoked(), id.id) {
		return errs.New(errs.Unauthenticated, "your credentials (%s) were revoked; ask an administrator for new ones", id.id)
	}
	if id.node == "" {
		return nil
	}
	for _, n := range trust.GetNodes() {
		if n.GetName() == id.node && n.GetKey() == id.key && (n.GetRole() == controlPlane) == id.control {
			return nil
		}
	}
	return errs.New(errs.Unauthenticated, "%q is no node of this cluster with the role that its certificate names, or not known here yet", id.node)
}

// controlPlane is a role of nodes as trustd and the document write it.
const controlPlane = "controlplane"

// fromToken checks a bearer token. It is pure.
func fromToken(text string, keys []*trustv1.TokenKey, now time.Time) (identity, error) {
	if len(text) > maxToken || len(keys) == 0 {
		return identity{}, errStranger
	}
	var claims struct {
		jwt.RegisteredClaims
		Roles []string `json:"roles"`
	}
	p := jwt.NewParser(jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}), jwt.WithIssuer(tokenIssuer), jwt.WithAudience(tokenAudience),
		jwt.WithExpirationRequired(), jwt.WithLeeway(tokenLeeway), jwt.WithTimeFunc(func() time.Time { return now }))
	_, err := p.ParseWithClaims(text, &claims, func(t *jwt.Token) (any, error) {
		for _, k := range keys {
			if k.GetId() == t.Header["kid"] {
				public, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
				if err != nil {
					return nil, err
				}
				if e, ok := public.(ed25519.PublicKey); ok {
					return e, nil
				}
			}
		}
		return nil, fmt.Errorf("no such key")
	})
	switch {
	// The signature is checked before the claims: a forger learns nothing here.
	case errors.Is(err, jwt.ErrTokenExpired) && !errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return identity{}, errs.New(errs.Unauthenticated, "your token expired at %s", claims.ExpiresAt.UTC().Format(time.RFC3339))
	case err != nil || claims.Subject == "" || strings.HasPrefix(claims.Subject, peer.NodePrefix):
		return identity{}, errStranger
	}
	return identity{how: howToken, name: claims.Subject, roles: known(claims.Roles), custom: unknown(claims.Roles), expires: claims.ExpiresAt.Time, id: claims.ID}, nil
}

// known drops what is no role of people, and repetitions.
func known(roles []string) []string {
	var out []string
	for _, r := range roles {
		if slices.Contains(personal, r) && !slices.Contains(out, r) {
			out = append(out, r)
		}
	}
	return out
}
