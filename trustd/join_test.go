package trustd

import (
	"context"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	kmsv2 "k8s.io/kms/apis/v2"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// A control plane and a worker join the first node: all three know each other, and each gets the certificates that it may have, and no more.
func TestJoin(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", "n2"), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	for _, b := range []*box{n1, n2, n3} {
		s := b.knows("n1", "n2", "n3")
		if s.GetNodeName() != b.name || s.GetNodeRole() != map[bool]string{true: "worker", false: "controlplane"}[b == n3] {
			t.Errorf("%s says it is %q, a %q", b.name, s.GetNodeName(), s.GetNodeRole())
		}
		first, _ := n1.d.trust.Get()
		if s.GetOsCa() != first.GetOsCa() || s.GetKubernetesCa() != first.GetKubernetesCa() || len(s.GetTokenKeys()) != 1 || s.GetTokenKeys()[0].GetId() != first.GetTokenKeys()[0].GetId() {
			t.Errorf("%s trusts others than n1", b.name)
		}
		if a := s.GetNodes()[2].GetAddresses(); !slices.Equal(a, []string{"10.5.0.3"}) {
			t.Errorf("%s knows n3 at %q", b.name, a)
		}
	}
	members, err := n2.membership().ListMembers(n2.admin(), &trustv1.ListMembersRequest{})
	n2.must(err)
	if got := members.GetMembers(); len(got) != 3 || got[0].GetTokenId() != "" || got[2].GetTokenId() == "" || got[2].GetRole() != "worker" || len(got[1].GetKey()) != 64 {
		t.Errorf("members: %v", got)
	}

	// The control plane that joined has the cluster's keys.
	first, _ := n1.d.trust.Get()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(first.GetEtcdCa()))
	cert, err := n2.sign(uid.Etcdd, "etcd-peer", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 5, 0, 2)}})
	n2.must(err)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: "10.5.0.2", KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	sealed, err := kmsv2.NewKeyManagementServiceClient(n1.conn[uid.KubeAPIServer]).Encrypt(t.Context(), &kmsv2.EncryptRequest{Plaintext: []byte("seed")})
	n1.must(err)
	plain, err := kmsv2.NewKeyManagementServiceClient(n2.conn[uid.KubeAPIServer]).Decrypt(t.Context(), &kmsv2.DecryptRequest{Ciphertext: sealed.GetCiphertext(), KeyId: sealed.GetKeyId()})
	n2.must(err)
	if string(plain.GetPlaintext()) != "seed" {
		t.Error("n2 does not read what n1 encrypted")
	}

	// The worker gets what a control plane signs: its own name, addresses that it was seen at, no control plane's name.
	cert, err = n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 5, 0, 3), net.IPv4(10, 5, 0, 1)}})
	n3.must(err)
	if got := strings.Join(append(cert.DNSNames, ips(leaf{ips: cert.IPAddresses})...), " "); got != "bulkhead n3 localhost 127.0.0.1 ::1 10.5.0.3" {
		t.Errorf("names in the worker's certificate: %s", got)
	}
	cert, err = n3.sign(uid.Apid, "apid-node", x509.CertificateRequest{})
	n3.must(err)
	if got := cert.Subject; got.CommonName != "node:n3" || !slices.Contains(got.Organization, "bulkhead:node") || !slices.Contains(got.Organization, "bulkhead:node-worker") || len(got.Organization) != 2 || got.SerialNumber != n3.key() {
		t.Errorf("the worker's client certificate is %s", got)
	}
	if _, err := n3.sign(uid.Etcdd, "etcd-server", x509.CertificateRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "is a worker") {
		t.Errorf("the worker's etcd: %v", err)
	}
	if data, err := os.ReadFile(filepath.Join(n3.cfg.StateDir, nodeFile)); err != nil || strings.Count(string(data), "PRIVATE KEY-----") != 2 {
		t.Errorf("the worker has other keys than its own: %v", err)
	}
	if _, err := trustv1.NewTrustClient(n3.conn[uid.Apid]).MintToken(n3.admin(), &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "ask a control plane") {
		t.Errorf("a worker mints: %v", err)
	}
	list, err := trustv1.NewTrustClient(n3.conn[uid.Apid]).ListCertificates(n3.admin(), &trustv1.ListCertificatesRequest{})
	n3.must(err)
	var profiles []string
	for _, c := range list.GetCertificates() {
		profiles = append(profiles, c.GetProfile())
	}
	if got := strings.Join(profiles, " "); got != "os-ca etcd-ca kubernetes-ca front-proxy-ca apid-server apid-node" {
		t.Errorf("the worker lists %s", got)
	}
	for _, b := range []*box{n1, n2, n3} {
		b.untilState("")
	}
	// And all of it is there after a restart.
	for _, b := range []*box{n2, n3} {
		b.reboot()
		b.boot()
		if s := b.knows("n1", "n2", "n3"); s.GetNodeName() != b.name {
			t.Errorf("after a restart %s is %q", b.name, s.GetNodeName())
		}
	}
}

// key is the digest of the box's own key.
func (b *box) key() string {
	k, _ := b.d.keys.Get()
	return k.node.digest()
}

// A cluster's first node that is not on the list yet lets nobody in before it is: who joined would not know it, and never hear of the cluster again.
func TestJoinWaitsForTheFirst(t *testing.T) {
	n1 := newLab(t).box("n1", "1")
	waitSettled(t, n1.d)
	n1.claim(n1.d)
	configureAs(t, n1.d, "", 1, config.ControlPlane) // no name, and so no place
	_, err := n1.d.bootstrap()
	n1.must(err)
	soon, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := n1.d.placed(soon); err == nil {
		t.Error("it has its place without a name")
	}
	let := make(chan error, 1)
	go func() { let <- n1.d.placed(t.Context()) }()
	n1.configure(2, config.ControlPlane)
	n1.must(<-let)
	if list, _ := n1.d.list.Get(); list == nil || list.Nodes["n1"].Name != "n1" {
		t.Errorf("others are let in, and the list is %+v", list)
	}
}
