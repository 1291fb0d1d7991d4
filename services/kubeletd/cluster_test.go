package kubeletd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// world is what is around a kubeletd: trustd, networkd and PID 1 in a few lines, and an API server.
type world struct {
	*testca.CA
	t     testing.TB
	api   *apiServer
	trust latest.Cell[*trustv1.TrustState]
	pods  latest.Cell[*networkv1.SetPodNetworkRequest]

	mu    sync.Mutex
	units map[string]initctl.Status // guarded by mu
	news  chan initctl.Status
	start func(unit string)
	again func(unit string) // nil: nothing happens

	signs   *testca.CA                  // guarded by mu; nil: CA
	kubelet string                      // where its kubelet serves TLS; "" nowhere
	said    *trustv1.ReportTrustRequest // guarded by mu; the newest report to trustd

	containerd string              // its socket
	mute       bool                // it does not listen when it has been started
	hostname   latest.Cell[string] // the kernel's
	nameless   bool                // it is not the document's at the start

	store   storev1.StoreClient // nil: the node takes no part in the virtual addresses
	virtual networkv1.VirtualClient
}

func newWorld(t testing.TB, ca *testca.CA, api *apiServer, nodes ...*trustv1.ClusterNode) *world {
	w := &world{CA: ca, t: t, api: api, units: map[string]initctl.Status{}, news: make(chan initctl.Status, 64), start: func(string) {}}
	for _, u := range append(unitNames(), "networkd") {
		w.units[u] = initctl.Status{Name: u, State: "down"}
	}
	w.members(nodes...)
	return w
}

// members makes the cluster one of these nodes.
func (w *world) members(nodes ...*trustv1.ClusterNode) {
	s := w.State()
	s.Nodes = nodes
	w.trust.Set(s)
}

// WatchTrust is trustd's.
func (w *world) WatchTrust(ctx context.Context, _ *trustv1.WatchTrustRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[trustv1.TrustState], error) {
	return &trustStream{ctx: ctx, w: w}, nil
}

// SignCertificate is trustd's.
func (w *world) SignCertificate(ctx context.Context, r *trustv1.SignCertificateRequest, _ ...grpc.CallOption) (*trustv1.SignCertificateResponse, error) {
	w.mu.Lock()
	ca := w.signs
	w.mu.Unlock()
	if ca == nil {
		ca = w.CA
	}
	return ca.SignCertificate(ctx, r)
}

// ReportTrust is trustd's.
func (w *world) ReportTrust(_ context.Context, r *trustv1.ReportTrustRequest, _ ...grpc.CallOption) (*trustv1.ReportTrustResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.said = r
	return &trustv1.ReportTrustResponse{}, nil
}

type trustStream struct {
	grpc.ClientStream
	ctx  context.Context
	w    *world
	last *trustv1.TrustState
}

func (s *trustStream) Recv() (*trustv1.TrustState, error) {
	for {
		now, changed := s.w.trust.Get()
		if !proto.Equal(now, s.last) {
			s.last = now
			return now, nil
		}
		select {
		case <-s.ctx.Done():
			return nil, s.ctx.Err()
		case <-changed:
		}
	}
}

// SetPodNetwork is networkd's.
func (w *world) SetPodNetwork(_ context.Context, r *networkv1.SetPodNetworkRequest, _ ...grpc.CallOption) (*networkv1.SetPodNetworkResponse, error) {
	w.pods.Set(r)
	return &networkv1.SetPodNetworkResponse{}, nil
}

func (w *world) set(unit, state, exit string) {
	w.mu.Lock()
	w.units[unit] = initctl.Status{Name: unit, State: state, LastExit: exit}
	w.mu.Unlock()
	w.news <- initctl.Status{Name: unit, State: state, LastExit: exit}
}

func (w *world) Start(unit string) error {
	if unit == "image-load" {
		w.set(unit, "down", "exit 0")
	} else {
		w.set(unit, "up", "")
	}
	w.start(unit)
	return nil
}
func (w *world) Stop(unit string) error { w.set(unit, "down", ""); return nil }
func (w *world) Restart(unit string) error {
	if w.again != nil {
		w.again(unit)
	}
	w.set(unit, "up", "")
	return nil
}
func (w *world) Status() ([]initctl.Status, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []initctl.Status
	for _, s := range w.units {
		out = append(out, s)
	}
	return out, nil
}
func (w *world) Watch(ctx context.Context, f func(initctl.Status)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case s := <-w.news:
			f(s)
		}
	}
}

