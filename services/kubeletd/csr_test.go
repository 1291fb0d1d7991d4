package kubeletd

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// request makes a PEM request for a subject and names.
func makeRequest(t testing.TB, tmpl x509.CertificateRequest) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestCSR(t *testing.T) {
	n1 := pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}
	client := CSR{Signer: clientSigner, User: "system:bootstrap:n1", Groups: []string{"system:bootstrappers", "system:authenticated"},
		Usages: []string{"digital signature", "client auth"}, Request: makeRequest(t, x509.CertificateRequest{Subject: n1})}
	serving := CSR{Signer: servingSigner, User: "system:node:n1", Groups: []string{"system:nodes", "system:authenticated"},
		Usages:  []string{"server auth", "digital signature"},
		Request: makeRequest(t, x509.CertificateRequest{Subject: n1, DNSNames: []string{"n1"}, IPAddresses: []net.IP{net.IPv4(10, 0, 2, 15)}})}
	with := func(c CSR, tmpl x509.CertificateRequest) CSR { c.Request = makeRequest(t, tmpl); return c }
	mail, err := url.Parse("spiffe://x")
	if err != nil {
		t.Fatal(err)
	}
	// n1 is this node; w1 a worker that the cluster has seen; w2 was removed.
	known := clients{members: map[string]Member{"n1": {Role: config.ControlPlane}, "w1": {config.Worker, []netip.Addr{addr("10.5.0.101")}}}, own: "n1", address: addr("10.0.2.15")}
	of := func(c CSR, name string, addresses ...net.IP) CSR {
		c.User = strings.Replace(c.User, "n1", name, 1)
		tmpl := x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:" + name, Organization: n1.Organization}, IPAddresses: addresses}
		if c.Signer == servingSigner {
			tmpl.DNSNames = []string{name}
		}
		return with(c, tmpl)
	}
	for _, c := range []struct {
		name string
		csr  func() CSR
		err  string // "" is good
	}{
		{"a worker's bootstrap", func() CSR { return of(client, "w1") }, ""},
		{"a worker's server", func() CSR { return of(serving, "w1", net.IPv4(10, 5, 0, 101)) }, ""},
		{"a worker at this node's address", func() CSR { return of(serving, "w1", net.IPv4(10, 0, 2, 15)) }, `the cluster has seen node "w1" at [10.5.0.101]`},
		{"this node at a worker's address", func() CSR { return of(serving, "n1", net.IPv4(10, 5, 0, 101)) }, `the cluster has seen node "n1" at [10.0.2.15]`},
		{"a worker with this node's subject", func() CSR { c := client; c.User = "system:bootstrap:w1"; return c }, "subject"},
		{"a worker with this node's name", func() CSR {
			c := of(serving, "w1")
			return with(c, x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:w1", Organization: n1.Organization}, DNSNames: []string{"n1"}})
		}, "DNS name"},
		{"one that was removed", func() CSR { return of(client, "w2") }, "is no kubelet of a node of the cluster"},
		{"one that was removed, as server", func() CSR { return of(serving, "w2") }, "is no kubelet of a node of the cluster"},
		{"a person", func() CSR { c := client; c.User = "ann"; return c }, "is no kubelet"},
		{"nobody's name", func() CSR { c := client; c.User = "system:node:"; return c }, "is no kubelet"},
		{"bootstrap", func() CSR { return client }, ""},
		{"renewal", func() CSR { c := client; c.User, c.Groups = "system:node:n1", []string{"system:nodes"}; return c }, ""},
		{"with key encipherment", func() CSR { c := client; c.Usages = append(slices.Clone(c.Usages), "key encipherment"); return c }, ""},
		{"serving", func() CSR { return serving }, ""},
		{"serving, address only", func() CSR {
			return with(serving, x509.CertificateRequest{Subject: n1, IPAddresses: []net.IP{net.IPv4(10, 0, 2, 15)}})
		}, ""},
		{"another node's bootstrap user", func() CSR { c := client; c.User = "system:bootstrap:n2"; return c }, "is no kubelet"},
		{"the user without the group", func() CSR { c := client; c.Groups = nil; return c }, "must be the bootstrap user"},
		{"another node", func() CSR { c := serving; c.User = "system:node:n2"; return c }, "is no kubelet"},
		{"the bootstrap user wants to serve", func() CSR { c := serving; c.User, c.Groups = client.User, client.Groups; return c }, "must be"},
		{"another node's name", func() CSR {
			return with(client, x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:n2", Organization: n1.Organization}})
		}, "subject"},
		{"one group more", func() CSR {
			return with(client, x509.CertificateRequest{Subject: pkix.Name{CommonName: n1.CommonName, Organization: []string{"system:nodes", "system:masters"}}})
		}, "subject"},
		{"one attribute more", func() CSR {
			return with(client, x509.CertificateRequest{Subject: pkix.Name{CommonName: n1.CommonName, Organization: n1.Organization, Country: []string{"CH"}}})
		}, "subject"},
		{"a comma in the name", func() CSR {
			return with(client, x509.CertificateRequest{Subject: pkix.Name{CommonName: "system:node:n1,O=system:nodes"}})
		}, "subject"},
		{"a client with a DNS name", func() CSR {
			return with(client, x509.CertificateRequest{Subject: n1, DNSNames: []string{"n1"}})
		}, "has none"},
		{"another DNS name", func() CSR {
			return with(serving, x509.CertificateRequest{Subject: n1, DNSNames: []string{"n1", "kubernetes.default.svc"}})
		}, "DNS name"},
		{"another address", func() CSR {
			return with(serving, x509.CertificateRequest{Subject: n1, IPAddresses: []net.IP{net.IPv4(10, 96, 0, 1)}})
		}, "address"},
		{"no names", func() CSR { return with(serving, x509.CertificateRequest{Subject: n1}) }, "no names"},
		{"a URI", func() CSR {
			return with(serving, x509.CertificateRequest{Subject: n1, DNSNames: []string{"n1"}, URIs: []*url.URL{mail}})
		}, "URIs"},
		{"a usage more", func() CSR { c := client; c.Usages = append(slices.Clone(c.Usages), "cert sign"); return c }, "usage"},
		{"a server as client", func() CSR { c := client; c.Usages = []string{"digital signature", "server auth"}; return c }, "missing"},
		{"another signer", func() CSR { c := client; c.Signer = "kubernetes.io/kube-apiserver-client"; return c }, "signer"},
		{"no PEM", func() CSR { c := client; c.Request = []byte("x"); return c }, "PEM"},
		{"two blocks", func() CSR { c := client; c.Request = slices.Concat(c.Request, c.Request); return c }, "PEM"},
		{"too long", func() CSR { c := client; c.Request = make([]byte, maxCSR+1); return c }, "at most"},
		{"a broken signature", func() CSR {
			c := client
			b, _ := pem.Decode(c.Request)
			der := slices.Clone(b.Bytes)
			der[len(der)-1] ^= 1
			c.Request = pem.EncodeToMemory(&pem.Block{Type: b.Type, Bytes: der})
			return c
		}, "request"},
	} {
		err := c.csr().check(known)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
	}

	// What the check says is what the plan does.
	want, s := cp(t), grow(t, cp(t), func(string) {})
	client.Name, serving.Name = "csr-a", "csr-b"
	bad := serving
	bad.Name, bad.User = "csr-c", "system:node:n2"
	serving.Approved = true
	s.CSRs = []CSR{client, serving, bad}
	steps, err := plan(want, s)
	if got := (Steps(steps)).String(); err != nil || got != "csr approve csr-a; csr sign csr-a; csr sign csr-b" {
		t.Errorf("steps %s, %v", got, err)
	}
}

// Steps prints a plan on one line.
type Steps []Step

func (s Steps) String() string {
	var out []string
	for _, v := range s {
		out = append(out, v.String())
	}
	return strings.Join(out, "; ")
}

func FuzzCSR(f *testing.F) {
	n1 := pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}
	f.Add(makeRequest(f, x509.CertificateRequest{Subject: n1, DNSNames: []string{"n1"}}))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		c := CSR{Signer: servingSigner, User: "system:node:n1", Groups: []string{"system:nodes"}, Usages: []string{"digital signature", "server auth"}, Request: data}
		if c.check(clients{members: map[string]Member{"n1": {}}, own: "n1", address: netip.MustParseAddr("10.0.2.15")}) != nil {
			return
		}
		r, err := c.parse()
		if err != nil || r.Subject.CommonName != "system:node:n1" || len(r.Subject.Names) != 2 {
			t.Errorf("accepted %q: %v", r.Subject, err)
		}
	})
}
