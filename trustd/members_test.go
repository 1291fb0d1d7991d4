package trustd

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// signForNode is a node's call at a control plane, as apid passes it on; the worker's own trustd is not asked.
func signForNode(t *testing.T, n *member, instance byte, profile string, tmpl x509.CertificateRequest) *trustv1.SignForNodeRequest {
	t.Helper()
	_, csr := request(t, tmpl)
	in := slices.Repeat([]byte{instance}, join.InstanceSize)
	sig, err := join.Sign(n.key, rand.Reader, binding, join.SignPayload(in, profile, csr))
	if err != nil {
		t.Fatal(err)
	}
	return &trustv1.SignForNodeRequest{Profile: profile, Csr: csr, Proof: &trustv1.NodeProof{Name: n.name, Signature: sig, ChannelBinding: binding, RemoteAddress: "10.5.0.3", Instance: in}}
}

func (b *box) member() *member {
	k, _ := b.d.keys.Get()
	return k.node
}

// A control plane believes nothing that a node says but its key.
func TestSignForNode(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n1.knows("n1", "n2", "n3")
	m := n3.member()
	n3.stop()
	nodes := trustv1.NewNodesClient(n1.conn[uid.Apid])
	kubelet := x509.CertificateRequest{Subject: pkixName("system:node:n3", "system:nodes")}
	other := kubelet
	other.Subject = pkixName("system:node:n1", "system:nodes")
	stranger := *m
	stranger.key, _, _ = newNodeKey(rand.Reader)
	var wait sync.WaitGroup
	for _, c := range []struct {
		name    string
		by      *member
		profile string
		tmpl    x509.CertificateRequest
		spoil   func(*trustv1.SignForNodeRequest)
		err     string
		kind    errs.Kind
	}{
		{name: "kubelet's first", profile: "kubelet-bootstrap"},
		{name: "kubeletd of a node", profile: "kubeletd-node"},
		{name: "kube-proxy", profile: "kube-proxy"},
		{name: "an address it was not seen at", profile: "apid-server", tmpl: x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 5, 0, 1)}}},
		{name: "kubelet, past the certificates API", profile: "kubelet-client", tmpl: kubelet, err: "may not have it", kind: errs.Denied},
		{name: "another kubelet", profile: "kubelet-serving", tmpl: other, err: "may not have it", kind: errs.Denied},
		{name: "another's DNS name", profile: "gateway-server", tmpl: x509.CertificateRequest{DNSNames: []string{"n1"}}, err: `DNS name "n1"`, kind: errs.Denied},
		{name: "the cluster's name", profile: "gateway-server", tmpl: x509.CertificateRequest{DNSNames: []string{"api.example"}}, err: `"api.example"`, kind: errs.Denied},
		{name: "control planes' name", profile: "apid-server", tmpl: x509.CertificateRequest{DNSNames: []string{join.ServerName}}, err: join.ServerName, kind: errs.Denied},
		{name: "front proxy", profile: "front-proxy-client", err: "is a worker of the cluster and may not have it; allowed are apid-node, apid-server,", kind: errs.Denied},
		{name: "etcd", profile: "etcd-peer", err: "may not have it", kind: errs.Denied},
		{name: "etcd's root", profile: "etcd-root", err: "may not have it", kind: errs.Denied},
		{name: "API server", profile: "kube-apiserver-server", err: "may not have it", kind: errs.Denied},
		{name: "API server's key to kubelets", profile: "kube-apiserver-kubelet-client", err: "may not have it", kind: errs.Denied},
		{name: "Kubernetes' administrator", profile: "kubernetes-admin", err: "may not have it", kind: errs.Denied},
		{name: "kubeletd of control planes", profile: "kubeletd", err: "may not have it", kind: errs.Denied},
		{name: "no such profile", profile: "root", err: "may not have it", kind: errs.Denied},
		{name: "for a year", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.TtlSeconds = 365 * 86400 }, err: "ttl_seconds", kind: errs.Invalid},
		{name: "a control plane", by: n2.member(), profile: "etcd-peer"},

		{name: "another key", by: &stranger, profile: "apid-server", err: `no node called "n3" with this key`, kind: errs.Unauthenticated},
		{name: "another name", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof.Name = "n1" }, err: `no node called "n1"`, kind: errs.Unauthenticated},
		{name: "unknown name", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof.Name = "n9" }, err: `no node called "n9"`, kind: errs.Unauthenticated},
		{name: "another profile", profile: "kube-proxy", spoil: func(r *trustv1.SignForNodeRequest) { r.Profile = "apid-server" }, err: "with this key", kind: errs.Unauthenticated},
		{name: "another request", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { _, r.Csr = request(t, x509.CertificateRequest{}) }, err: "with this key", kind: errs.Unauthenticated},
		{name: "replayed on another connection", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof.ChannelBinding = make([]byte, 32) }, err: "with this key", kind: errs.Unauthenticated},
		{name: "as another run", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof.Instance = make([]byte, 16) }, err: "with this key", kind: errs.Unauthenticated},
		{name: "no proof", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof = &trustv1.NodeProof{RemoteAddress: "10.5.0.3"} }, err: "with this key", kind: errs.Unauthenticated},
		{name: "from nowhere", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Proof.RemoteAddress = "" }, err: "remote address", kind: errs.Invalid},
		{name: "too large", profile: "apid-server", spoil: func(r *trustv1.SignForNodeRequest) { r.Csr = make([]byte, maxRequest+1) }, err: "allowed are 16384", kind: errs.Invalid},
	} {
		if c.by == nil {
			c.by = m
		}
		r := signForNode(t, c.by, 1, c.profile, c.tmpl)
		if c.spoil != nil {
			c.spoil(r)
		}
		wait.Go(func() { // some take a second
			resp, err := nodes.SignForNode(t.Context(), r)
			if c.err != "" {
				if !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.err) {
					t.Errorf("%s: %v (kind %d), want kind %d with %q", c.name, err, errs.Of(err), c.kind, c.err)
				}
				return
			}
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
			} else if cert := parsePEM(t, resp.GetCertificate()); len(cert.IPAddresses) > 2 || c.profile == "kubeletd-node" && cert.Subject.String() != "CN=bulkhead:kubeletd:n3,O=bulkhead:kubeletd-nodes" {
				t.Errorf("%s: %q, addresses %v", c.name, cert.Subject, cert.IPAddresses)
			}
		})
	}
	wait.Wait()
	w := l.box("w", "4").join(n1.token("worker", ""), n1)
	if _, err := trustv1.NewNodesClient(w.conn[uid.Apid]).SignForNode(t.Context(), signForNode(t, m, 1, "apid-server", x509.CertificateRequest{})); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "ask a control plane") {
		t.Errorf("a worker signs: %v", err)
	}
}

