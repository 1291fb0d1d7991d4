package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const issuerLines = "\noidc: {issuer: \"https://login.example.org\", clientID: bulkhead}"

func TestAccessRefuses(t *testing.T) {
	role := func(allow string) string { return doc("Access", "roles:\n- name: a\n  allow: ["+allow+"]") }
	for _, c := range []struct{ name, in, want string }{
		{"a built-in role's name", doc("Access", "roles: [{name: reader, allow: [\"*/*\"]}]"),
			`n.yaml:3: Access.roles[0].name: "reader" is not valid; allowed: lower-case letters, digits and -, at most 63 characters, and no role that there is without it`},
		{"a node's role", doc("Access", "roles: [{name: node-worker, allow: [\"*/*\"]}]"),
			`n.yaml:3: Access.roles[0].name: "node-worker" is not valid; allowed: lower-case letters, digits and -, at most 63 characters, and no role that there is without it`},
		{"a role twice", doc("Access", "roles:\n- {name: a, allow: [\"*/*\"]}\n- {name: a, allow: [\"*/*\"]}"),
			`n.yaml:5: Access.roles[1].name: "a" stands here twice; the first is Access.roles[0]`},
		{"a role for nothing", role(""), `n.yaml:5: Access.roles[0].allow: is empty: the role may do nothing; allowed: SERVICE/METHOD with * for any characters, like "machine.v1.Machine/Get*"`},
		{"no such service", role("/bulkhead.machine.v1.Machine/Get*"),
			`n.yaml:5: Access.roles[0].allow[0]: "/bulkhead.machine.v1.Machine/Get*" matches nothing: there is no such service; nearest: machine.v1.Machine, update.v1.Update, cluster.v1.Rolling`},
		{"no such method", role("machine.v1.Machine/GetVersoin"),
			`n.yaml:5: Access.roles[0].allow[0]: "machine.v1.Machine/GetVersoin" matches nothing: there is no such method of machine.v1.Machine; nearest: GetVersion, GetAudit, GetHealth`},
		{"what is for nodes", role("trust.v1.Nodes/*, cluster.v1.Registry/Report"),
			`n.yaml:5: Access.roles[0].allow[0]: "trust.v1.Nodes/*" is not given by roles: it is for daemons, for nodes, for who proves something, or for everybody; remove it` + "\n" +
				`n.yaml:5: Access.roles[0].allow[1]: "cluster.v1.Registry/Report" is not given by roles: it is for daemons, for nodes, for who proves something, or for everybody; remove it`},
		{"no pattern", role("Reboot"), `n.yaml:5: Access.roles[0].allow[0]: "Reboot" is not valid; allowed: SERVICE/METHOD with * for any characters, like "machine.v1.Machine/Get*"`},
		{"nodes by names and roles", doc("Access", "roles: [{name: a, allow: [\"*/*\"], nodes: {names: [w1], roles: [worker]}}]"),
			`n.yaml:3: Access.roles[0].nodes: has names and roles; allowed is one of them: make two roles`},
		{"no nodes", doc("Access", "roles: [{name: a, allow: [\"*/*\"], nodes: {}}]"), `n.yaml:3: Access.roles[0].nodes: is empty; allowed: a mapping with names or roles`},
		{"a binding to nothing", doc("Access", "bindings: [{role: raeder, users: [\"oidc:ann\"]}]"+issuerLines),
			`n.yaml:3: Access.bindings[0].role: "raeder": no such role; nearest is reader; there are admin, operator, reader, etcd-backup`},
		{"a binding of nobody", doc("Access", "bindings: [{role: reader}]"+issuerLines), `n.yaml:3: Access.bindings[0]: names nobody; it needs users or groups`},
		{"a binding without an issuer", doc("Access", "bindings: [{role: reader, users: [ann]}]"),
			`n.yaml:3: Access.bindings[0]: is for people who sign in at an issuer, and there is none; add oidc, or remove it`},
		{"a name without its prefix", doc("Access", "bindings: [{role: reader, groups: [platform]}]"+issuerLines),
			`n.yaml:3: Access.bindings[0].groups[0]: "platform" is nobody's: all begin with Access.oidc.groupsPrefix; write "oidc:platform"`},
		{"an issuer in the clear", doc("Access", "oidc: {issuer: \"http://a\", clientID: b}"),
			`n.yaml:3: Access.oidc.issuer: "http://a" is not valid; allowed: a URL like "https://login.example.org/realm"`},
		{"nodes' prefix", doc("Access", "oidc: {issuer: \"https://a\", clientID: b, usernamePrefix: \"node:\"}"),
			`n.yaml:3: Access.oidc.usernamePrefix: "node:" is not valid; allowed: letters, digits, -, _ and . with : behind them, like "oidc:", and not "node:"`},
		{"no client", doc("Access", "oidc: {issuer: \"https://a\"}"), `n.yaml:3: Access.oidc.clientID: is missing; allowed: printable characters like "bulkhead", at most 128`},
		{"no certificate", doc("Access", "oidc: {issuer: \"https://a\", clientID: b, ca: x}"), `n.yaml:3: Access.oidc.ca: "x" is not valid; allowed: certificates in PEM, at most 64 KiB`},
	} {
		if _, err := Parse("n.yaml", []byte(c.in)); err == nil || err.Error() != c.want {
			t.Errorf("%s:\ngot  %v\nwant %s\ninput:\n%s", c.name, err, c.want, c.in)
		}
	}
}

