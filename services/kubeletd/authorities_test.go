package kubeletd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// turns is etcdd's store as far as the turn needs it.
type turns struct {
	storev1.StoreClient
	networkv1.VirtualClient

	mu       sync.Mutex
	holder   string // guarded by mu; "": nobody
	revision uint64 // guarded by mu
}

func (s *turns) Read(_ context.Context, r *storev1.ReadRequest, _ ...grpc.CallOption) (*storev1.ReadResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holder == "" || r.GetPrefix() != turnKey {
		return &storev1.ReadResponse{}, nil
	}
	return &storev1.ReadResponse{Entries: []*storev1.Entry{{Key: turnKey, Value: []byte(s.holder), Revision: s.revision}}}, nil
}

func (s *turns) Write(_ context.Context, w *storev1.WriteRequest, _ ...grpc.CallOption) (*storev1.WriteResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.revision
	if s.holder == "" {
		at = 0
	}
	if w.GetConditions()[0].GetRevision() != at {
		return nil, status.Error(codes.Aborted, "another one")
	}
	s.revision++
	if s.holder = string(w.GetChanges()[0].GetValue()); w.GetChanges()[0].GetDelete() {
		s.holder = ""
	}
	return &storev1.WriteResponse{Revision: s.revision}, nil
}

func (s *turns) has() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holder
}

// replaced is two control planes, each with a kubelet that serves TLS, while Kubernetes' authority is replaced.
type replaced struct {
	*testing.T
	old, next *testca.CA
	api       *apiServer
	store     *turns
	names     []string
	worlds    []*world
	daemons   []*Daemon

	mu      sync.Mutex
	kubelet []*tls.Certificate // guarded by mu; what each shows
	begun   []string           // guarded by mu; "node unit" of each that was started anew
}

func newReplaced(t *testing.T) *replaced {
	r := &replaced{T: t, old: testca.New(t), next: testca.Successor(t), store: &turns{}, names: []string{"cp", "cp2"}, kubelet: make([]*tls.Certificate, 2)}
	r.api = newAPIServer(t, r.old)
	r.publish(r.old)
	for i, name := range r.names {
		w := newWorld(t, r.old, r.api, r.nodes()...)
		w.store, w.virtual = r.store, r.store
		r.certify(i, r.old)
		l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.kubelet[i], nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for conn, err := l.Accept(); err == nil; conn, err = l.Accept() {
				go func() {
					defer conn.Close()
					if c, ok := conn.(*tls.Conn); ok {
						_ = c.HandshakeContext(t.Context())
					}
				}()
			}
		}()
		w.kubelet = l.Addr().String()
		w.again = func(unit string) { r.restarted(i, unit) }
		w.start = func(unit string) {
			if unit == "kubelet" {
				r.api.put(nodesPath+"/"+name, nodeObjectOf(name, "127.0.0.1", "10.244.0.0/24"))
			}
		}
		r.worlds = append(r.worlds, w)
		r.daemons = append(r.daemons, w.run(strings.Replace(controlPlaneDocument, "hostname: cp", "hostname: "+name, 1)))
	}
	for i, w := range r.worlds {
		w.until(r.daemons[i], "it is up", func() bool {
			st, _ := r.daemons[i].status.Get()
			return st.GetApiReady() && st.GetNodeReady()
		})
	}
	return r
}

func (r *replaced) nodes() []*trustv1.ClusterNode {
	return []*trustv1.ClusterNode{clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode("cp2", "controlplane", "127.0.0.1")}
}

// publish does what kube-controller-manager does.
func (r *replaced) publish(all ...*testca.CA) {
	s := &trustv1.TrustState{}
	for _, ca := range all {
		s.KubernetesCa += ca.State().GetKubernetesCa()
	}
	for _, ns := range []string{"default", "kube-system"} {
		r.api.put("/api/v1/namespaces/"+ns+"/configmaps/"+rootsName, object{"data": object{"ca.crt": bundleOf(s)}})
	}
}

// certify does what a kubelet does that has asked for its certificates.
func (r *replaced) certify(i int, ca *testca.CA) {
	r.Helper()
	cert, key := ca.PEM(r.T, "kubelet-serving", x509.CertificateRequest{})
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		r.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kubelet[i] = &pair
}

func (r *replaced) restarted(i int, unit string) {
	if unit == "kube-apiserver" && r.store.has() != r.names[i] {
		r.Errorf("%s starts its API server anew in %q's turn", r.names[i], r.store.has())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun = append(r.begun, r.names[i]+" "+unit)
}

// anew are the units that were started anew since it was last called, sorted.
func (r *replaced) anew() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := slices.Sorted(slices.Values(r.begun))
	r.begun = nil
	return strings.Join(out, ", ")
}

// trust has both nodes hear what is trusted; the first signs.
func (r *replaced) trust(id string, all ...*testca.CA) {
	for _, w := range r.worlds {
		s := all[0].State()
		s.Authorities, s.Nodes = id, r.nodes()
		for _, other := range all[1:] {
			s.KubernetesCa += other.State().GetKubernetesCa()
			s.FrontProxyCa += other.State().GetFrontProxyCa()
		}
		s.EtcdCa = r.old.State().GetEtcdCa()
		w.mu.Lock()
		w.signs = all[0]
		w.mu.Unlock()
		w.trust.Set(s)
	}
}