// A new address counts from the call on that comes from it.
func TestAddressOfNodeChanges(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n3.ip.Set("127.0.0.33")
	cert, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 5, 0, 33), net.IPv4(10, 5, 0, 3)}})
	n3.must(err)
	if got := len(cert.IPAddresses); got != 4 {
		t.Errorf("addresses %v", cert.IPAddresses)
	}
	n1.until("knew both addresses", func(s *trustv1.TrustState) bool {
		return len(s.GetNodes()) == 2 && slices.Equal(s.GetNodes()[1].GetAddresses(), []string{"10.5.0.33", "10.5.0.3"})
	})
	// A control plane's are those that its etcdd has.
	_, err = n1.sign(uid.Etcdd, "etcd-peer", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 5, 0, 1), net.ParseIP("fe80::1")}})
	n1.must(err)
	n3.until("knew n1's address", func(s *trustv1.TrustState) bool {
		return len(s.GetNodes()) == 2 && slices.Equal(s.GetNodes()[0].GetAddresses(), []string{"10.5.0.1"})
	})
}

// Who is removed gets nothing any more, hears so, and cannot come back with its key; its name is free.
func TestRemoveMember(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n3.knows("n1", "n2", "n3")
	l.members.Set([]string{"n1", "n2"})
	if _, err := n1.membership().RemoveMember(n1.admin(), &trustv1.RemoveMemberRequest{Name: "n2"}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "bhctl etcd remove n2") {
		t.Errorf("a member of etcd: %v", err)
	}
	if _, err := n1.membership().RemoveMember(n1.admin(), &trustv1.RemoveMemberRequest{Name: "n9"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("nobody: %v", err)
	}
	m := n3.member()
	for range 2 { // again is no error: the answer may have been lost
		if _, err := n2.membership().RemoveMember(n2.admin(), &trustv1.RemoveMemberRequest{Name: "n3"}); err != nil {
			t.Errorf("a worker: %v", err)
		}
	}
	n1.knows("n1", "n2")
	n2.tells(`node \"n3\" was removed from the cluster by \"ann\"`)
	n3.untilState("it was removed")
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Unauthenticated) || !strings.Contains(errs.Text(err), "removed") {
		t.Errorf("it still gets certificates: %v", err)
	}
	n1.tells(`that calls itself \"n3\" was refused`)
	// With its old key it is not let in again.
	r := joinDirect(t, n1.token("worker", ""), "n3")
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, m.key)
	n1.must(err)
	token := n1.token("worker", "")
	_, secret, _ := join.Parse(token)
	r.TokenId, r.Csr = token[:join.IDSize], csr
	prove(r, secret)
	if _, err := trustv1.NewJoinClient(n1.conn[uid.Apid]).Join(t.Context(), r); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "reset the machine") {
		t.Errorf("the old key: %v", err)
	}
	l.box("n3", "4").join(token, n1)
	n1.knows("n1", "n2", "n3")
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Unauthenticated) {
		t.Errorf("the old machine under the name of the new one: %v", err)
	}
	l.members.Set([]string{"n1"})
	_, err = n1.membership().RemoveMember(n1.admin(), &trustv1.RemoveMemberRequest{Name: "n2"})
	n1.must(err)
	n2.untilState("was removed from the cluster") // it does not put itself on the list again
	n1.knows("n1", "n3")
}