// A pattern gives what it matches and is for people, and never what is for daemons and nodes.
func TestRoleMethods(t *testing.T) {
	all := CustomRole{Allow: []string{"*/*"}}.Methods()
	if len(all) < 60 || slices.ContainsFunc(all, func(m string) bool { return slices.Contains(ungrantable, m) }) {
		t.Errorf("*/* gives %q", all)
	}
	for pattern, want := range map[string]string{
		"machine.v1.Machine/GetVersion":  "machine.v1.Machine/GetVersion",
		"/machine.v1.Machine/GetVersion": "machine.v1.Machine/GetVersion",
		"etcd.v1.*/StreamSnap*":          "etcd.v1.Etcd/StreamSnapshot",
		"cluster.v1.Registry/*":          "cluster.v1.Registry/ListAuditAnchors cluster.v1.Registry/ListNodes cluster.v1.Registry/WatchNodes",
		"grpc.health.v1.Health/Check":    "grpc.health.v1.Health/Check",
	} {
		if got := strings.Join(CustomRole{Allow: []string{pattern}}.Methods(), " "); got != want {
			t.Errorf("%s gives %s, want %s", pattern, got, want)
		}
	}
}

func TestNodeSelector(t *testing.T) {
	names, roles := NodeSelector{Names: []string{"w1", "edge-*"}}, NodeSelector{Roles: []Role{Worker}}
	for _, c := range []struct {
		by   NodeSelector
		name string
		role Role
		want bool
	}{
		{NodeSelector{}, "", "", true}, {names, "w1", Worker, true}, {names, "edge-7", ControlPlane, true}, {names, "w11", Worker, false}, {names, "", Worker, false},
		{roles, "w1", Worker, true}, {roles, "w1", ControlPlane, false}, {roles, "", "", false},
	} {
		if got := c.by.Has(c.name, c.role); got != c.want {
			t.Errorf("%+v has %s, %s: %v", c.by, c.name, c.role, got)
		}
	}
}

// Certificates survive the way through machined, which writes the document anew for each daemon.
func TestIssuerAuthority(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	for _, ca := range []string{text, text + text, strings.TrimSpace(text), "\n" + text} {
		s, err := Parse("", []byte(doc("Access", "oidc:\n  issuer: https://a\n  clientID: b\n  ca: "+strconv.Quote(ca))))
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("", Section(s, KindAccess))
		if err != nil || again.Access.OIDC != s.Access.OIDC || s.Access.OIDC.CA != ca {
			t.Errorf("%q: %v\ngot %+v\nwant %+v", ca, err, again.Access, s.Access)
		}
	}
	for _, ca := range []string{text + "x", strings.Replace(text, "CERTIFICATE", "PRIVATE KEY", 2)} {
		if _, err := Parse("", []byte(doc("Access", "oidc:\n  issuer: https://a\n  clientID: b\n  ca: "+strconv.Quote(ca)))); err == nil {
			t.Errorf("%q was taken", ca)
		}
	}
}
