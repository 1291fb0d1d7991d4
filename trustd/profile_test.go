package trustd

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

var node = &spec{
	generation: 3, hostname: "n1", role: config.ControlPlane, names: []string{"cluster.example", "192.0.2.9", "api.example"},
	domain: "cluster.local", service: netip.MustParsePrefix("10.96.0.0/16"),
}

func ips(l leaf) []string {
	var out []string
	for _, ip := range l.ips {
		out = append(out, ip.String())
	}
	return out
}

func TestDecide(t *testing.T) {
	kubelet := pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}
	many := make([]net.IP, maxAddresses+1)
	for i := range many {
		many[i] = net.IPv4(10, 0, 0, byte(i+1))
	}
	for _, c := range []struct {
		name    string
		profile string
		who     uid.ID
		req     x509.CertificateRequest
		life    time.Duration
		spec    *spec
		subject string // of what is signed
		names   string // DNS names, then addresses
		want    time.Duration
		err     string // part of the text
		kind    errs.Kind
	}{
		{name: "apid", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 2, 15)}},
			subject: "CN=apid", names: "bulkhead n1 localhost cluster.example api.example 127.0.0.1 ::1 192.0.2.9 10.0.2.15", want: day},
		{name: "apid before there is a document", profile: "apid-server", who: uid.Apid, spec: &spec{}, subject: "CN=apid", names: "bulkhead localhost 127.0.0.1 ::1", want: day},
		{name: "subject of the request is ignored", profile: "etcd-server", who: uid.Etcdd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "root"}},
			subject: "CN=etcd-server", names: "n1 localhost 127.0.0.1 ::1", want: day},
		{name: "API server", profile: "kube-apiserver-server", who: uid.Kubeletd, subject: "CN=kube-apiserver",
			names: "kubernetes kubernetes.default kubernetes.default.svc kubernetes.default.svc.cluster.local n1 localhost cluster.example api.example 10.96.0.1 127.0.0.1 ::1 192.0.2.9", want: day},
		{name: "kubelet's client", profile: "kubelet-client", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: kubelet}, subject: "CN=system:node:n1,O=system:nodes", want: day},
		{name: "kubelet's server", profile: "kubelet-serving", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: kubelet, DNSNames: []string{"n1"}, IPAddresses: []net.IP{net.IPv4(10, 0, 2, 15)}},
			subject: "CN=system:node:n1,O=system:nodes", names: "n1 10.0.2.15", want: day},
		{name: "bootstrap", profile: "kubelet-bootstrap", who: uid.Kubeletd, subject: "CN=system:bootstrap:n1,O=system:bootstrappers", want: time.Hour},
		{name: "admin", profile: "kubernetes-admin", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "ann"}}, life: 48 * time.Hour,
			subject: "CN=ann,O=system:masters", want: 48 * time.Hour},

		{name: "no such profile", profile: "root", who: uid.Apid, err: "may ask for apid-node, apid-server", kind: errs.Denied},
		{name: "another's profile", profile: "etcd-root", who: uid.Kubeletd, err: `user "kubeletd" may not`, kind: errs.Denied},
		{name: "gateway as apid", profile: "apid-server", who: uid.Gateway, err: "may ask for gateway-server", kind: errs.Denied},
		{name: "foreign DNS name", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{DNSNames: []string{"bank.example"}}, err: `"bank.example"`, kind: errs.Denied},
		{name: "URI", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe"}}}, err: "URIs", kind: errs.Denied},
		{name: "mail", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{EmailAddresses: []string{"a@b"}}, err: "mail", kind: errs.Denied},
		{name: "many addresses", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{IPAddresses: many}, err: "33 addresses", kind: errs.Denied},
		{name: "multicast", profile: "apid-server", who: uid.Apid, req: x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(224, 0, 0, 1)}}, err: "224.0.0.1", kind: errs.Denied},
		{name: "client with address", profile: "kube-proxy", who: uid.Kubeletd, req: x509.CertificateRequest{IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}}, err: "1 addresses", kind: errs.Denied},
		{name: "another node's kubelet", profile: "kubelet-client", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:n2", Organization: []string{"system:nodes"}}}, err: "system:node:n1", kind: errs.Denied},
		{name: "kubelet as master", profile: "kubelet-client", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes", "system:masters"}}}, err: "system:masters", kind: errs.Denied},
		{name: "kubelet for another name", profile: "kubelet-serving", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: kubelet, DNSNames: []string{"kubernetes"}}, err: `"kubernetes"`, kind: errs.Denied},
		{name: "kubelet's client with a name", profile: "kubelet-client", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: kubelet, DNSNames: []string{"n1"}}, err: `"n1"`, kind: errs.Denied},
		{name: "kubelet of a node without a name", profile: "kubelet-client", who: uid.Kubeletd, spec: &spec{}, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:", Organization: []string{"system:nodes"}}}, err: "no name yet", kind: errs.Precondition},
		{name: "admin with a system name", profile: "kubernetes-admin", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:anonymous"}}, err: "system:anonymous", kind: errs.Invalid},
		{name: "admin without a name", profile: "kubernetes-admin", who: uid.Kubeletd, err: "1 to 64", kind: errs.Invalid},
		{name: "admin for ever", profile: "kubernetes-admin", who: uid.Kubeletd, req: x509.CertificateRequest{Subject: pkix.Name{CommonName: "ann"}}, life: 31 * day, err: "2592000", kind: errs.Invalid},
		{name: "daemon for long", profile: "apid-server", who: uid.Apid, life: 2 * day, err: "at most 0", kind: errs.Invalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.spec == nil {
				c.spec = node
			}
			l, err := decide(c.profile, c.who, &c.req, c.life, c.spec)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || errs.Of(err) != c.kind {
					t.Errorf("got %v (kind %d), want kind %d with %q", err, errs.Of(err), c.kind, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := l.subject.String(); got != c.subject {
				t.Errorf("subject %q, want %q", got, c.subject)
			}
			if got := strings.Join(slices.Concat(l.dns, ips(l)), " "); got != c.names {
				t.Errorf("names\n got %s\nwant %s", got, c.names)
			}
			if l.life != c.want {
				t.Errorf("life %s, want %s", l.life, c.want)
			}
		})
	}
}

// Every profile is complete: it can be signed, for somebody, and never by accident for both uses of different trust.
func TestProfilesAreComplete(t *testing.T) {
	for name, p := range profiles {
		if p.ca == nil || p.life == 0 || p.life > day || !p.server && !p.client || p.who.Name() == "" || p.who == uid.Root {
			t.Errorf("%s: incomplete: %+v", name, p)
		}
		if p.server != (p.names != nil) {
			t.Errorf("%s: a server has names, a client has none", name)
		}
		if p.cn == "" && p.maxLife == 0 {
			t.Errorf("%s: only a profile for people takes the name from the request", name)
		}
		if slices.Contains(p.org, "system:masters") && name != "kubernetes-admin" {
			t.Errorf("%s: is a cluster administrator", name)
		}
	}
}

func TestCheckName(t *testing.T) {
	for _, n := range []string{"admin", "a", "ann@example.org", "ci_bot-1", strings.Repeat("x", 64)} {
		if err := checkName(n); err != nil {
			t.Error(err)
		}
	}
	for _, n := range []string{"", "a b", "system:admin", "a\nb", "ü", "a,O=x", "a/b", strings.Repeat("x", 65)} {
		if checkName(n) == nil {
			t.Errorf("%q is allowed", n)
		}
	}
}

// The cluster's virtual addresses are in what servers show to clients, like its names.
func TestSpecNames(t *testing.T) {
	s, err := parseSpec(1, []byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.5.0.100:6443\n"+
		"names: [api.example]\nvirtualIPs: [10.5.0.100, \"fd00::100\"]\n---\napiVersion: bulkhead.dev/v1\nkind: Kubernetes\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, who := range map[string]uid.ID{"apid-server": uid.Apid, "gateway-server": uid.Gateway, "kube-apiserver-server": uid.Kubeletd} {
		l, err := decide(name, who, &x509.CertificateRequest{}, 0, s)
		if got := ips(l); err != nil || !slices.Contains(got, "10.5.0.100") || !slices.Contains(got, "fd00::100") || !slices.Contains(l.dns, "api.example") {
			t.Errorf("%s: %v %v, %v", name, l.dns, got, err)
		}
	}
}
