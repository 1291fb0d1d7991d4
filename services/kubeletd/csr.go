package kubeletd

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// The signers that kubeletd answers for.
const (
	clientSigner  = "kubernetes.io/kube-apiserver-client-kubelet"
	servingSigner = "kubernetes.io/kubelet-serving"
)

// signers maps to trustd's profiles.
var signers = map[string]string{clientSigner: "kubelet-client", servingSigner: "kubelet-serving"}

// maxCSR is in bytes; a kubelet's is below one KiB.
const maxCSR = 16 << 10

// CSR is a CertificateSigningRequest.
type CSR struct {
	Name, Signer, User string
	Groups, Usages     []string
	Request            []byte // PEM, PKCS #10
	Approved           bool
}

// check returns nil only if the request is exactly what this node's kubelet may ask for. Approval by somebody else is not enough.
func (c CSR) check(node string, address netip.Addr) error {
	name := "system:node:" + node
	allowed := []string{"digital signature", "key encipherment"}
	switch c.Signer {
	case clientSigner:
		bootstrap := c.User == "system:bootstrap:"+node && slices.Contains(c.Groups, "system:bootstrappers")
		if !bootstrap && !c.fromNode(name) {
			return fmt.Errorf("user %q: must be the bootstrap user of node %q, or the node", c.User, node)
		}
		allowed = append(allowed, "client auth")
	case servingSigner:
		if !c.fromNode(name) {
			return fmt.Errorf("user %q: must be %q", c.User, name)
		}
		allowed = append(allowed, "server auth")
	default:
		return fmt.Errorf("signer %q: kubeletd answers for %q and %q", c.Signer, clientSigner, servingSigner)
	}
	for _, need := range []string{allowed[0], allowed[2]} {
		if !slices.Contains(c.Usages, need) {
			return fmt.Errorf("usages %q: %q is missing", c.Usages, need)
		}
	}
	for _, u := range c.Usages {
		if !slices.Contains(allowed, u) {
			return fmt.Errorf("usage %q: allowed are %q", u, allowed)
		}
	}
	r, err := c.parse()
	if err != nil {
		return err
	}
	if want := "CN=" + name + ",O=system:nodes"; r.Subject.String() != want { // as text: not one attribute more
		return fmt.Errorf("subject %q: must be %q", r.Subject, want)
	}
	return c.checkNames(r, node, address)
}

func (c CSR) fromNode(name string) bool {
	return c.User == name && slices.Contains(c.Groups, "system:nodes")
}

func (c CSR) checkNames(r *x509.CertificateRequest, node string, address netip.Addr) error {
	if len(r.EmailAddresses)+len(r.URIs) > 0 {
		return fmt.Errorf("mail addresses %q, URIs %v: none are allowed", r.EmailAddresses, r.URIs)
	}
	if c.Signer == clientSigner {
		if len(r.DNSNames)+len(r.IPAddresses) > 0 {
			return fmt.Errorf("names %q %v: a client's certificate has none", r.DNSNames, r.IPAddresses)
		}
		return nil
	}
	for _, n := range r.DNSNames {
		if n != node {
			return fmt.Errorf("DNS name %q: allowed is %q", n, node)
		}
	}
	for _, ip := range r.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); !ok || a.Unmap() != address {
			return fmt.Errorf("address %s: allowed is %s", ip, address)
		}
	}
	if len(r.DNSNames)+len(r.IPAddresses) == 0 {
		return fmt.Errorf("no names: a server's certificate needs one")
	}
	return nil
}

// parse reads the request and verifies that who made it has the key.
func (c CSR) parse() (*x509.CertificateRequest, error) {
	if len(c.Request) > maxCSR {
		return nil, fmt.Errorf("request: %d bytes; at most %d", len(c.Request), maxCSR)
	}
	b, rest := pem.Decode(c.Request)
	if b == nil || b.Type != "CERTIFICATE REQUEST" || strings.TrimSpace(string(rest)) != "" {
		return nil, fmt.Errorf("request: not exactly one PEM block of type CERTIFICATE REQUEST")
	}
	r, err := x509.ParseCertificateRequest(b.Bytes)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	return r, nil
}