// run starts a kubeletd with a document; it ends with the test.
func (w *world) run(document string) *Daemon {
	w.t.Helper()
	l, err := net.Listen("unix", filepath.Join(w.t.TempDir(), "s"))
	if err != nil {
		w.t.Fatal(err)
	}
	d := w.make(document, daemon.Env{Name: "kubeletd", Log: slog.New(slog.DiscardHandler), Listen: l, Ready: func() {}, Metrics: metrics.New("kubeletd")})
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-done })
	return d
}

// make makes a kubeletd that has a document and does not run yet.
func (w *world) make(document string, env daemon.Env) *Daemon {
	w.t.Helper()
	dir := w.t.TempDir()
	for _, f := range []string{"kubelet", "mounted"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	local, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.containerd = filepath.Join(dir, "c")
	if !w.mute {
		w.listen()
	}
	env.TCP = local
	d, err := New(Config{Env: env, Signer: w, Pods: w, Store: w.store, Virtual: w.virtual, Init: w, Dir: filepath.Join(dir, "run"), Program: filepath.Join(dir, "kubelet"), VolumeMark: filepath.Join(dir, "mounted"),
		Containerd:  w.containerd,
		Hostname:    func() (string, error) { name, _ := w.hostname.Get(); return name, nil },
		EtcdAddress: strings.TrimPrefix(w.api.url, "https://"), APIServer: w.api.url, Kubelet: w.kubelet, Group: func(uid.ID) int { return os.Getgid() }, Routes: os.DevNull,
		Links: func() ([]nodeaddr.Link, error) {
			return []nodeaddr.Link{{Name: "eth1", Up: true, Addresses: []netip.Prefix{netip.MustParsePrefix("10.5.0.11/24")}}}, nil
		}})
	if err != nil {
		w.t.Fatal(err)
	}
	d.kernel.strangerTime = time.Second
	s, err := parse([]byte(document))
	if err != nil {
		w.t.Fatal(err)
	}
	w.hostname.Set(s.Node)
	if w.nameless {
		w.hostname.Set("(none)")
	}
	if err := d.loop.Set(1, s); err != nil {
		w.t.Fatal(err)
	}
	return d
}

// listen is what containerd does once it can work.
func (w *world) listen() {
	w.t.Helper()
	l, err := net.Listen("unix", w.containerd)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
}

// until waits for a state of kubeletd, looking at each change of its status and every now and then.
func (w *world) until(d *Daemon, what string, f func() bool) {
	w.t.Helper()
	timer := time.NewTimer(30 * time.Second)
	defer timer.Stop()
	tick := time.NewTicker(20 * time.Millisecond) // what is looked at is outside of kubeletd, and tells nobody
	defer tick.Stop()
	for !f() {
		select {
		case <-timer.C:
			st, _ := d.status.Get()
			w.t.Fatalf("never: %s; status %v", what, st)
		case <-tick.C:
		}
	}
}

func clusterNode(name, role string, addresses ...string) *trustv1.ClusterNode {
	return &trustv1.ClusterNode{Name: name, Role: role, Addresses: addresses}
}

// nodeObjectOf is a Node as its kubelet and the controllers make it.
func nodeObjectOf(name, address, pods string) object {
	return object{"metadata": object{"uid": "uid-" + name, "creationTimestamp": "2026-01-01T00:00:0" + fmt.Sprint(len(name)) + "Z", "labels": object{memberKey: "true"}},
		"spec": object{"podCIDR": pods}, "status": object{"conditions": []any{object{"type": "Ready", "status": "True"}},
			"addresses": []any{object{"type": "Hostname", "address": name}, object{"type": "InternalIP", "address": address}}}}
}

const workerDocument = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: w1\nrole: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: c\nendpoint: https://127.0.0.1:6443\n"

// A worker has no API server: it finds those of control planes through its own balancer, brings its kubelet up, and learns the ways to others' pods. In the
// cluster it only looks.
func TestWorker(t *testing.T) {
	ca := testca.New(t)
	api := newAPIServer(t, ca)
	w := newWorld(t, ca, api, clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode("w1", "worker", "10.5.0.101"), clusterNode("w2", "worker", "10.5.0.102"), clusterNode("w3", "worker", "10.5.0.103"))
	api.put(nodesPath+"/cp", nodeObjectOf("cp", "127.0.0.1", "10.244.0.0/24"))
	api.put(nodesPath+"/w2", nodeObjectOf("w2", "10.5.0.102", "10.244.2.0/24"))
	api.put(nodesPath+"/w3", nodeObjectOf("w3", "10.5.0.102", "10.244.3.0/24")) // it says that it is where w2 is
	api.put(nodesPath+"/other", nodeObjectOf("other", "10.5.0.77", "10.244.7.0/24"))
	w.start = func(unit string) {
		if unit == "kubelet" {
			api.put(nodesPath+"/w1", nodeObjectOf("w1", "10.5.0.101", "10.244.1.0/24"))
		}
	}
	d := w.run(workerDocument)
	routes := func() string {
		r, _ := w.pods.Get()
		text := fmt.Sprint(r.GetPodSubnets(), r.GetLocalPrefixes())
		for _, w := range r.GetRoutes() {
			text += " " + w.GetPrefix() + " via " + w.GetVia()
		}
		return text
	}
	w.until(d, "ways to the pods of members, at addresses that the cluster has seen", func() bool {
		return routes() == `[10.244.0.0/16] [10.244.1.0/24] 10.244.0.0/24 via 127.0.0.1 10.244.2.0/24 via 10.5.0.102`
	})
	w.until(d, "the pod network's file", func() bool {
		text, err := os.ReadFile(filepath.Join(d.cfg.Dir, cniFile))
		return err == nil && strings.Contains(string(text), `"10.244.1.0/24"`)
	})
	w.until(d, "its Node is ready", func() bool {
		st, _ := d.status.Get()
		return st.GetNodeReady() && st.GetApiReady() && st.GetVersion() == "v1.0.0"
	})
	for _, c := range []string{"kube-apiserver", "kube-scheduler", "kube-controller-manager"} {
		w.mu.Lock()
		s := w.units[c]
		w.mu.Unlock()
		if s.State != "down" {
			t.Errorf("a worker runs %s", c)
		}
	}
	// Another node joins, one goes.
	api.put(nodesPath+"/w4", nodeObjectOf("w4", "10.5.0.104", "10.244.4.0/24"))
	w.members(clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode("w1", "worker", "10.5.0.101"), clusterNode("w4", "worker", "10.5.0.104"))
	w.until(d, "w4's pods, and not w2's", func() bool {
		return routes() == `[10.244.0.0/16] [10.244.1.0/24] 10.244.0.0/24 via 127.0.0.1 10.244.4.0/24 via 10.5.0.104`
	})
	// networkd has forgotten it with its process.
	w.pods.Set(nil)
	w.set("networkd", "up", "")
	w.until(d, "networkd is told again", func() bool { r, _ := w.pods.Get(); return r != nil })
	for _, call := range api.by("bulkhead:kubeletd") {
		if !slices.Contains([]string{":bulkhead GET " + nodesPath, ":bulkhead GET " + nodesPath + "/w1", ":bulkhead GET /readyz", ":bulkhead GET /version"}, call) {
			t.Errorf("a worker's kubeletd: %s", call)
		}
	}
	if calls := api.by(""); slices.ContainsFunc(calls, func(c string) bool { return !strings.HasPrefix(c, "bulkhead:kubeletd:") }) {
		t.Errorf("somebody else called: %q", calls)
	}
}

const controlPlaneDocument = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: cp\nrole: controlplane\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: c\nendpoint: https://127.0.0.1:6443\n"

// certRequest is a CertificateSigningRequest of a node's kubelet.
func certRequest(t *testing.T, signer, user, name string, addresses ...net.IP) object {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := x509.CertificateRequest{Subject: pkix.Name{CommonName: nodeUser + name, Organization: []string{"system:nodes"}}, IPAddresses: addresses}
	usage, groups := "client auth", []any{"system:bootstrappers"}
	if signer == servingSigner {
		tmpl.DNSNames, usage, groups = []string{name}, "server auth", []any{"system:nodes"}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return object{"metadata": object{}, "status": object{}, "spec": object{"signerName": signer, "username": user, "groups": groups, "usages": []any{"digital signature", usage},
		"request": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})}}
}

