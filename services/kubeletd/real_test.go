package kubeletd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// realServer is the image's own kube-apiserver with an etcd, on loopback: what it grants and refuses is what a node's does.
type realServer struct {
	*testing.T
	ca    *testca.CA
	dir   string // of files
	url   string
	etcd  string // its URL
	admin *cluster
}

// newRealServer serves until the test ends. It needs "make image".
func newRealServer(t *testing.T, ca *testca.CA) *realServer {
	t.Helper()
	if os.Getenv("BULKHEAD_VM") == "" {
		t.Skip("needs the image's Kubernetes: make test-vm")
	}
	dir := t.TempDir()
	s := &realServer{T: t, ca: ca, dir: dir, url: "https://" + freeAddress(t), etcd: startEtcd(t, dir)}
	cert, key := ca.PEM(t, "kube-apiserver-server", x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	pair, accounts := s.file("server.pem", cert+key), s.file("accounts.pem", accountKey(t))
	ended := s.program("kube-apiserver", "--etcd-servers="+s.etcd, "--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", addrPort(s.url).Port()),
		"--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", "--anonymous-auth=false", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--client-ca-file="+s.file("ca.pem", ca.State().GetKubernetesCa()), "--tls-cert-file="+pair, "--tls-private-key-file="+pair, "--cert-dir="+dir,
		"--service-account-issuer=https://test", "--service-account-key-file="+accounts, "--service-account-signing-key-file="+accounts, "--service-cluster-ip-range=10.96.0.0/16")
	s.admin = s.as("admin", "system:masters")
	s.until("the API server is ready", func() bool {
		select {
		case <-ended:
			t.Fatal("the API server ended")
		default:
		}
		return s.admin.do(t.Context(), request{method: http.MethodGet, path: "/readyz"}, nil) == nil
	})
	return s
}

// file writes one that only this user reads.
func (s *realServer) file(name, text string) string {
	s.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.Fatal(err)
	}
	return path
}

// program runs one of Kubernetes' until the test ends. The channel is closed if it ends before.
func (s *realServer) program(name string, args ...string) <-chan struct{} {
	s.Helper()
	cmd := exec.CommandContext(s.Context(), filepath.Join("..", "..", "out", "kubernetes", "bin", "kube"), append([]string{name}, args...)...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	s.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if s.Failed() {
			s.Logf("the log of %s ends with\n%s", name, log.Bytes()[max(0, log.Len()-4096):])
		}
	})
	return ended
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func accountKey(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
}

// startEtcd returns the URL of an etcd of one member.
func startEtcd(t *testing.T, dir string) string {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir, cfg.ZapLoggerBuilder = filepath.Join(dir, "etcd"), embed.NewZapLoggerBuilder(zap.NewNop())
	client, peer := url.URL{Scheme: "http", Host: freeAddress(t)}, url.URL{Scheme: "http", Host: freeAddress(t)}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls, cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{client}, []url.URL{client}, []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	return client.String()
}