// A node ends its own membership, and no other's; one that etcd has as a member does not.
func TestLeave(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n1.knows("n1", "n2", "n3")
	l.members.Set([]string{"n1", "n2"})
	c := trustv1.NewDepartureClient(n1.conn[uid.Apid])
	as := func(name string, roles ...string) context.Context {
		md := metadata.Pairs(peer.CallerKey, name)
		for _, r := range roles {
			md.Append(peer.RolesKey, r)
		}
		return metadata.NewOutgoingContext(t.Context(), md)
	}
	if _, err := c.Leave(n1.admin(), &trustv1.LeaveRequest{}); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "bhctl node remove") {
		t.Errorf("an administrator, who is no node: %v", err)
	}
	if _, err := c.Leave(as("node:n2", "node", "node-controlplane"), &trustv1.LeaveRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "member of etcd") {
		t.Errorf("a member of etcd: %v", err)
	}
	for range 2 { // the answer may have been lost
		if _, err := c.Leave(as("node:n3", "node", "node-worker"), &trustv1.LeaveRequest{}); err != nil {
			t.Errorf("a worker: %v", err)
		}
	}
	n1.knows("n1", "n2")
	n3.untilState("it was removed")
	l.members.Set([]string{"n1"})
	if _, err := c.Leave(as("node:n2", "node", "node-controlplane"), &trustv1.LeaveRequest{}); err != nil {
		t.Errorf("one that has left etcd: %v", err)
	}
	n1.knows("n1")
}

