package trustd

import (
	"crypto/x509"
	"net"
	"strings"
	"testing"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// A control plane's kubeletd gets certificates for the kubelets of members, with the addresses that the cluster has seen, and for nobody else's.
func TestSignForKubelets(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n1.knows("n1", "n3")
	of := func(name string, addresses ...string) x509.CertificateRequest {
		r := x509.CertificateRequest{Subject: pkixName("system:node:"+name, "system:nodes")}
		for _, a := range addresses {
			r.IPAddresses = append(r.IPAddresses, net.ParseIP(a))
		}
		return r
	}
	named := of("n3", "10.5.0.3")
	named.DNSNames = []string{"n3"}
	stranger := of("n3")
	stranger.DNSNames = []string{"n1"}
	master := of("n3")
	master.Subject.Organization = append(master.Subject.Organization, "system:masters")
	check := func(by *box, name, profile string, r x509.CertificateRequest, kind errs.Kind, text string) {
		t.Helper()
		cert, err := by.sign(uid.Kubeletd, profile, r)
		if text != "" {
			if !errs.Is(err, kind) || !strings.Contains(errs.Text(err), text) {
				t.Errorf("%s: %v (kind %d), want kind %d with %q", name, err, errs.Of(err), kind, text)
			}
		} else if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if cert.Subject.String() != r.Subject.String() || len(cert.IPAddresses) != len(r.IPAddresses) || profile == "kubelet-client" && len(cert.DNSNames) > 0 {
			t.Errorf("%s: %q for %q %q", name, cert.Subject, cert.DNSNames, cert.IPAddresses)
		}
	}
	check(n1, "a worker's client", "kubelet-client", of("n3"), 0, "")
	check(n1, "a worker's server", "kubelet-serving", named, 0, "")
	check(n1, "its own", "kubelet-client", of("n1"), 0, "")
	check(n1, "its own address, which nobody has seen yet", "kubelet-serving", of("n1", "10.5.0.1"), 0, "")
	check(n1, "another's address", "kubelet-serving", of("n3", "10.5.0.1"), errs.Denied, `address 10.5.0.1: the cluster has seen node "n3" at ["10.5.0.3"]`)
	check(n1, "another's name", "kubelet-serving", stranger, errs.Denied, `DNS name "n1"`)
	check(n1, "nobody", "kubelet-client", of("n9"), errs.Denied, `"n9" is no node of the cluster; those are ["n1" "n3"]`)
	check(n1, "no kubelet", "kubelet-client", x509.CertificateRequest{Subject: pkixName("n3", "system:nodes")}, errs.Denied, `must be "CN=system:node:n3`)
	check(n1, "an administrator", "kubelet-client", master, errs.Denied, "system:masters")
	check(n3, "a worker signs for itself", "kubelet-client", of("n3"), errs.Precondition, `node "n3" is a worker and does not get it`)
	check(n3, "a worker approves", "kubeletd", x509.CertificateRequest{}, errs.Precondition, `node "n3" is a worker and does not get it`)

	_, err := n1.membership().RemoveMember(n1.admin(), &trustv1.RemoveMemberRequest{Name: "n3"})
	n1.must(err)
	n1.knows("n1")
	check(n1, "one that was removed", "kubelet-client", of("n3"), errs.Denied, `"n3" is no node of the cluster`)
	check(n1, "one that was removed, as server", "kubelet-serving", named, errs.Denied, `"n3" is no node of the cluster`)
}