func (s *realServer) until(what string, f func() bool) {
	s.Helper()
	limit, tick := time.NewTimer(3*time.Minute), time.NewTicker(100*time.Millisecond)
	defer limit.Stop()
	defer tick.Stop()
	for !f() {
		select {
		case <-limit.C:
			s.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

func certOf(user string, groups ...string) x509.CertificateRequest {
	return x509.CertificateRequest{Subject: pkix.Name{CommonName: user, Organization: groups}}
}

// as is a client with a certificate of its own.
func (s *realServer) as(user string, groups ...string) *cluster {
	s.Helper()
	cert, key := s.ca.PEM(s.T, "any", certOf(user, groups...))
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		s.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.ca.State().GetKubernetesCa()))
	return newCluster(s.url, roots, &pair)
}

func (s *realServer) send(by *cluster, method, path string, o object) {
	s.Helper()
	body, err := json.Marshal(o)
	content := ""
	if method == http.MethodPatch {
		content = "application/merge-patch+json"
	}
	if err == nil {
		err = by.do(s.Context(), request{method: method, path: path, content: content, body: body}, nil)
	}
	if err != nil {
		s.Fatal(err)
	}
}

// get returns an object; nil if there is none.
func (s *realServer) get(path string) object {
	s.Helper()
	var o object
	if err := s.admin.do(s.Context(), request{method: http.MethodGet, path: path}, &o); err != nil && !errs.Is(err, errs.NotFound) {
		s.Fatal(err)
	}
	return o
}

// register does what a kubelet does, and the controller that gives it a subnet.
func (s *realServer) register(name, address, pods string) {
	s.Helper()
	kubelet := s.as(nodeUser+name, "system:nodes")
	s.send(kubelet, http.MethodPost, nodesPath, object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": name, "labels": object{memberKey: "true"}}})
	s.send(s.admin, http.MethodPatch, nodePath(name), object{"spec": object{"podCIDR": pods, "podCIDRs": []string{pods}}})
	s.send(kubelet, http.MethodPatch, nodePath(name)+"/status", object{"status": object{"addresses": []any{object{"type": "InternalIP", "address": address}},
		"conditions": []any{object{"type": "Ready", "status": "True", "reason": "x", "message": "x"}}}})
}

// ask makes a request for a certificate, in the name of who asks.
func (s *realServer) ask(by *cluster, request, signer, node string, addresses ...net.IP) {
	s.Helper()
	spec := certRequest(s.T, signer, "", node, addresses...)["spec"].(object)
	delete(spec, "username")
	delete(spec, "groups") // the server fills them in
	s.send(by, http.MethodPost, csrPath, object{"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": object{"name": request}, "spec": spec})
}

func (s *realServer) signed(request string) bool {
	status, _ := s.get(csrPath + "/" + request)["status"].(object)
	return status["certificate"] != nil
}

// authorities looks at what kubeletd reads and does when authorities are replaced.
func (s *realServer) authorities(d *Daemon, ca *testca.CA) {
	s.Helper()
	own, err := d.kernel.cluster()
	if err != nil {
		s.Fatal(err)
	}
	roots, _ := d.kernel.trust.Roots()
	now := trustOf(roots)
	for _, ns := range []string{"default", "kube-public"} {
		s.until("namespace "+ns, func() bool { return s.get("/api/v1/namespaces/"+ns) != nil })
		s.send(s.admin, http.MethodPost, "/api/v1/namespaces/"+ns+"/configmaps", object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": object{"name": rootsName}, "data": object{"ca.crt": now.Kubernetes}})
	}
	if ok, err := own.published(s.Context(), now.Kubernetes); !ok || err != nil {
		s.Errorf("all pods are told the authority: %v, %v", ok, err)
	}
	if ok, err := own.published(s.Context(), now.Kubernetes+"more"); ok || err != nil {
		s.Errorf("no pod is told another one: %v, %v", ok, err)
	}
	if err := own.do(s.Context(), request{method: http.MethodGet, path: "/api/v1/configmaps"}, nil); !errs.Is(err, errs.Denied) {
		s.Errorf("kubeletd reads all ConfigMaps: %v", err)
	}
	s.until("extensions are told", func() bool { return s.get(extensionsPath) != nil })
	was := s.get(extensionsPath)["metadata"].(object)["uid"]
	gone := testca.New(s.T).State().GetKubernetesCa()
	s.send(s.admin, http.MethodPatch, extensionsPath, object{"data": object{"client-ca-file": ca.State().GetKubernetesCa() + gone}})
	d.loop.Wake()
	s.until("extensions are told only what counts", func() bool {
		o := s.get(extensionsPath)
		meta, _ := o["metadata"].(object)
		data, _ := o["data"].(object)
		text, _ := data["client-ca-file"].(string)
		return o != nil && meta["uid"] != was && strings.TrimSpace(text) == strings.TrimSpace(ca.State().GetKubernetesCa())
	})
}

// TestNodesAndTheRealAPIServer: what addons/rbac.yaml grants is enough for kubeletd, and a worker's can do nothing with it but look.
func TestNodesAndTheRealAPIServer(t *testing.T) {
	ca := testca.New(t)
	s := newRealServer(t, ca)
	api := &apiServer{url: s.url}
	const worker = "bulkhead" // as in testca
	cp, w := clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode(worker, "worker", "10.5.0.101")
	around, aroundWorker := newWorld(t, ca, api, cp, w), newWorld(t, ca, api, cp, w)
	around.start = func(unit string) {
		if unit == "kubelet" {
			s.register("cp", "127.0.0.1", "10.244.0.0/24")
		}
	}
	aroundWorker.start = func(unit string) {
		if unit == "kubelet" {
			s.register(worker, "10.5.0.101", "10.244.1.0/24")
		}
	}
	d := around.run(controlPlaneDocument)
	s.until("the add-ons are there", func() bool {
		return s.get("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/bulkhead:kubeletd-node") != nil && s.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns") != nil
	})
	s.ask(s.as("system:bootstrap:"+worker, "system:bootstrappers"), "a", clientSigner, worker)
	s.ask(s.as(nodeUser+worker, "system:nodes"), "b", servingSigner, worker, net.IPv4(10, 5, 0, 101))
	s.ask(s.as("system:bootstrap:stranger", "system:bootstrappers"), "c", clientSigner, "stranger")
	s.until("a member's kubelet has its certificates", func() bool { return s.signed("a") && s.signed("b") })
	wd := aroundWorker.run(strings.ReplaceAll(workerDocument, "w1", worker))
	way := func(w *world) string {
		r, _ := w.pods.Get()
		if len(r.GetRoutes()) != 1 {
			return ""
		}
		return r.GetRoutes()[0].GetPrefix() + " via " + r.GetRoutes()[0].GetVia()
	}
	s.until("both know the way to the other's pods", func() bool {
		return way(around) == "10.244.1.0/24 via 10.5.0.101" && way(aroundWorker) == "10.244.0.0/24 via 127.0.0.1"
	})
	s.until("the control plane is labelled", func() bool {
		labels, _ := s.get(nodesPath + "/cp")["metadata"].(object)["labels"].(object)
		_, ok := labels[controlPlaneKey]
		return ok
	})
	if s.signed("c") {
		t.Error("a stranger's kubelet has a certificate")
	}
	own, err := wd.kernel.cluster()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []request{{method: http.MethodGet, path: csrPath}, {method: http.MethodGet, path: "/api/v1/secrets"}, {method: http.MethodDelete, path: nodesPath + "/cp"},
		{method: http.MethodPut, path: csrPath + "/c/approval", body: []byte("{}")}, {method: http.MethodPut, path: csrPath + "/c/status", body: []byte("{}")}} {
		if err := own.do(t.Context(), r, nil); !errs.Is(err, errs.Denied) {
			t.Errorf("a worker's kubeletd: %s %s: %v", r.method, r.path, err)
		}
	}
	s.authorities(d, ca)
	around.members(cp)
	s.until("the Node of the one that was removed is gone", func() bool { return s.get(nodesPath+"/"+worker) == nil })
	if st, _ := d.status.Get(); !st.GetNodeReady() || st.GetVersion() == "" {
		t.Errorf("status %v", st)
	}
}