// A revocation is with all nodes at once, and stays with a node that restarts while nobody answers.
func TestRevoke(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n2)
	minted, err := trustv1.NewTrustClient(n1.conn[uid.Apid]).MintToken(n1.admin(), &trustv1.MintTokenRequest{Name: "x", Roles: []string{"reader"}})
	n1.must(err)
	cert, err := n3.sign(uid.Apid, "apid-node", x509.CertificateRequest{})
	n3.must(err)
	for _, id := range []string{minted.GetId(), strings.ToUpper(cert.SerialNumber.Text(16)), minted.GetId()} {
		_, err = n1.membership().Revoke(n1.admin(), &trustv1.RevokeRequest{Id: id})
		n1.must(err)
	}
	want := []string{minted.GetId(), cert.SerialNumber.Text(16)}
	slices.Sort(want)
	revoked := func(s *trustv1.TrustState) bool { return slices.Equal(s.GetRevoked(), want) }
	for _, b := range []*box{n1, n2, n3} {
		b.until("heard of the revocation", revoked)
		b.etcdAway.Set(true)
		b.netAway.Set(true)
		b.boot()
		b.until("knew of the revocation by itself", revoked)
	}
	k, _ := n1.d.keys.Get()
	n1.etcdAway.Set(false)
	for id, want := range map[string]string{"": "8 to 64", "12345": "8 to 64", "not-hexadecimal": "8 to 64", k.os.cert.SerialNumber.Text(16): "authority os-ca itself"} {
		if _, err := n1.membership().Revoke(n1.admin(), &trustv1.RevokeRequest{Id: id}); !errs.Is(err, errs.Invalid) || !strings.Contains(errs.Text(err), want) {
			t.Errorf("%q: %v", id, err)
		}
	}
}

// A worker that starts while no control plane answers trusts whom it trusted, gets certificates when one is back, and goes on to the next when one is away.
func TestWorkerAlone(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("controlplane", ""), n1)
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1, n2)
	before := n3.knows("n1", "n2", "n3")
	n3.netAway.Set(true)
	n3.boot()
	after := n3.knows("n1", "n2", "n3")
	if after.GetOsCa() != before.GetOsCa() || after.GetTokenKeys()[0].GetId() != before.GetTokenKeys()[0].GetId() || after.GetKubernetesCa() != before.GetKubernetesCa() || !after.GetClaimed() || !after.GetBootstrapped() {
		t.Errorf("alone it trusts %v", after)
	}
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "no control plane of the cluster answers: "+n1.endpoint()) || !strings.Contains(errs.Text(err), "no route to host") {
		t.Errorf("alone: %v", err)
	}
	n3.netAway.Set(false)
	n1.stop()
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil {
		t.Errorf("with one control plane of two: %v", err)
	}
	if _, err := n2.membership().Revoke(n2.admin(), &trustv1.RevokeRequest{Id: "0123456789abcdef"}); err != nil {
		t.Error(err)
	}
	n3.until("heard from the other one", func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) == 1 })
}

// A worker, however broken into, is not believed as a control plane by another worker.
func TestWorkerAsControlPlane(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2").join(n1.token("worker", ""), n1)
	n2.open()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n3.knows("n1", "n2", "n3")
	k, _ := n3.d.keys.Get()
	err := n3.d.call(t.Context(), trustv1.Nodes_SignForNode_FullMethodName, n2.endpoint(), n3.d.osRoots(k), join.NodeLabel, nil, nil)
	if !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "not "+join.ServerName) {
		t.Errorf("called a worker as control plane: %v", err)
	}
	foreign := newLab(t).box("f1", "1").found()
	if err := n3.d.call(t.Context(), trustv1.Nodes_SignForNode_FullMethodName, foreign.endpoint(), n3.d.osRoots(k), join.NodeLabel, nil, nil); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "unknown authority") {
		t.Errorf("called another cluster's control plane: %v", err)
	}
	said, _ := foreign.d.trust.Get()
	if err := checkHeard(k, said); err == nil {
		t.Error("another cluster's word is believed")
	}
	if err := checkHeard(k, &trustv1.TrustState{}); err == nil {
		t.Error("silence is believed")
	}
}

