package kubeletd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
)

// While authorities are replaced (docs/trustd.md), trustd goes on only when this node's part of Kubernetes acts by those of the present stage: programs read some of them when they start, the
// kubelet alone renews its certificates, and pods learn them from a ConfigMap.

const (
	// turnKey says in etcd which control plane starts its part of Kubernetes anew: of all one at a time.
	turnKey = "/bulkhead/kubernetes/turn"
	// turnTTL is after how many seconds the next one may, if this one never comes back.
	turnTTL = 180
	// helloTime is for a TLS handshake on loopback.
	helloTime = 5 * time.Second
	// rootsName is the ConfigMap in every namespace with what pods trust; kube-controller-manager keeps it.
	rootsName = "kube-root-ca.crt"
	// extensionsName is the ConfigMap with which API servers tell extensions of the API whom to believe.
	extensionsName = "extension-apiserver-authentication"
	extensionsPath = "/api/v1/namespaces/kube-system/configmaps/" + extensionsName
	// waitRoots and waitKubelet are what a plan waits for.
	waitRoots   = "ConfigMaps " + rootsName
	waitKubelet = "kubelet's certificates"
	waitTurn    = "turn"
)

// trustOf reads what the node trusts for Kubernetes.
func trustOf(roots *leaf.Roots) trust {
	s := roots.State
	t := trust{Bootstrapped: s.GetBootstrapped(), Kubernetes: leaf.Bundle(s.GetKubernetesCa()), Etcd: leaf.Bundle(s.GetEtcdCa()), FrontProxy: leaf.Bundle(s.GetFrontProxyCa())}
	if block, rest := pem.Decode([]byte(s.GetKubernetesCa())); block != nil {
		t.Signer = string(pem.EncodeToMemory(block))
		t.Moving = len(strings.TrimSpace(string(rest))) > 0
	}
	return t
}

// mark is what folders are called after the authority that signs: "" for the cluster's first one, so that nothing changes for who never replaces it.
func (t trust) mark() string {
	c := t.signer()
	if c == nil {
		return ""
	}
	if n, err := strconv.Atoi(c.Subject.SerialNumber); err != nil || n < 2 { // its generation
		return ""
	}
	return "-" + digest(c.Raw)
}

// signer is nil if there is none.
func (t trust) signer() *x509.Certificate {
	block, _ := pem.Decode([]byte(t.Signer))
	if block == nil {
		return nil
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return c
}

// acts reports whether this node's part of Kubernetes acts by have.Trust. It is pure.
func acts(want spec, have State) bool {
	if have.Absent || want.Role == "" {
		return true
	}
	files, err := render(want, have)
	if err != nil {
		return false
	}
	p := planner{want: want, have: have, files: files}
	for _, f := range files {
		ours := f.Profile != "" || strings.HasPrefix(f.Path, folder+"/pki/")
		if d := f.digest(have.Pairs); ours && (d == "" || seal(f, d) != have.Files[f.Path]) {
			return false
		}
	}
	return len(p.restarts()) == 0 && !have.Turn && len(p.behind()) == 0
}

// restarts are the units that run with other inputs than those of now.
func (p *planner) restarts() []string {
	var out []string
	for _, r := range rules {
		u := p.have.Units[r.unit]
		if r.once || u.State == "" || u.State == "down" || p.want.Role == config.Worker && !r.worker {
			continue
		}
		if inputs, complete := p.inputs(r.unit); complete && p.have.Stamps[r.unit] != inputs {
			out = append(out, r.unit)
		}
	}
	return out
}

// behind is what does not act by the authorities of now, though it is nobody's step.
func (p *planner) behind() []string {
	var out []string
	if !p.have.Trust.Moving || p.have.Units["kubelet"].State != "up" && p.have.Units["kube-apiserver"].State != "up" {
		return nil
	}
	if p.want.Role == config.ControlPlane && !p.have.Published {
		out = append(out, waitRoots)
	}
	if p.have.Units["kubelet"].State == "up" && !p.have.KubeletSigned {
		out = append(out, waitKubelet)
	}
	return out
}

// mayRestart plans whose turn it is, and says whether units may be started anew: of several control planes one at a time, if its API server is among them.
func (p *planner) mayRestart() bool {
	due := p.restarts()
	if p.have.Turn {
		switch {
		case len(due) > 0:
		case p.well():
			p.do("turn give", "kube-apiserver")
		default: // what breaks one must not break the next
			p.do("turn keep", "kube-apiserver")
		}
		return true
	}
	if p.want.Role != config.ControlPlane || len(controlPlanes(p.have.Members)) < 2 || !slices.Contains(due, "kube-apiserver") {
		return true
	}
	p.do("turn take", "kube-apiserver")
	p.wait(waitTurn)
	return false
}

// well reports whether this node's API server runs and has answered well since it was started; of the other programs there is one of each that leads, and another is ready to.
func (p *planner) well() bool {
	h, asked := p.have.Health["kube-apiserver"]
	return asked && h == "" && p.have.Units["kube-apiserver"].State == "up"
}

// takeTurn takes the turn if nobody has it, or keeps it for longer.
func (k *system) takeTurn(ctx context.Context, node string) error {
	k.mu.Lock()
	k.restless = true // there is another round to come, whatever the answer
	k.mu.Unlock()
	if k.cfg.Store == nil {
		k.setTurn(true, 0)
		return nil
	}
	r, err := k.cfg.Store.Read(ctx, &storev1.ReadRequest{Prefix: turnKey})
	if err != nil {
		return fmt.Errorf("read whose turn it is: %w", err)
	}
	var revision uint64
	for _, e := range r.GetEntries() {
		if e.GetKey() != turnKey {
			continue
		}
		if revision = e.GetRevision(); string(e.GetValue()) != node {
			return errs.New(errs.Unavailable, "node %.64q starts its part of Kubernetes anew; this one is next", e.GetValue())
		}
	}
	w, err := k.cfg.Store.Write(ctx, &storev1.WriteRequest{Conditions: []*storev1.Condition{{Key: turnKey, Revision: revision}},
		Changes: []*storev1.Change{{Key: turnKey, Value: []byte(node), TtlSeconds: turnTTL}}})
	if err != nil {
		return fmt.Errorf("take the turn: %w", err)
	}
	k.setTurn(true, w.GetRevision())
	return nil
}

// giveTurn lets the next one. One that ran out is another's by now, or nobody's.
func (k *system) giveTurn(ctx context.Context) error {
	k.mu.Lock()
	revision := k.turnRevision
	k.mu.Unlock()
	if k.cfg.Store != nil {
		_, err := k.cfg.Store.Write(ctx, &storev1.WriteRequest{Conditions: []*storev1.Condition{{Key: turnKey, Revision: revision}}, Changes: []*storev1.Change{{Key: turnKey, Delete: true}}})
		if err != nil && !errs.Is(err, errs.Conflict) {
			return fmt.Errorf("give the turn: %w", err)
		}
	}
	k.setTurn(false, 0)
	return nil
}

func (k *system) setTurn(have bool, revision uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.turn, k.turnRevision = have, revision
}

// anew notes that a unit is being started: what is known of its health was its predecessor's.
func (k *system) anew(unit string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.health, unit)
	k.begun[unit] = time.Now()
	k.orders.Set(k.begun[unit])
}