// A control plane's kubeletd gives certificates to the kubelets of members only, and deletes the Node of one that was removed, but no other's.
func TestControlPlane(t *testing.T) {
	ca := testca.New(t)
	api := newAPIServer(t, ca)
	cp, w1 := clusterNode("cp", "controlplane", "127.0.0.1"), clusterNode("w1", "worker", "10.5.0.101")
	w := newWorld(t, ca, api, cp, w1)
	w.start = func(unit string) {
		if unit == "kubelet" {
			api.put(nodesPath+"/cp", nodeObjectOf("cp", "127.0.0.1", "10.244.0.0/24"))
		}
	}
	api.put(nodesPath+"/w1", nodeObjectOf("w1", "10.5.0.101", "10.244.1.0/24"))
	foreign := nodeObjectOf("foreign", "10.5.0.9", "10.244.9.0/24")
	delete(foreign["metadata"].(object), "labels")
	api.put(nodesPath+"/foreign", foreign)
	api.put(csrPath+"/a-client", certRequest(t, clientSigner, "system:bootstrap:w1", "w1"))
	api.put(csrPath+"/b-server", certRequest(t, servingSigner, "system:node:w1", "w1", net.IPv4(10, 5, 0, 101)))
	api.put(csrPath+"/c-stolen", certRequest(t, servingSigner, "system:node:w1", "w1", net.IPv4(10, 5, 0, 11)))
	api.put(csrPath+"/d-removed", certRequest(t, clientSigner, "system:bootstrap:w9", "w9"))
	d := w.run(controlPlaneDocument)
	signed := func(name string) bool {
		s, _ := api.get(csrPath + "/" + name)["status"].(object)
		return s["certificate"] != nil
	}
	w.until(d, "a worker's certificates", func() bool { return signed("a-client") && signed("b-server") })
	w.until(d, "its own Node is labelled", func() bool {
		meta, _ := api.get(nodesPath + "/cp")["metadata"].(object)
		labels, _ := meta["labels"].(object)
		return labels[controlPlaneKey] == ""
	})
	for _, name := range []string{"c-stolen", "d-removed"} {
		if s := api.get(csrPath + "/" + name)["status"].(object); len(s) > 0 {
			t.Errorf("%s: %v", name, s)
		}
	}
	w.members(cp)
	w.until(d, "the Node of the one that was removed is gone", func() bool { return api.get(nodesPath+"/w1") == nil })
	for _, name := range []string{"cp", "foreign"} {
		if api.get(nodesPath+"/"+name) == nil {
			t.Errorf("Node %s is gone, too", name)
		}
	}
	api.put(csrPath+"/e-late", certRequest(t, clientSigner, "system:bootstrap:w1", "w1"))
	api.put(csrPath+"/f-own", certRequest(t, clientSigner, "system:bootstrap:cp", "cp"))
	d.loop.Wake()
	w.until(d, "its own certificate", func() bool { return signed("f-own") })
	if signed("e-late") {
		t.Error("one that was removed has a certificate")
	}
	if r, err := (&server{d: d}).GetKubeconfig(t.Context(), &kubernetesv1.GetKubeconfigRequest{User: "ann"}); err != nil || !strings.Contains(r.GetKubeconfig(), "server: https://127.0.0.1:6443\n") {
		t.Errorf("a kubeconfig is for the cluster's endpoint: %v\n%s", err, r.GetKubeconfig())
	}
	if a := addr("10.5.0.11"); d.kernel.uncertified(a) || !d.kernel.uncertified(addr("10.5.0.12")) {
		t.Error("the API server's certificate is not for the node's address")
	}
	// While the members are not known, nobody is a stranger.
	if s := strangers(map[string]Peer{"w1": {Ours: true}}, members(&trustv1.TrustState{})); len(s) > 0 {
		t.Errorf("strangers: %v", s)
	}
}