// Two machines with one disk: the one that was first is told, and so is everybody who looks at it; it gets nothing any more.
func TestCopiedDisk(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n3.knows("n1", "n3")
	copied := l.box("copy", "4")
	copied.stop()
	n3.must(os.RemoveAll(copied.cfg.StateDir))
	n3.must(os.CopyFS(copied.cfg.StateDir, os.DirFS(n3.cfg.StateDir)))
	copied.boot()
	copied.until("ran", func(s *trustv1.TrustState) bool { return s.GetNodeName() == "n3" })
	n3.untilState("another machine runs with the key of node \"n3\" (last seen at 10.5.0.4, 10.5.0.3)")
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Denied) || !strings.Contains(errs.Text(err), "a copied disk?") {
		t.Errorf("got %v", err)
	}
	n1.tells("another machine runs with the key of node")
	if _, err := copied.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil {
		t.Errorf("the newest machine: %v", err)
	}
	copied.boot() // a restart is no second machine
	if _, err := copied.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// A joined node has the name and role that the cluster knows it by; the document must not say otherwise.
func TestNameAndRoleOfMember(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n3.untilState("")
	for doc, want := range map[string]string{"hostname: n4\nrole: worker": `is "n3" in its cluster`, "hostname: n3\nrole: controlplane": `as "worker"`, "hostname: n3\nrole: worker": ""} {
		_, err := (controlServer{d: n3.d}).PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: &controlv1.Spec{Generation: 2, Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Machine\n" + doc + "\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://api.example:6443\n")}})
		if want == "" && err != nil || want != "" && (!errs.Is(err, errs.Invalid) || !strings.Contains(errs.Text(err), want)) {
			t.Errorf("plan for %q: %v", doc, err)
		}
	}
	configureAs(t, n3.d, "n4", 2, config.Worker)
	n3.untilState(`this node is "n3" in its cluster and Machine.hostname says "n4"`)
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), `says "n4"`) {
		t.Errorf("signed: %v", err)
	}
	configureAs(t, n3.d, "n3", 3, config.ControlPlane)
	n3.untilState(`as "worker" and Machine.role says "controlplane"`)
	configureAs(t, n3.d, "n3", 4, config.Worker)
	n3.untilState("")
	configureAs(t, n1.d, "m1", 2, config.ControlPlane)
	n1.untilState(`this node is "n1"`)
	if _, err := n1.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); !errs.Is(err, errs.Precondition) {
		t.Errorf("a control plane of two is called anew: %v", err)
	}
}

// As long as the first node is alone, it is called what its document says.
func TestFirstNodeIsCalledAnew(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	key := n1.key()
	configureAs(t, n1.d, "m1", 2, config.ControlPlane)
	if s := n1.knows("m1"); s.GetNodes()[0].GetKey() != key || s.GetNodeName() != "m1" {
		t.Errorf("%v", s)
	}
	if _, err := n1.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil {
		t.Error(err)
	}
	n1.untilState("")
	n1.boot()
	n1.knows("m1")
}