// settle notes whether this node acts by the authorities that were read, and tells trustd if that is news.
func (k *system) settle(want spec, s State, roots *leaf.Roots) {
	now := ""
	if acts(want, s) {
		now = "by " + roots.State.GetAuthorities()
	}
	k.mu.Lock()
	news := k.actsBy != now
	k.actsBy, k.last = now, s
	k.restless = s.Leftover || now == "" && (k.restless || s.Trust.Moving)
	k.mu.Unlock()
	if news {
		k.trust.Tell()
	}
}

// follows is what trustd is told; see leaf.Trust.Acts.
func (k *system) follows(roots *leaf.Roots) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.actsBy == "by "+roots.State.GetAuthorities()
}

// readKubelet looks, while the authority is replaced, whether the kubelet shows a certificate of the one that signs. It gets that one last, with the other one.
func (k *system) readKubelet(ctx context.Context, s *State) {
	ca := s.Trust.signer()
	if !s.Trust.Moving || ca == nil || s.Units["kubelet"].State != "up" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	// Nothing is sent and nothing believed but who signed.
	d := tls.Dialer{NetDialer: &net.Dialer{}, Config: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: true}}
	conn, err := d.DialContext(ctx, "tcp", k.cfg.Kubelet)
	if err != nil {
		return // it has none yet
	}
	defer conn.Close()
	if c, ok := conn.(*tls.Conn); ok {
		shown := c.ConnectionState().PeerCertificates
		s.KubeletSigned = len(shown) > 0 && shown[0].CheckSignatureFrom(ca) == nil
	}
}

// published reports whether pods of all namespaces are told to trust the authorities of a bundle, and no others.
func (c *cluster) published(ctx context.Context, bundle string) (bool, error) {
	q := url.Values{"fieldSelector": {"metadata.name=" + rootsName}, "limit": {"500"}}
	seen := 0
	for {
		var list struct {
			Metadata struct{ Continue string }
			Items    []struct{ Data map[string]string }
		}
		if err := c.do(ctx, request{method: http.MethodGet, path: "/api/v1/configmaps", query: q}, &list); err != nil {
			return false, err
		}
		for _, m := range list.Items {
			if strings.TrimSpace(m.Data["ca.crt"]) != strings.TrimSpace(bundle) {
				return false, nil
			}
			seen++
		}
		if list.Metadata.Continue == "" {
			return seen > 0, nil
		}
		q.Set("continue", list.Metadata.Continue)
	}
}

// leftover reports whether extensions of the API are told authorities that count no more, and the ConfigMap's uid: API servers only ever add to it.
func (c *cluster) leftover(ctx context.Context, t trust) (found bool, uid string, err error) {
	var o struct {
		Metadata struct{ UID string }
		Data     map[string]string
	}
	err = c.do(ctx, request{method: http.MethodGet, path: extensionsPath}, &o)
	if errs.Is(err, errs.NotFound) || errs.Is(err, errs.Denied) { // denied: an older image's add-on is still there
		return false, "", nil
	} else if err != nil {
		return false, "", err
	}
	for _, told := range []struct{ key, counts string }{{"client-ca-file", t.Kubernetes}, {"requestheader-client-ca-file", t.FrontProxy}} {
		for rest := []byte(o.Data[told.key]); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			found = found || !strings.Contains(told.counts, string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})))
		}
	}
	return found, o.Metadata.UID, nil
}

// tellExtensions deletes the ConfigMap: API servers make it anew at once, with what counts. Extensions go on with what they know until then.
func (c *cluster) tellExtensions(ctx context.Context, t trust) error {
	found, uid, err := c.leftover(ctx, t)
	if err != nil || !found {
		return err
	}
	return c.delete(ctx, extensionsPath, uid)
}
