package config

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"path"
	"slices"
	"strings"
)

// Access is who may do what.
type Access struct {
	Roles    []CustomRole `yaml:"roles,omitempty"`
	Bindings []Binding    `yaml:"bindings,omitempty"`
	// OIDC is the issuer whose ID tokens are taken; the zero value takes none.
	OIDC OIDC `yaml:"oidc,omitempty"`
}

// BuiltinRoles are the roles that there are without a document. The slice must not be changed.
var BuiltinRoles = []string{"admin", "operator", "reader", "etcd-backup"}

// CustomRole is a role that a document makes.
type CustomRole struct {
	Name string `yaml:"name"` // required
	// Allow are patterns of methods, "SERVICE/METHOD"; * stands for any characters but "/". Required.
	Allow []string `yaml:"allow"`
	// Nodes says on which nodes; the zero value is all.
	Nodes NodeSelector `yaml:"nodes,omitempty"`
}

// NodeSelector chooses nodes by their names or by their roles, never by both. The zero value chooses all.
type NodeSelector struct {
	Names []string `yaml:"names,omitempty"` // * stands for any characters
	Roles []Role   `yaml:"roles,omitempty"`
}

// Binding gives a role to people who sign in at the issuer. Certificates and tokens say themselves which roles they have.
type Binding struct {
	Role   string   `yaml:"role"`             // required
	Users  []string `yaml:"users,omitempty"`  // with OIDC.UsernamePrefix
	Groups []string `yaml:"groups,omitempty"` // with OIDC.GroupsPrefix
}

// OIDC is an OpenID Connect issuer (OpenID Connect Core 1.0).
type OIDC struct {
	Issuer         string `yaml:"issuer"`                   // https URL; required
	ClientID       string `yaml:"clientID"`                 // required
	Audience       string `yaml:"audience,omitempty"`       // default: ClientID
	UsernameClaim  string `yaml:"usernameClaim,omitempty"`  // default: "sub"
	GroupsClaim    string `yaml:"groupsClaim,omitempty"`    // default: "groups"
	UsernamePrefix string `yaml:"usernamePrefix,omitempty"` // default: "oidc:"
	GroupsPrefix   string `yaml:"groupsPrefix,omitempty"`   // default: "oidc:"
	CA             string `yaml:"ca,omitempty"`             // PEM; default: the authorities in the image
}

// Wanted reports whether there is an issuer.
func (o OIDC) Wanted() bool { return o.Issuer != "" }

