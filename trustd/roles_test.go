package trustd

import (
	"context"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Tokens and certificates can have roles that the document makes, while it makes them; and nobody but an administrator gives what they do not hold.
func TestCustomRoles(t *testing.T) {
	m := newMachine(t)
	m.mountState()
	d, as := m.serve()
	waitSettled(t, d)
	m.claim(d)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	trust := trustv1.NewTrustClient(as(uid.Apid))
	caller := func(roles ...string) context.Context {
		ctx := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "ann")
		for _, r := range roles {
			ctx = metadata.AppendToOutgoingContext(ctx, peer.RolesKey, r)
		}
		return ctx
	}
	tell := func(generation uint64, document string) {
		t.Helper()
		_, err := controlv1.NewControlClient(as(uid.Machined)).SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: generation, Documents: []byte(document)}})
		m.must(err)
	}
	mint := func(c context.Context, role string) error {
		_, err := trust.MintToken(c, &trustv1.MintTokenRequest{Name: "ci", Roles: []string{role}})
		return err
	}
	if err := mint(caller("admin"), "dns-team"); !errs.Is(err, errs.Invalid) {
		t.Errorf("before there is such a role: %v", err)
	}
	tell(1, "apiVersion: bulkhead.dev/v1\nkind: Access\nroles:\n- {name: dns-team, allow: [\"network.v1.*/*\"]}\n- {name: minters, allow: [trust.v1.Trust/MintToken]}\n")
	m.must(mint(caller("admin"), "dns-team"))
	_, csr := request(t, x509.CertificateRequest{})
	signed, err := trust.IssueCertificate(caller("admin"), &trustv1.IssueCertificateRequest{Csr: csr, Name: "ann", Roles: []string{"dns-team", "reader"}})
	m.must(err)
	cert, err := x509.ParseCertificate(signed.GetCertificate())
	m.must(err)
	if got := cert.Subject.Organization; len(got) != 2 || !slices.Contains(got, "bulkhead:dns-team") || !slices.Contains(got, "bulkhead:reader") {
		t.Errorf("the certificate is for %q", got)
	}
	keys, _ := d.keys.Get()
	made := keys.os.cert.NotBefore
	if cert.NotBefore.Equal(made) {
		t.Error("a certificate that nobody asked for as break-glass is as old as the authority")
	}
	old := &trustv1.IssueCertificateRequest{Csr: csr, Name: "ann", Roles: []string{"reader"}, BreakGlass: true}
	if _, err := trust.IssueCertificate(caller("admin"), old); !errs.Is(err, errs.Invalid) || !strings.Contains(errs.Text(err), "role admin") {
		t.Errorf("break-glass for a reader: %v", err)
	}
	old.Roles = []string{"admin"}
	if _, err := trust.IssueCertificate(caller("minters"), old); !errs.Is(err, errs.Denied) {
		t.Errorf("break-glass from who is no administrator: %v", err)
	}
	signed, err = trust.IssueCertificate(caller("admin"), old)
	m.must(err)
	cert, err = x509.ParseCertificate(signed.GetCertificate())
	m.must(err)
	if !cert.NotBefore.Equal(made) || time.Until(cert.NotAfter) > day {
		t.Errorf("break-glass is valid from %s to %s", cert.NotBefore, cert.NotAfter)
	}
	m.must(mint(caller("minters"), "minters"))
	for _, role := range []string{"admin", "reader", "dns-team"} {
		if err := mint(caller("minters"), role); !errs.Is(err, errs.Denied) {
			t.Errorf("%s by who does not hold it: %v", role, err)
		}
	}
	for _, role := range []string{"node", "node-controlplane", "dns"} {
		if err := mint(caller("admin"), role); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "dns-team") {
			t.Errorf("%s: %v", role, err)
		}
	}
	tell(2, "")
	if err := mint(caller("admin"), "dns-team"); !errs.Is(err, errs.Invalid) {
		t.Errorf("after there was such a role: %v", err)
	}
}

// The owner can get in to a machine that says it is 1990: the certificate is as old as the authority, and the node's own is one that can be valid.
func TestClockBehindAuthority(t *testing.T) {
	m := newMachine(t)
	m.mountState()
	d := m.start()
	resp := m.claim(d)
	ca, err := x509.ParseCertificate(resp.GetCa())
	m.must(err)
	owner, err := x509.ParseCertificate(resp.GetCertificate())
	m.must(err)
	if !owner.NotBefore.Equal(ca.NotBefore) {
		t.Errorf("the owner's certificate is valid from %s, the authority from %s", owner.NotBefore, ca.NotBefore)
	}
	k, _ := d.keys.Get()
	csr, _ := request(t, x509.CertificateRequest{})
	leaf, err := k.os.sign(csr.Public(), personal("x", nil, day), d.cfg.Random, ca.NotBefore.AddDate(-10, 0, 0))
	m.must(err)
	if !leaf.NotBefore.Equal(ca.NotBefore) || !leaf.NotAfter.Equal(ca.NotBefore.Add(day)) {
		t.Errorf("signed while the clock is behind: valid from %s to %s", leaf.NotBefore, leaf.NotAfter)
	}
}