// What a power cut can leave of a join: a node that joined, or one that nobody owns.
func TestSettleJoined(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n2 := l.box("n2", "2")
	n2.stop()
	n2.must(os.Remove(n2.cfg.StateDir)) // not made yet, as before the first document
	n2.boot()
	waitSettled(t, n2.d)
	resp, err := n2.tryJoin(n2.joinRequest("n2", n1.token("controlplane", ""), n1))
	n2.must(err)
	if data, err := os.ReadFile(filepath.Join(n2.cfg.Runtime, nodeFile)); err != nil || !strings.Contains(string(data), `"keys":`) {
		t.Errorf("the node's file: %v", err)
	}
	if text := n2.console.String(); !strings.Contains(text, "This node is now n2, a controlplane of a cluster.") {
		t.Errorf("console:\n%s", text)
	}
	n2.stop()
	owned := func(want bool) *keyring {
		t.Helper()
		d := n2.start()
		k, _ := d.keys.Get()
		if k.owned() != want || want && (k.cluster == nil || k.node.name != "n2" || !k.os.cert.Equal(parse509(t, resp.GetCa()))) {
			t.Errorf("owned %v, want %v", k.owned(), want)
		}
		return k
	}
	owned(true) // trustd restarted
	n2.mountState()
	n2.must(os.WriteFile(filepath.Join(n2.cfg.StateDir, "."+nodeFile+".new"), []byte("half"), 0o600))
	owned(true) // moved
	if _, err := os.Stat(filepath.Join(n2.cfg.Runtime, nodeFile)); !os.IsNotExist(err) {
		t.Errorf("the runtime folder still has it: %v", err)
	}
	data, err := os.ReadFile(filepath.Join(n2.cfg.StateDir, nodeFile))
	n2.must(err)
	n2.must(os.WriteFile(filepath.Join(n2.cfg.Runtime, nodeFile), data, 0o600))
	owned(true) // power lost between writing and wiping
	n2.reboot()
	owned(true)

	// STATE has an owner: it wins over a cluster that was joined, or a claim that was made, while it was away.
	m := newMachine(t)
	m.claim(m.start())
	m.must(os.Mkdir(m.cfg.StateDir, 0o700))
	m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, nodeFile), data, 0o600))
	if k, _ := m.start().keys.Get(); k.node == nil || k.node.name != "n2" {
		t.Error("a claim won over STATE's cluster")
	}
	m = newMachine(t)
	m.mountState()
	owner := m.claim(m.start()).GetCa()
	m.must(os.WriteFile(filepath.Join(m.cfg.Runtime, nodeFile), data, 0o600))
	if k, _ := m.start().keys.Get(); k.node != nil || string(k.os.cert.Raw) != string(owner) {
		t.Error("a join won over STATE's owner")
	}
	// What cannot be read is not taken for nothing.
	for _, bad := range []string{"{}", `{"version":1,"name":"n2"}`, strings.Replace(string(data), `"keys":`, `"quay":`, 1), strings.Replace(string(data), `"role":"controlplane"`, `"role":"worker"`, 1)} {
		m := newMachine(t)
		m.mountState()
		m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, nodeFile), []byte(bad), 0o600))
		d, err := New(m.cfg)
		m.must(err)
		if err := d.settle(); err == nil || !strings.Contains(err.Error(), nodeFile) || m.console.Len() > 0 {
			t.Errorf("%.40s: %v, console %q", bad, err, m.console)
		}
	}
	m = newMachine(t)
	m.mountState()
	m.must(os.WriteFile(filepath.Join(m.cfg.StateDir, nodeFile), []byte(`{"version":1,"name":"n1","role":"controlplane","first":true,"key":`+quoted(t)+`}`), 0o600))
	d, err := New(m.cfg)
	m.must(err)
	if err := d.settle(); err == nil || !strings.Contains(err.Error(), identityFile+": it is missing") {
		t.Errorf("a first node without its keys: %v", err)
	}
}

// The store that is away delays nobody who does not need it.
func TestStoreAway(t *testing.T) {
	l := newLab(t)
	n1 := l.box("n1", "1").found()
	n3 := l.box("n3", "3").join(n1.token("worker", ""), n1)
	n1.knows("n1", "n3")
	n1.etcdAway.Set(true)
	if _, err := n3.sign(uid.Apid, "apid-server", x509.CertificateRequest{}); err != nil {
		t.Errorf("a node that is known: %v", err)
	}
	if s, _ := n1.d.trust.Get(); len(s.GetNodes()) != 2 {
		t.Errorf("it forgot who is there: %v", s.GetNodes())
	}
	start := time.Now()
	if _, err := trustv1.NewJoinClient(n1.conn[uid.Apid]).Join(t.Context(), joinDirect(t, n1.aToken(), "n9")); !errs.Is(err, errs.Unavailable) || !strings.Contains(errs.Text(err), "see the status of etcd: ") || !strings.Contains(errs.Text(err), "etcd has no quorum") {
		t.Errorf("joined: %v", err)
	}
	if d := time.Since(start); d > 30*time.Second {
		t.Errorf("it took %s to say so", d)
	}
	n1.etcdAway.Set(false)
	_, err := n1.membership().Revoke(n1.admin(), &trustv1.RevokeRequest{Id: "0123456789abcdef"})
	n1.must(err)
	n3.until("heard again", func(s *trustv1.TrustState) bool { return len(s.GetRevoked()) == 1 })
}