// standardMethods are those of gRPC's own services, which apid serves.
var standardMethods = []string{
	"grpc.health.v1.Health/Check", "grpc.health.v1.Health/List", "grpc.health.v1.Health/Watch",
	"grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}

// Grantable returns all methods that a custom role can be given, "service/method". The slice is the caller's.
func Grantable() []string { return slices.Concat(grantable, standardMethods) }

// Methods returns the methods that a role may call, "service/method", each once. The slice is the caller's.
func (r CustomRole) Methods() []string {
	return slices.DeleteFunc(Grantable(), func(m string) bool {
		return !slices.ContainsFunc(r.Allow, func(p string) bool { return matches(p, m) })
	})
}

// Has reports whether a node is chosen. name and role may be "" while the node has none: then only a selector that chooses all has it.
func (n NodeSelector) Has(name string, role Role) bool {
	if len(n.Names) == 0 && len(n.Roles) == 0 {
		return true
	}
	return slices.Contains(n.Roles, role) || name != "" && slices.ContainsFunc(n.Names, func(p string) bool { return matches(p, name) })
}

// matches: what isMethodPattern and isNodePattern let in has no special characters of path.Match but *.
func matches(pattern, name string) bool {
	ok, err := path.Match(strings.TrimPrefix(pattern, "/"), name)
	return ok && err == nil
}

// access checks what lies between the fields of Access.
func (c *checker) access(a *Access) {
	roles := slices.Clone(BuiltinRoles)
	for i, r := range a.Roles {
		at := index("Access.roles", i)
		if j := slices.IndexFunc(a.Roles, func(o CustomRole) bool { return o.Name == r.Name }); j < i {
			c.add(at+".name", "%q stands here twice; the first is %s", r.Name, index("Access.roles", j))
		}
		roles = append(roles, r.Name)
		if len(r.Allow) == 0 {
			c.add(at+".allow", "is empty: the role may do nothing; allowed: %s", rule(at+".allow").allowed)
		}
		unique(c, at+".allow", r.Allow)
		for j, p := range r.Allow {
			if text := unknownPattern(p); text != "" && isMethodPattern(p) {
				c.add(index(at+".allow", j), "%q %s", p, text)
			}
		}
		if len(r.Nodes.Names) > 0 && len(r.Nodes.Roles) > 0 {
			c.add(at+".nodes", "has names and roles; allowed is one of them: make two roles")
		}
		unique(c, at+".nodes.names", r.Nodes.Names)
		unique(c, at+".nodes.roles", r.Nodes.Roles)
	}
	for i, b := range a.Bindings {
		at := index("Access.bindings", i)
		if !slices.Contains(roles, b.Role) && isLabel(b.Role) {
			c.add(at+".role", "%q: %s", b.Role, noSuch("role", b.Role, roles))
		}
		if len(b.Users)+len(b.Groups) == 0 {
			c.add(at, "names nobody; it needs users or groups")
		}
		if !a.OIDC.Wanted() {
			c.add(at, "is for people who sign in at an issuer, and there is none; add oidc, or remove it")
		}
		unique(c, at+".users", b.Users)
		unique(c, at+".groups", b.Groups)
		c.prefixed(at+".users", b.Users, "usernamePrefix", a.OIDC.UsernamePrefix)
		c.prefixed(at+".groups", b.Groups, "groupsPrefix", a.OIDC.GroupsPrefix)
	}
}

// prefixed wants names to be such that somebody can have them.
func (c *checker) prefixed(at string, names []string, field, prefix string) {
	for i, n := range names {
		if !strings.HasPrefix(n, prefix) {
			c.add(index(at, i), "%q is nobody's: all begin with Access.oidc.%s; write %q", n, field, prefix+n)
		}
	}
}

// maxNear bounds how many names a message offers.
const maxNear = 3

// unknownPattern says why a pattern names nothing that a role can be given; "" if it does.
func unknownPattern(p string) string {
	some := func(all []string) bool {
		return slices.ContainsFunc(all, func(m string) bool { return matches(p, m) })
	}
	switch {
	case some(Grantable()):
		return ""
	case some(ungrantable):
		return "is not given by roles: it is for daemons, for nodes, for who proves something, or for everybody; remove it"
	}
	want, method, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
	var services, methods []string
	for _, m := range Grantable() {
		service, name, _ := strings.Cut(m, "/")
		if !slices.Contains(services, service) {
			services = append(services, service)
		}
		if ok, err := path.Match(want, service); ok && err == nil {
			methods = append(methods, name)
		}
	}
	if len(methods) == 0 {
		return "matches nothing: there is no such service; nearest: " + strings.Join(nearest(want, services), ", ")
	}
	return "matches nothing: there is no such method of " + want + "; nearest: " + strings.Join(nearest(method, methods), ", ")
}

// nearest returns the few names that are most like what was written. Each * may stand for anything, so it costs nothing to leave it out.
func nearest(got string, names []string) []string {
	got = strings.ToLower(strings.ReplaceAll(got, "*", ""))
	got = got[:min(len(got), 64)]
	names = slices.Clone(names)
	slices.SortStableFunc(names, func(a, b string) int {
		return edits(got, strings.ToLower(a)) - edits(got, strings.ToLower(b))
	})
	return names[:min(len(names), maxNear)]
}

// isRoleName: roles of nodes are no one else's.
func isRoleName(s string) bool {
	return isLabel(s) && !slices.Contains(BuiltinRoles, s) && s != "node" && !strings.HasPrefix(s, "node-")
}

func isMethodPattern(s string) bool {
	service, method, ok := strings.Cut(strings.TrimPrefix(s, "/"), "/")
	return ok && len(s) <= 128 && only(service, "_.*") && only(method, "_*")
}

func isNodePattern(s string) bool {
	return len(s) <= 63 && only(s, "-.*") && strings.ToLower(s) == s
}

func isPrefix(s string) bool {
	name, ok := strings.CutSuffix(s, ":")
	return ok && len(name) <= 32 && only(name, "-_.") && name != "node"
}

// isIssuer: OpenID Connect Discovery 1.0 section 3 wants https, and neither query nor fragment.
func isIssuer(s string) bool {
	u, err := url.Parse(s)
	return err == nil && len(s) <= 255 && u.Scheme == "https" && u.User == nil && isName(u.Hostname()) && u.RawQuery == "" && !u.ForceQuery && u.Fragment == "" &&
		!strings.ContainsAny(s, " #")
}

func isAuthorities(s string) bool {
	rest, n := []byte(s), 0
	for len(s) <= 64<<10 {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if _, err := x509.ParseCertificate(b.Bytes); err != nil || b.Type != "CERTIFICATE" {
			return false
		}
		n++
	}
	return n > 0 && len(bytes.TrimSpace(rest)) == 0
}
