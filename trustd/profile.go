package trustd

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// profile says who may have which certificate. What is zero is not given.
type profile struct {
	who uid.ID // the only daemon that may ask; a second one needs a profile of its own
	ca  func(*keyring) *authority

	// The subject is cn and org, with %s for the host's name; if cn is "" it is the request's, which people must then check.
	cn  string
	org []string
	// member puts the node's role in its cluster among org, and its key's digest in the subject (serialNumber), so that another node that
	// gets its name later is not taken for it.
	member bool
	// exact wants the request to carry just this subject: it comes from further away (the kubelet) through who.
	exact bool

	server, client bool // extended key usages
	// names are the DNS names and addresses from the document that a server's certificate always has.
	names func(*spec) []string
	// addresses lets who name the node's own addresses: trustd has no network to look at.
	addresses bool
	// worker lets a worker of the cluster have it.
	worker bool
	// kubelet makes it that of the member of the cluster which the request names, this node or another one: who asks for others' kubelets, too.
	kubelet bool

	life    time.Duration
	maxLife time.Duration // 0: the request must not ask for another life
}

const (
	day          = 24 * time.Hour
	maxAddresses = 32 // in one request
	maxNames     = 64 // in one certificate
)

// profiles is the whole list.
var profiles = map[string]profile{
	"apid-server":    {who: uid.Apid, ca: osCA, cn: "apid", server: true, names: nodeNames, addresses: true, life: day, worker: true},
	"gateway-server": {who: uid.Gateway, ca: osCA, cn: "gateway", server: true, names: gatewayNames, addresses: true, life: day, worker: true},

	// With it apid calls the apid of other nodes: peer.NodeFrom. No other profile gives a role of its kind, and no person or program can have one.
	"apid-node": {who: uid.Apid, ca: osCA, cn: peer.NodePrefix + "%s", org: []string{rolePrefix + peer.RoleNode}, member: true, client: true, life: day, worker: true},

	// etcd's own gateway speaks to itself with the server's certificate, hence client.
	"etcd-server": {who: uid.Etcdd, ca: etcdCA, cn: "etcd-server", server: true, client: true, names: hostNames, addresses: true, life: day},
	"etcd-peer":   {who: uid.Etcdd, ca: etcdCA, cn: "etcd-peer", server: true, client: true, names: hostNames, addresses: true, life: day},
	// In etcd's RBAC the common name is the user.
	"etcd-root":                  {who: uid.Etcdd, ca: etcdCA, cn: "root", client: true, life: day},
	"etcd-client-bulkhead":       {who: uid.Etcdd, ca: etcdCA, cn: "bulkhead", client: true, life: day},
	"etcd-client-kube-apiserver": {who: uid.Kubeletd, ca: etcdCA, cn: "kube-apiserver", client: true, life: day},

	"kube-apiserver-server":         {who: uid.Kubeletd, ca: kubernetesCA, cn: "kube-apiserver", server: true, names: apiServerNames, addresses: true, life: day},
	"kube-apiserver-kubelet-client": {who: uid.Kubeletd, ca: kubernetesCA, cn: "kube-apiserver-kubelet-client", client: true, life: day},
	"front-proxy-client":            {who: uid.Kubeletd, ca: frontProxyCA, cn: "front-proxy-client", client: true, life: day},
	"kube-controller-manager":       {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:kube-controller-manager", client: true, life: day},
	"kube-scheduler":                {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:kube-scheduler", client: true, life: day},
	"kube-proxy":                    {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:kube-proxy", client: true, life: day, worker: true},
	"kubernetes-admin":              {who: uid.Kubeletd, ca: kubernetesCA, org: []string{"system:masters"}, client: true, life: day, maxLife: 30 * day},
	// kubeletd's own identity towards the API server; what it may do there stands in its add-on "rbac". With the first, a control plane's, it approves
	// certificates; with the second it only looks.
	"kubeletd":      {who: uid.Kubeletd, ca: kubernetesCA, cn: "bulkhead:kubeletd", client: true, life: day},
	"kubeletd-node": {who: uid.Kubeletd, ca: kubernetesCA, cn: "bulkhead:kubeletd:%s", org: []string{"bulkhead:kubeletd-nodes"}, client: true, life: day, worker: true},

	// The kubelets': a control plane's kubeletd passes on what a kubelet put into a CertificateSigningRequest.
	"kubelet-bootstrap": {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:bootstrap:%s", org: []string{"system:bootstrappers"}, client: true, life: time.Hour, worker: true},
	"kubelet-client":    {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:node:%s", org: []string{"system:nodes"}, exact: true, kubelet: true, client: true, life: day},
	"kubelet-serving":   {who: uid.Kubeletd, ca: kubernetesCA, cn: "system:node:%s", org: []string{"system:nodes"}, exact: true, kubelet: true, server: true, names: onlyHost, addresses: true, life: day},
}

func osCA(k *keyring) *authority { return k.os }
func etcdCA(k *keyring) *authority {
	return k.of(func(c *cluster) *authority { return c.etcd })
}
func kubernetesCA(k *keyring) *authority {
	return k.of(func(c *cluster) *authority { return c.kubernetes })
}
func frontProxyCA(k *keyring) *authority {
	return k.of(func(c *cluster) *authority { return c.frontProxy })
}

func (k *keyring) of(f func(*cluster) *authority) *authority {
	if k.cluster == nil {
		return nil
	}
	return f(k.cluster)
}

// onlyHost is the node's name, for the kubelet.
func onlyHost(s *spec) []string { return []string{s.hostname} }

// hostNames are the names under which the node reaches itself.
func hostNames(s *spec) []string { return []string{s.hostname, "localhost", "127.0.0.1", "::1"} }

// nodeNames are those of apid. "bulkhead" is in all of them: clients of gRPC know a node by its authority and this
// name, under whatever address they reach it.
func nodeNames(s *spec) []string {
	names := []string{"bulkhead"}
	if s.member == roster.ControlPlane {
		names = append(names, join.ServerName)
	}
	return slices.Concat(names, gatewayNames(s))
}

// gatewayNames are those that HTTP clients use. Without apid's name: else a gateway that somebody broke into could pass for apid.
func gatewayNames(s *spec) []string { return slices.Concat(hostNames(s), s.names) }

// apiServerNames are those under which pods, nodes and people reach Kubernetes' API server.
func apiServerNames(s *spec) []string {
	out := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	if s.domain != "" {
		out = append(out, "kubernetes.default.svc."+s.domain)
	}
	if s.service.IsValid() {
		out = append(out, s.service.Masked().Addr().Next().String())
	}
	return slices.Concat(out, hostNames(s), s.names)
}

// spec is what trustd takes from the document.
type spec struct {
	generation uint64 // 0: there is none yet
	hostname   string
	role       config.Role
	names      []string // of the cluster, DNS and addresses, its endpoint's host and its virtual addresses included
	domain     string
	service    netip.Prefix
	roles      []string // that the document makes, for people

	// Not from the document: the node's role in its cluster, and the digest of its own key. "" while it is in none.
	member, key string
}

// parseSpec reads the sections that machined hands out.
func parseSpec(generation uint64, documents []byte) (*spec, error) {
	set, err := config.Parse("spec", documents)
	if err != nil {
		return nil, err
	}
	s := &spec{generation: generation, hostname: set.Machine.Hostname, role: set.Machine.Role, domain: set.Kubernetes.Domain, service: set.Kubernetes.ServiceSubnet}
	s.names = append(s.names, set.Cluster.Names...)
	for _, a := range set.Cluster.VirtualIPs {
		s.names = append(s.names, a.String())
	}
	for _, r := range set.Access.Roles {
		s.roles = append(s.roles, r.Name)
	}
	if set.Cluster.Endpoint != "" {
		u, err := url.Parse(set.Cluster.Endpoint)
		if err != nil {
			return nil, fmt.Errorf("cluster endpoint: %w", err)
		}
		s.names = append(s.names, u.Hostname())
	}
	return s, nil
}

// allNames are the names from the document in any server's certificate, sorted: when they change, servers ask anew.
func (s *spec) allNames() []string {
	out := slices.Concat(nodeNames(s), apiServerNames(s))
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(n string) bool { return n == "" })
}

// decide returns what to sign for a request, or why not. It is pure.
func decide(name string, who uid.ID, r *x509.CertificateRequest, life time.Duration, s *spec) (leaf, error) {
	p, ok := profiles[name]
	if !ok || p.who != who {
		return leaf{}, errs.New(errs.Denied, "profile %q: user %q may not ask for it; %s", name, who.Name(), offers(who))
	}
	return p.issue(name, r, life, s)
}

// forKubelet returns the specification of the member of the cluster whose kubelet a request is for; list is the cluster's, own this node's. Of itself a
// node knows its addresses; another one's count if the cluster has seen them. Denied: the name is no member's, or an address is not that member's. It is pure.
func forKubelet(name string, r *x509.CertificateRequest, list *roster.State, own *spec) (*spec, error) {
	if list == nil {
		return nil, errs.New(errs.Precondition, "profile %q: the cluster's list of nodes is not known yet", name)
	}
	node := strings.TrimPrefix(r.Subject.CommonName, strings.TrimSuffix(profiles[name].cn, "%s"))
	all := list.Cluster()
	i := slices.IndexFunc(all, func(n *trustv1.ClusterNode) bool { return n.GetName() == node })
	if i < 0 {
		return nil, errs.New(errs.Denied, "profile %q: %.80q is no node of the cluster; those are %q", name, node, slices.Sorted(maps.Keys(list.Nodes)))
	}
	for _, ip := range r.IPAddresses {
		a, _ := netip.AddrFromSlice(ip) // x509 has checked the length
		if node != own.hostname && !slices.Contains(all[i].GetAddresses(), a.Unmap().String()) {
			return nil, errs.New(errs.Denied, "profile %q: address %s: the cluster has seen node %q at %q", name, a.Unmap(), node, all[i].GetAddresses())
		}
	}
	return &spec{hostname: node, member: all[i].GetRole(), key: all[i].GetKey()}, nil
}

// forNode returns what to sign for another node of the cluster, which is not trusted with its own names: they are from the cluster's record. Of the
// addresses in the request those count that the cluster has seen it call from. It is pure.
func forNode(name string, n roster.Node, r *x509.CertificateRequest, life time.Duration) (leaf, error) {
	p, ok := profiles[name]
	if !ok || !p.worker && n.Role != roster.ControlPlane {
		return leaf{}, errs.New(errs.Denied, "profile %.64q: node %q is a %s of the cluster and may not have it; allowed are %s", name, n.Name, n.Role, strings.Join(forWorkers(), ", "))
	}
	own := *r
	own.IPAddresses = slices.DeleteFunc(slices.Clone(r.IPAddresses), func(ip net.IP) bool {
		a, _ := netip.AddrFromSlice(ip) // x509 has checked the length
		return !a.IsLoopback() && !slices.Contains(n.Addresses, a.Unmap().String())
	})
	return p.issue(name, &own, life, &spec{hostname: n.Name, member: n.Role, key: n.Key})
}

// forWorkers are the profiles that a worker can have.
func forWorkers() []string {
	return slices.Sorted(func(yield func(string) bool) {
		for n, p := range profiles {
			if p.worker && !yield(n) {
				return
			}
		}
	})
}

// issue fills a profile in. It is pure.
func (p profile) issue(name string, r *x509.CertificateRequest, life time.Duration, s *spec) (leaf, error) {
	if p.member && s.key == "" { // the first node gets its own key when etcd has answered
		return leaf{}, errs.New(errs.Precondition, "profile %q: the node has no place in a cluster yet", name)
	}
	if s.hostname == "" && (strings.Contains(p.cn, "%s") || p.exact) {
		return leaf{}, errs.New(errs.Precondition, "profile %q: the node has no name yet; apply a configuration", name)
	}
	l := leaf{life: p.life}
	if life > 0 {
		if life > p.maxLife {
			return leaf{}, errs.New(errs.Invalid, "profile %q: ttl_seconds is %d; allowed is at most %d", name, life/time.Second, p.maxLife/time.Second)
		}
		l.life = life
	}
	var err error
	if l.subject, err = p.subject(name, r, s); err != nil {
		return leaf{}, err
	}
	if p.server {
		l.usage = append(l.usage, x509.ExtKeyUsageServerAuth)
	}
	if p.client {
		l.usage = append(l.usage, x509.ExtKeyUsageClientAuth)
	}
	l.dns, l.ips, err = p.altNames(name, r, s)
	return l, err
}

func (p profile) subject(name string, r *x509.CertificateRequest, s *spec) (pkix.Name, error) {
	want := pkix.Name{CommonName: strings.ReplaceAll(p.cn, "%s", s.hostname), Organization: p.org}
	if p.member {
		want.Organization = append(slices.Clone(p.org), rolePrefix+peer.RoleNode+"-"+s.member)
		want.SerialNumber = s.key
	}
	if p.cn == "" {
		want.CommonName = r.Subject.CommonName
		if err := checkName(want.CommonName); err != nil {
			return want, errs.New(errs.Invalid, "profile %q: common name: %w", name, err)
		}
	}
	// Compared as text, so that not one attribute more is in it.
	if p.exact && r.Subject.String() != want.String() {
		return want, errs.New(errs.Denied, "profile %q: subject is %q, must be %q", name, r.Subject.String(), want.String())
	}
	return want, nil
}

// altNames joins the names of the profile with the addresses of the request. Names that the profile does not have are refused,
// so that nobody thinks to have got them.
func (p profile) altNames(name string, r *x509.CertificateRequest, s *spec) (dns []string, ips []net.IP, err error) {
	var addrs []netip.Addr
	if p.names != nil {
		for _, n := range p.names(s) {
			if a, err := netip.ParseAddr(n); err == nil {
				addrs = append(addrs, a)
			} else if n != "" && !slices.Contains(dns, n) {
				dns = append(dns, n)
			}
		}
	}
	for _, n := range r.DNSNames {
		if !slices.Contains(dns, n) {
			return nil, nil, errs.New(errs.Denied, "profile %q: DNS name %q: allowed are %q; add it to names in the document of kind Cluster", name, n, dns)
		}
	}
	if len(r.EmailAddresses) > 0 || len(r.URIs) > 0 {
		return nil, nil, errs.New(errs.Denied, "profile %q: mail addresses and URIs are in no certificate", name)
	}
	if len(r.IPAddresses) > maxAddresses || len(r.IPAddresses) > 0 && !p.addresses {
		return nil, nil, errs.New(errs.Denied, "profile %q: %d addresses in the request; allowed are %d", name, len(r.IPAddresses), map[bool]int{true: maxAddresses}[p.addresses])
	}
	for _, ip := range r.IPAddresses {
		a, _ := netip.AddrFromSlice(ip) // x509 has checked the length
		if a = a.Unmap(); a.IsUnspecified() || a.IsMulticast() {
			return nil, nil, errs.New(errs.Denied, "profile %q: address %s is no node's", name, a)
		}
		addrs = append(addrs, a)
	}
	for i, a := range addrs {
		if !slices.Contains(addrs[:i], a) {
			ips = append(ips, a.AsSlice())
		}
	}
	if n := len(dns) + len(ips); n > maxNames {
		return nil, nil, errs.New(errs.Invalid, "profile %q: %d names; a certificate has at most %d", name, n, maxNames)
	}
	return dns, ips, nil
}

// offers tells a daemon what it may ask for.
func offers(who uid.ID) string {
	var names []string
	for n, p := range profiles {
		if p.who == who {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return "it may ask for none"
	}
	slices.Sort(names)
	return "it may ask for " + strings.Join(names, ", ")
}

// checkName bounds names of people and programs in certificates and tokens. There is no colon, so none begins with "system:".
func checkName(n string) error {
	ok := len(n) >= 1 && len(n) <= 64
	for _, r := range n {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._@-", r))
	}
	if !ok {
		return fmt.Errorf("%q must have 1 to 64 letters, digits, dots, dashes, underscores or @", n)
	}
	return nil
}
