package kubeletd

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
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

// asker is the name of the node whose kubelet asks; "" if it is no kubelet.
func (c CSR) asker() string {
	for _, prefix := range []string{"system:bootstrap:", nodeUser} {
		if name, ok := strings.CutPrefix(c.User, prefix); ok {
			return name
		}
	}
	return ""
}

const nodeUser = "system:node:"

// clients is whose requests count: the members of the cluster. Of itself a node knows its address.
type clients struct {
	members map[string]Member
	own     string
	address netip.Addr
}

// addresses are those that a member's server may be certified for.
func (k clients) addresses(name string) []netip.Addr {
	out := k.members[name].Addresses
	if name == k.own && k.address.IsValid() {
		return append(slices.Clone(out), k.address)
	}
	return out
}

// check returns nil only if the request is exactly what the kubelet of a member of the cluster may ask for, for itself. Approval by somebody else is
// not enough.
func (c CSR) check(known clients) error {
	node := c.asker()
	if _, ok := known.members[node]; !ok {
		return fmt.Errorf("user %q: is no kubelet of a node of the cluster", c.User)
	}
	name := nodeUser + node
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
	return c.checkNames(r, node, known.addresses(node))
}

func (c CSR) fromNode(name string) bool {
	return c.User == name && slices.Contains(c.Groups, "system:nodes")
}

func (c CSR) checkNames(r *x509.CertificateRequest, node string, addresses []netip.Addr) error {
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
		if a, ok := netip.AddrFromSlice(ip); !ok || !slices.Contains(addresses, a.Unmap()) {
			return fmt.Errorf("address %s: the cluster has seen node %q at %s", ip, node, addresses)
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

// approve adds the condition that lets a request be signed.
func approve(known clients) func(CSR, map[string]any) error {
	return func(c CSR, whole map[string]any) error {
		if err := c.check(known); err != nil {
			return errs.New(errs.Denied, "%w", err)
		}
		status, _ := whole["status"].(map[string]any)
		if status == nil {
			status = map[string]any{}
			whole["status"] = status
		}
		conditions, _ := status["conditions"].([]any)
		if !c.Approved {
			status["conditions"] = append(conditions, map[string]any{"type": "Approved", "status": "True", "reason": "KubeletdApproved",
				"message": "the request is that of a node of the cluster for itself: requestor, subject, names and usages are as they must be"})
		}
		return nil
	}
}

// sign has trustd sign an approved request, which checks it once more against its own profile.
func (k *system) sign(ctx context.Context, known clients) func(CSR, map[string]any) error {
	return func(c CSR, whole map[string]any) error {
		if err := c.check(known); err != nil {
			return errs.New(errs.Denied, "%w", err)
		}
		if !c.Approved {
			return reconcile.ErrSkipped
		}
		r, err := c.parse()
		if err != nil {
			return err
		}
		resp, err := k.cfg.Signer.SignCertificate(ctx, &trustv1.SignCertificateRequest{Profile: signers[c.Signer], Csr: r.Raw})
		if err != nil {
			return err
		}
		status, _ := whole["status"].(map[string]any)
		if status == nil {
			return fmt.Errorf("status: it has conditions and yet is empty")
		}
		status["certificate"] = []byte(resp.GetCertificate())
		return nil
	}
}
