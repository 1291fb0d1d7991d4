package kubeletd

import (
	"bytes"
	"embed"
	"encoding/binary"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"text/template"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

//go:embed templates addons
var texts embed.FS

var templates = template.Must(template.New("").Funcs(template.FuncMap{"join": func(a []netip.Addr, sep string) string {
	var out []string
	for _, v := range a {
		out = append(out, v.String())
	}
	return strings.Join(out, sep)
}}).ParseFS(texts, "templates/*", "addons/*"))

// Images in /usr/share/bulkhead/images.tar. There is no registry of that name: pods must not try to pull them.
const (
	pauseImage   = "bulkhead.dev/pause:1"
	corednsImage = "bulkhead.dev/coredns:v1.15.0"
)

// File is one file that a unit reads. Files of certificates hold certificate and key, so that a new pair replaces the old one whole.
type File struct {
	Path    string // below the runtime folder
	Text    string
	Profile string // of the certificate; then Text is ""
	Group   uid.ID // who may read it besides kubeletd; kubeletd itself: root and units of group kubeletd
	Public  bool   // everybody may read it
	// Units are started anew when Text changes; certificates are read anew by everybody.
	Units []string
}

// digest is what the file's content should have; "" while trustd has not signed.
func (f File) digest(pairs map[string]string) string {
	if f.Profile != "" {
		return pairs[f.Profile]
	}
	return digest([]byte(f.Text))
}

// Where the files are; the units in the image name these paths too.
const (
	folder  = "kubernetes" // below the runtime folder
	cniFile = "cni/10-bulkhead.conflist"
)

// entry is one row of the table of files. What a template needs and is not known yet keeps only that file from being written.
type entry struct {
	file, template string
	profile        string
	group          uid.ID
	public         bool
	units          []string
	needs          func(*facts) bool
	worker         bool // a worker has it too
}

var (
	needsNothing = func(*facts) bool { return true }
	needsAuth    = func(f *facts) bool { return f.KubernetesCA != "" && f.EtcdCA != "" && f.FrontProxyCA != "" }
	needsMembers = func(f *facts) bool { return f.KubernetesCA != "" && f.ControlPlanes > 0 }
	needsKubeCA  = func(f *facts) bool { return f.KubernetesCA != "" }
	needsNode    = func(f *facts) bool { return f.KubernetesCA != "" && f.Node != "" && f.Address.IsValid() }
)

var entries = []entry{
	{file: "containerd/config.toml", template: "containerd.toml", group: uid.Kubeletd, units: []string{"containerd"}, needs: needsNothing, worker: true},
	{file: cniFile, template: "cni.conflist", public: true, needs: func(f *facts) bool { return f.PodCIDR.IsValid() && f.CNI == "bridge" }, worker: true},

	{file: folder + "/pki/kubernetes-ca.pem", template: "KubernetesCA", public: true, needs: needsKubeCA, worker: true,
		units: []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"}},
	{file: folder + "/pki/etcd-ca.pem", template: "EtcdCA", public: true, units: []string{"kube-apiserver"}, needs: needsAuth},
	{file: folder + "/pki/front-proxy-ca.pem", template: "FrontProxyCA", public: true, units: []string{"kube-apiserver"}, needs: needsAuth},

	// With no grace for watches the API server waits a minute for its clients to end them, which they never do.
	apiserver("args", "kube-apiserver.args"), apiserver("admission.yaml", "admission.yaml"),
	apiserver("audit.yaml", "audit.yaml"), apiserver("encryption.yaml", "encryption.yaml"),
	pair("kube-apiserver/server.pem", "kube-apiserver-server", uid.KubeAPIServer),
	pair("kube-apiserver/etcd-client.pem", "etcd-client-kube-apiserver", uid.KubeAPIServer),
	pair("kube-apiserver/kubelet-client.pem", "kube-apiserver-kubelet-client", uid.KubeAPIServer),
	pair("kube-apiserver/front-proxy-client.pem", "front-proxy-client", uid.KubeAPIServer),

	{file: folder + "/kube-controller-manager/args", template: "kube-controller-manager.args", group: uid.KubeControllerMgr, units: []string{"kube-controller-manager"}, needs: needsMembers},
	{file: folder + "/kube-controller-manager/kubeconfig", template: "kubeconfig.yaml", group: uid.KubeControllerMgr, units: []string{"kube-controller-manager"}, needs: needsKubeCA},
	pair("kube-controller-manager/client.pem", "kube-controller-manager", uid.KubeControllerMgr),

	{file: folder + "/kube-scheduler/args", template: "kube-scheduler.args", group: uid.KubeScheduler, units: []string{"kube-scheduler"}, needs: needsKubeCA},
	{file: folder + "/kube-scheduler/config.yaml", template: "kube-scheduler.yaml", group: uid.KubeScheduler, units: []string{"kube-scheduler"}, needs: needsMembers},
	{file: folder + "/kube-scheduler/kubeconfig", template: "kubeconfig.yaml", group: uid.KubeScheduler, units: []string{"kube-scheduler"}, needs: needsKubeCA},
	pair("kube-scheduler/client.pem", "kube-scheduler", uid.KubeScheduler),

	node("kubelet/args", "kubelet.args"), node("kubelet/config.yaml", "kubelet.yaml"), node("kubelet/bootstrap-kubeconfig", "kubeconfig.yaml"),
	nodePair("kubelet/client.pem", "kubelet-bootstrap"),
	node("kube-proxy/args", "kube-proxy.args"), node("kube-proxy/config.yaml", "kube-proxy.yaml"), node("kube-proxy/kubeconfig", "kubeconfig.yaml"),
	nodePair("kube-proxy/client.pem", "kube-proxy"),
}

func apiserver(file, tmpl string) entry {
	return entry{file: folder + "/kube-apiserver/" + file, template: tmpl, group: uid.KubeAPIServer, units: []string{"kube-apiserver"},
		needs: func(f *facts) bool { return needsAuth(f) && f.Address.IsValid() }}
}

func pair(file, profile string, group uid.ID) entry {
	return entry{file: folder + "/" + file, profile: profile, group: group, needs: needsAuth, units: []string{unitOf(file)}}
}

func node(file, tmpl string) entry {
	return entry{file: folder + "/" + file, template: tmpl, group: uid.Kubeletd, needs: needsNode, worker: true, units: []string{unitOf(file)}}
}

func nodePair(file, profile string) entry {
	return entry{file: folder + "/" + file, profile: profile, group: uid.Kubeletd, needs: needsNode, worker: true, units: []string{unitOf(file)}}
}

// unitOf is the first folder of a file below folder.
func unitOf(file string) string { u, _, _ := strings.Cut(file, "/"); return u }

// facts is what the templates may name.
type facts struct {
	Dir, Etcd, Trustd, Audit              string
	Node, Cluster, Domain, Server, Client string
	CNI, PodSecurity                      string
	Address                               netip.Addr
	Bind                                  string // where the API server listens
	PodSubnet, ServiceSubnet, PodCIDR     netip.Prefix
	NodeMask                              int
	DNS                                   netip.Addr
	Nameservers                           []netip.Addr
	Schedulable                           bool
	ReservedCPU, ReservedMemory           string
	KubernetesCA, EtcdCA, FrontProxyCA    string
	Pause, CoreDNS                        string
	ControlPlanes                         int // in the cluster; 0 while that is not known
	// Mark is another one for each authority but the first: with it the kubelet gets new certificates, and add-ons start anew.
	Mark string
}

// localAPI is where every node reaches the API servers: at its own balancer. Kubernetes' files name it, so it is no setting.
var localAPI = fmt.Sprintf("127.0.0.1:%d", balance.Port)

// gather joins what is wanted with what was read.
func gather(want spec, have State) *facts {
	bind := "0.0.0.0"
	if slices.ContainsFunc(want.VirtualIPs, netip.Addr.Is6) {
		bind = "::" // which is IPv4 too
	}
	f := &facts{
		Bind: bind,
		Dir:  path.Join(have.Dir, folder), Etcd: have.EtcdAddress, Trustd: peer.Socket("trustd"), Audit: have.Audit,
		Node: want.Node, Cluster: want.Cluster, Domain: want.Domain, Server: "https://" + localAPI, CNI: want.CNI, PodSecurity: want.PodSecurity,
		Address: have.Address, PodSubnet: want.PodSubnet, ServiceSubnet: want.ServiceSubnet, NodeMask: nodeMask(want.PodSubnet),
		DNS: nth(want.ServiceSubnet, 10), Nameservers: have.Nameservers, Schedulable: want.Schedulable || want.Role == config.Worker,
		ReservedCPU: "200m", ReservedMemory: "768Mi", Pause: pauseImage, CoreDNS: corednsImage,
		KubernetesCA: have.Trust.Kubernetes, EtcdCA: have.Trust.Etcd, FrontProxyCA: have.Trust.FrontProxy, ControlPlanes: len(controlPlanes(have.Members)), Mark: have.Trust.mark(),
	}
	if want.Role == config.Worker {
		f.ReservedCPU, f.ReservedMemory = "100m", "256Mi"
	}
	if have.Node != nil {
		f.PodCIDR = have.Node.PodCIDR
	}
	return f
}

// render returns the files whose inputs are known, in the order of the table. It is pure.
func render(want spec, have State) ([]File, error) {
	f := gather(want, have)
	var out []File
	for _, e := range entries {
		if want.Role == config.Worker && !e.worker || !e.needs(f) {
			continue
		}
		file := File{Path: e.file, Profile: e.profile, Group: e.group, Public: e.public, Units: e.units}
		switch e.template {
		case "":
		case "KubernetesCA":
			file.Text = f.KubernetesCA
		case "EtcdCA":
			file.Text = f.EtcdCA
		case "FrontProxyCA":
			file.Text = f.FrontProxyCA
		default:
			f.Client = path.Join(have.Dir, path.Dir(e.file), "client.pem")
			var err error
			if file.Text, err = execute(e.template, f); err != nil {
				return nil, fmt.Errorf("render %s: %w", e.file, err)
			}
		}
		out = append(out, file)
	}
	return out, nil
}

func execute(name string, f *facts) (string, error) {
	var b bytes.Buffer
	err := templates.ExecuteTemplate(&b, name, f)
	return b.String(), err
}

// Addon is a set of objects in the cluster, as YAML.
type Addon struct{ Name, Text string }

// addons returns what the cluster must hold. rbac comes first: the kubelet and kubeletd itself need it.
func addons(want spec, have State) ([]Addon, error) {
	var out []Addon
	for _, name := range []string{"rbac", "coredns"} {
		text, err := execute(name+".yaml", gather(want, have))
		if err != nil {
			return nil, fmt.Errorf("render add-on %s: %w", name, err)
		}
		out = append(out, Addon{name, text})
	}
	return out, nil
}

// profiles are the certificates that kubeletd holds for others, in the order of the table.
func profiles() []string {
	var out []string
	for _, e := range entries {
		if e.profile != "" {
			out = append(out, e.profile)
		}
	}
	return out
}

// nth returns the n-th address of a subnet; the subnet's own address is number 0.
func nth(p netip.Prefix, n uint32) netip.Addr {
	if !p.IsValid() || !p.Addr().Is4() {
		a := p.Masked().Addr()
		for range n {
			a = a.Next()
		}
		return a
	}
	b := p.Masked().Addr().As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(b)
}

// nodeMask is the length of a node's share of the pod subnet: a /24, or all of it if that is smaller.
func nodeMask(p netip.Prefix) int {
	if p.Addr().Is4() {
		return max(24, p.Bits())
	}
	return max(64, p.Bits())
}