// acts waits until trustd is told that a node acts by what it heard.
func (r *replaced) acts(id string) {
	r.Helper()
	for i, w := range r.worlds {
		w.until(r.daemons[i], r.names[i]+" acts by "+id, func() bool { return r.told(i, id) })
	}
}

func (r *replaced) told(i int, id string) bool {
	w := r.worlds[i]
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said.GetAuthorities() == id
}

// waits waits until nodes say what keeps them, and has none of them say that it acts.
func (r *replaced) waits(what, id string) {
	r.Helper()
	for i, w := range r.worlds {
		w.until(r.daemons[i], r.names[i]+" waits for "+what, func() bool {
			st, _ := r.daemons[i].status.Get()
			return slices.ContainsFunc(st.GetPending(), func(p string) bool { return strings.Contains(p, what) })
		})
		if r.told(i, id) {
			r.Errorf("%s acts by %s without %s", r.names[i], id, what)
		}
	}
}

func bundleOf(s *trustv1.TrustState) string {
	return trustOf(&leaf.Roots{State: s}).Kubernetes
}

// Kubernetes' authority is replaced: API servers start anew one after the other, kubelets get new certificates, and trustd hears that a node has done a stage only when pods and the kubelet have.
func TestAuthorityReplaced(t *testing.T) {
	t.Parallel()
	r := newReplaced(t)
	r.anew()
	all := func(units ...string) string {
		var out []string
		for _, n := range r.names {
			for _, u := range units {
				out = append(out, n+" "+u)
			}
		}
		return strings.Join(slices.Sorted(slices.Values(out)), ", ")
	}
	every := all("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubelet")

	r.api.certify(t, r.old, r.old, r.next)
	r.trust("prepare", r.old, r.next)
	r.waits(rootsName, "prepare")
	r.publish(r.old, r.next)
	r.acts("prepare")
	if got := r.anew(); got != every {
		t.Errorf("prepare: started anew %s\nwant %s", got, every)
	}
	k, err := (&server{d: r.daemons[0]}).GetKubeconfig(t.Context(), &kubernetesv1.GetKubeconfigRequest{User: "ann"})
	if err != nil || !strings.Contains(k.GetKubeconfig(), base64Of([]byte(r.old.State().GetKubernetesCa()+r.next.State().GetKubernetesCa()))) {
		t.Errorf("a kubeconfig of now is not good for later: %v", err)
	}

	r.api.certify(t, r.next, r.old, r.next)
	r.trust("issue", r.next, r.old)
	r.waits("kubelet's certificates", "issue")
	args, err := os.ReadFile(filepath.Join(r.daemons[0].cfg.Dir, folder, "kubelet/args"))
	if err != nil || !strings.Contains(string(args), "--cert-dir=/var/lib/kubelet/pki-") || !strings.Contains(string(args), "--kubeconfig=/var/lib/kubelet/kubeconfig-") {
		t.Errorf("the kubelet is to ask for new certificates: %v\n%s", err, args)
	}
	for i := range r.names {
		r.certify(i, r.next)
	}
	r.acts("issue")
	if got, want := r.anew(), all("kubelet"); got != want {
		t.Errorf("issue: started anew %s\nwant %s", got, want)
	}
	dns := r.api.get("/apis/apps/v1/namespaces/kube-system/deployments/coredns")
	if meta, _ := dns["spec"].(object)["template"].(object)["metadata"].(object)["annotations"].(object); meta["bulkhead.dev/authority"] == nil {
		t.Error("the cluster's DNS is not started anew")
	}

	r.api.put(extensionsPath, object{"metadata": object{"uid": "x"}, "data": object{"client-ca-file": r.old.State().GetKubernetesCa() + r.next.State().GetKubernetesCa(),
		"requestheader-client-ca-file": r.next.State().GetFrontProxyCa()}})
	r.api.certify(t, r.next, r.next)
	r.trust("finish", r.next)
	r.acts("finish")
	if got := r.anew(); got != every {
		t.Errorf("finish: started anew %s\nwant %s", got, every)
	}
	for i, d := range r.daemons {
		for file, ca := range map[string]string{"pki/kubernetes-ca.pem": r.next.State().GetKubernetesCa(), "pki/front-proxy-ca.pem": r.next.State().GetFrontProxyCa()} {
			if text, err := os.ReadFile(filepath.Join(d.cfg.Dir, folder, file)); err != nil || string(text) != ca {
				t.Errorf("%s: %s is not the new authority alone: %v", r.names[i], file, err)
			}
		}
	}
	r.worlds[0].until(r.daemons[0], "extensions are not told the old one", func() bool { return r.api.get(extensionsPath) == nil })
	r.worlds[0].until(r.daemons[0], "nobody has the turn", func() bool { return r.store.has() == "" })
}