// Two control planes approve and sign the same request at the same time. One is first; the other one's conflict is nobody's error.
func TestTwoAtOnce(t *testing.T) {
	ca := testca.New(t)
	api := newAPIServer(t, ca)
	tls := ca.Client(t, "kubeletd")
	known := clients{members: map[string]Member{"w1": {}}}
	k := &system{cfg: Config{Signer: ca}}
	c := &cluster{server: api.url, http: newCluster(api.url, tls.RootCAs, &tls.Certificates[0]).http}
	path := csrPath + "/x"
	api.put(path, certRequest(t, clientSigner, "system:bootstrap:w1", "w1"))
	both := func(what string, f func() error) {
		t.Helper()
		held := make(chan struct{})
		api.mu.Lock()
		api.held = held
		api.mu.Unlock()
		errs := make(chan error, 2)
		for range 2 {
			go func() { errs <- f() }()
		}
		<-api.waiting
		<-api.waiting // both have read it, and neither has written
		close(held)
		for range 2 {
			if err := <-errs; err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	both("approve", func() error { return c.updateCSR(t.Context(), "x", "approval", approve(known)) })
	both("sign", func() error { return c.updateCSR(t.Context(), "x", "status", k.sign(t.Context(), known)) })
	st := api.get(path)["status"].(object)
	if n, _ := st["conditions"].([]any); len(n) != 1 || st["certificate"] == nil {
		t.Errorf("status %v", st)
	}
	api.mu.Lock()
	api.held = nil
	api.mu.Unlock()
	if err := c.updateCSR(t.Context(), "gone", "approval", approve(known)); err != nil {
		t.Errorf("a request that is gone: %v", err)
	}
}

// Where the API servers are is what the cluster says, except for one's own.
func TestTargets(t *testing.T) {
	own := netip.MustParseAddrPort("127.0.0.1:6443")
	many := []netip.Addr{addr("10.5.0.12"), addr("10.5.0.22"), addr("10.5.0.32"), addr("10.5.0.42")}
	all := map[string]Member{"n1": {config.ControlPlane, []netip.Addr{addr("10.5.0.11")}}, "n2": {config.ControlPlane, many}, "w1": {config.Worker, []netip.Addr{addr("10.5.0.101")}}}
	for _, c := range []struct {
		name    string
		role    config.Role
		members map[string]Member
		want    string
	}{
		{"n1", config.ControlPlane, all, "127.0.0.1:6443 [10.5.0.12:6443 10.5.0.22:6443 10.5.0.32:6443]"},
		{"n1", config.ControlPlane, nil, "127.0.0.1:6443 []"},
		{"w1", config.Worker, all, "invalid AddrPort [10.5.0.11:6443 10.5.0.12:6443 10.5.0.22:6443 10.5.0.32:6443]"},
		{"w1", config.Worker, nil, "invalid AddrPort []"},
	} {
		got := targets(spec{Node: c.name, Role: c.role}, own, c.members)
		if text := fmt.Sprint(got.Preferred, " ", got.Backends); text != c.want {
			t.Errorf("%s, %d members: %s, want %s", c.name, len(c.members), text, c.want)
		}
	}
}

// A kubelet may say of its Node what it likes: no subnet that is not its own leads to it.
func TestPodNetworkOf(t *testing.T) {
	want := cp(t)
	have := State{Node: &Node{PodCIDR: netip.MustParsePrefix("10.244.0.0/24")}, Members: map[string]Member{}, Peers: map[string]Peer{}}
	for i, c := range []struct{ created, subnet, address, seen string }{
		{"3", "10.244.5.0/24", "10.5.0.5", "10.5.0.5"},
		{"4", "10.244.5.0/25", "10.5.0.6", "10.5.0.6"}, // of an older one's
		{"1", "10.244.0.0/24", "10.5.0.7", "10.5.0.7"}, // this node's
		{"1", "10.244.0.0/16", "10.5.0.8", "10.5.0.8"}, // everybody's
		{"1", "10.96.0.0/24", "10.5.0.9", "10.5.0.9"},  // Services'
		{"1", "0.0.0.0/0", "10.5.0.10", "10.5.0.10"},
		{"1", "10.244.6.0/24", "10.5.0.5", "10.5.0.11"}, // at another's address
		{"1", "10.244.7.1/24", "10.5.0.12", "10.5.0.12"},
		{"2", "10.244.2.0/24", "10.5.0.13", "10.5.0.13"},
	} {
		name := fmt.Sprintf("w%d", i)
		have.Members[name] = Member{config.Worker, []netip.Addr{addr(c.seen)}}
		have.Peers[name] = Peer{Created: c.created, PodCIDR: netip.MustParsePrefix(c.subnet), Address: addr(c.address)}
	}
	have.Peers["stranger"] = Peer{Created: "1", PodCIDR: netip.MustParsePrefix("10.244.9.0/24"), Address: addr("10.5.0.99")}
	if got, known := podNetworkOf(want, have); !known || got.String() != "10.244.0.0/24 of 10.244.0.0/16, 10.244.2.0/24 via 10.5.0.13, 10.244.5.0/24 via 10.5.0.5" {
		t.Errorf("got %s", got)
	}
}
