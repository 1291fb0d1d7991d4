package kubeletd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"sort"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

// Bounds of talking to the API server.
const (
	maxAnswer = 8 << 20 // bytes
	maxCSRs   = 500     // looked at in one round, for each signer
	apiTime   = 20 * time.Second
	watchTime = 5 * time.Minute
)

// cluster is a client of the API server: a few verbs in JSON over HTTPS. client-go would bring some 300 packages for them.
type cluster struct {
	server string
	http   *http.Client
}

func newCluster(server string, roots *x509.CertPool, cert *tls.Certificate) *cluster {
	return &cluster{server: server, http: &http.Client{Transport: &http.Transport{
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, Certificates: []tls.Certificate{*cert}},
		ForceAttemptHTTP2:   true,
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: apiTime,
		IdleConnTimeout:     2 * watchTime,
	}}}
}

// close lets idle connections go; a watch ends by itself.
func (c *cluster) close() { c.http.CloseIdleConnections() }

// request describes one call; body may be nil.
type request struct {
	method, path string
	query        url.Values
	content      string // type of body; "" is JSON
	body         []byte
}

// do makes a call and decodes the answer into out, unless that is nil. Errors have a kind; they carry the server's message.
func (c *cluster) do(ctx context.Context, r request, out any) error {
	ctx, cancel := context.WithTimeout(ctx, apiTime)
	defer cancel()
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return errs.New(errs.Unavailable, "%s %s: %w", r.method, r.path, err)
	}
	if len(data) > maxAnswer {
		return errs.New(errs.Exhausted, "%s %s: more than %d bytes", r.method, r.path, maxAnswer)
	}
	if out == nil {
		return nil
	}
	if text, ok := out.(*string); ok {
		*text = string(data)
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber() // objects go back as they came
	if err := d.Decode(out); err != nil {
		return fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	return nil
}

func (c *cluster) send(ctx context.Context, r request) (*http.Response, error) {
	u := c.server + r.path
	if len(r.query) > 0 {
		u += "?" + r.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u, bytes.NewReader(r.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "bulkhead-kubeletd")
	req.Header.Set("Accept", "application/json")
	if r.content == "" {
		r.content = "application/json"
	}
	if r.body != nil {
		req.Header.Set("Content-Type", r.content)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%s %s: %w", r.method, r.path, err)
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, refused(r, resp)
	}
	return resp, nil
}

// refused turns a bad answer into an error.
func refused(r request, resp *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	var st struct{ Message string }
	if json.Unmarshal(data, &st) != nil || st.Message == "" {
		st.Message = resp.Status + balance.Unready(data)
	}
	kind := errs.Internal
	switch resp.StatusCode {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		kind = errs.Invalid
	case http.StatusUnauthorized, http.StatusForbidden:
		kind = errs.Denied
	case http.StatusNotFound:
		kind = errs.NotFound
	case http.StatusConflict:
		kind = errs.Conflict
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		kind = errs.Unavailable
	}
	return errs.New(kind, "%s %s: %s", r.method, r.path, st.Message)
}

// watch calls wake for each piece of news under path, until the server ends it after a few minutes. The news are not read: the loop
// reads all anew.
func (c *cluster) watch(ctx context.Context, path string, query url.Values, wake func()) error {
	ctx, cancel := context.WithTimeout(ctx, watchTime+apiTime)
	defer cancel()
	q := url.Values{"watch": {"1"}, "timeoutSeconds": {fmt.Sprint(int(watchTime / time.Second))}}
	for k, v := range query {
		q[k] = v
	}
	resp, err := c.send(ctx, request{method: http.MethodGet, path: path, query: q})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			wake()
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return errs.New(errs.Unavailable, "watch %s: %w", path, err)
		}
	}
}

const csrPath = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

const nodesPath = "/api/v1/nodes"

func nodePath(name string) string { return nodesPath + "/" + url.PathEscape(name) }

// csrs returns the requests to kubeletd's signers that have no certificate and are neither denied nor failed, sorted by name.
func (c *cluster) csrs(ctx context.Context) ([]CSR, error) {
	var out []CSR
	for _, signer := range []string{clientSigner, servingSigner} {
		var list struct{ Items []csrObject }
		q := url.Values{"fieldSelector": {"spec.signerName=" + signer}, "limit": {fmt.Sprint(maxCSRs)}}
		if err := c.do(ctx, request{method: http.MethodGet, path: csrPath, query: q}, &list); err != nil {
			return nil, err
		}
		for _, o := range list.Items {
			if r, open := o.open(); open {
				out = append(out, r)
			}
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out, nil
}

// csrObject is the part of certificates.k8s.io/v1 CertificateSigningRequest that is read.
type csrObject struct {
	Metadata struct{ Name string }
	Spec     struct {
		SignerName, Username string
		Groups, Usages       []string
		Request              []byte
	}
	Status struct {
		Certificate []byte
		Conditions  []struct{ Type, Status string }
	}
}

func (o csrObject) open() (CSR, bool) {
	r := CSR{Name: o.Metadata.Name, Signer: o.Spec.SignerName, User: o.Spec.Username, Groups: o.Spec.Groups, Usages: o.Spec.Usages, Request: o.Spec.Request}
	open := len(o.Status.Certificate) == 0
	for _, cond := range o.Status.Conditions {
		switch cond.Type {
		case "Approved":
			r.Approved = true
		case "Denied", "Failed":
			open = false
		}
	}
	return r, open
}

// updateCSR reads a request, checks it, changes it and writes one of its subresources. The check is on what was read here: names
// can be used again, and what the plan saw may be gone. All control planes do this: one that comes late finds it done, or hears of a conflict, and what
// the other one made stands.
func (c *cluster) updateCSR(ctx context.Context, name, sub string, change func(CSR, map[string]any) error) error {
	path := csrPath + "/" + url.PathEscape(name)
	var raw json.RawMessage
	if err := c.do(ctx, request{method: http.MethodGet, path: path}, &raw); errs.Is(err, errs.NotFound) {
		return nil // the one who asked has given up, or it was cleaned up
	} else if err != nil {
		return err
	}
	var o csrObject
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	r, open := o.open()
	if !open {
		return nil // done, or denied by a person
	}
	whole := map[string]any{}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(&whole); err != nil {
		return err
	}
	if err := change(r, whole); err != nil {
		return err
	}
	body, err := json.Marshal(whole)
	if err != nil {
		return err
	}
	err = c.do(ctx, request{method: http.MethodPut, path: path + "/" + sub, body: body}, nil)
	if errs.Is(err, errs.Conflict) || errs.Is(err, errs.NotFound) {
		return nil
	}
	return err
}

// node reads a node; nil if it is not registered.
func (c *cluster) node(ctx context.Context, name string) (*Node, error) {
	var o nodeObject
	err := c.do(ctx, request{method: http.MethodGet, path: nodePath(name)}, &o)
	if errs.Is(err, errs.NotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	n := &Node{Reason: "the kubelet has not reported yet"}
	if o.Spec.PodCIDR != "" {
		if n.PodCIDR, err = netip.ParsePrefix(o.Spec.PodCIDR); err != nil {
			return nil, fmt.Errorf("node %s: podCIDR: %w", name, err)
		}
	}
	_, cp := o.Metadata.Labels[controlPlaneKey]
	_, ours := o.Metadata.Labels[memberKey]
	n.Labelled = cp && ours
	for _, t := range o.Spec.Taints {
		n.Tainted = n.Tainted || t.Key == controlPlaneKey
	}
	for _, cond := range o.Status.Conditions {
		if cond.Type == "Ready" {
			if n.Ready, n.Reason = cond.Status == "True", ""; !n.Ready {
				n.Reason = cond.Reason + ": " + cond.Message
			}
		}
	}
	return n, nil
}

// patchNode changes the control plane's label or taint.
func (c *cluster) patchNode(ctx context.Context, name, op string) error {
	spec := map[string]any{}
	switch op {
	case "node label":
		spec["metadata"] = map[string]any{"labels": map[string]string{controlPlaneKey: "", memberKey: "true"}}
	case "node taint":
		spec["spec"] = map[string]any{"taints": []any{map[string]string{"key": controlPlaneKey, "effect": "NoSchedule"}}}
	case "node untaint": // the list's key is "key" (k8s.io/api/core/v1, patchMergeKey)
		spec["spec"] = map[string]any{"taints": []any{map[string]string{"$patch": "delete", "key": controlPlaneKey}}}
	}
	body, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return c.do(ctx, request{method: http.MethodPatch, path: nodePath(name), content: "application/strategic-merge-patch+json", body: body}, nil)
}

// resources are the kinds in the add-ons: where they live, and whether in a namespace.
var resources = map[string]struct {
	prefix, plural string
	namespaced     bool
}{
	"ServiceAccount":     {"/api/v1", "serviceaccounts", true},
	"ConfigMap":          {"/api/v1", "configmaps", true},
	"Service":            {"/api/v1", "services", true},
	"Deployment":         {"/apis/apps/v1", "deployments", true},
	"ClusterRole":        {"/apis/rbac.authorization.k8s.io/v1", "clusterroles", false},
	"ClusterRoleBinding": {"/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings", false},
}

// addonKey is the annotation that holds the digest of the add-on an object was applied with.
const addonKey = "bulkhead.dev/addon"

// objects returns an add-on's objects and their paths, with the annotation put in.
func (a Addon) objects() (paths []string, bodies [][]byte, err error) {
	d := yaml.NewDecoder(bytes.NewReader([]byte(a.Text)))
	for {
		o := map[string]any{}
		if err := d.Decode(&o); errors.Is(err, io.EOF) {
			return paths, bodies, nil
		} else if err != nil {
			return nil, nil, fmt.Errorf("add-on %s: %w", a.Name, err)
		}
		kind, _ := o["kind"].(string)
		meta, _ := o["metadata"].(map[string]any)
		name, _ := meta["name"].(string)
		r, known := resources[kind]
		if !known || name == "" {
			return nil, nil, fmt.Errorf("add-on %s: kind %q, name %q: not in the table of resources", a.Name, kind, name)
		}
		path := r.prefix
		if r.namespaced {
			ns, _ := meta["namespace"].(string)
			path += "/namespaces/" + url.PathEscape(ns)
		}
		meta["annotations"] = map[string]any{addonKey: digest([]byte(a.Text))}
		body, err := json.Marshal(o)
		if err != nil {
			return nil, nil, err
		}
		paths, bodies = append(paths, path+"/"+r.plural+"/"+url.PathEscape(name)), append(bodies, body)
	}
}

// apply brings an add-on's objects about by server-side apply, under our name as field manager.
func (c *cluster) apply(ctx context.Context, a Addon) error {
	paths, bodies, err := a.objects()
	if err != nil {
		return err
	}
	q := url.Values{"fieldManager": {"bulkhead"}, "force": {"true"}}
	for i, path := range paths {
		if err := c.do(ctx, request{method: http.MethodPatch, path: path, query: q, content: "application/apply-patch+yaml", body: bodies[i]}, nil); err != nil {
			return err
		}
	}
	return nil
}

// mixed is what applied returns if objects of one add-on were applied with different digests: somebody is at it, or was interrupted.
const mixed = "mixed"

// applied returns the digest with which all of an add-on's objects were applied; "" if one is missing.
func (c *cluster) applied(ctx context.Context, a Addon) (string, error) {
	paths, _, err := a.objects()
	if err != nil {
		return "", err
	}
	var seen []string
	for _, path := range paths {
		var o struct {
			Metadata struct{ Annotations map[string]string }
		}
		err := c.do(ctx, request{method: http.MethodGet, path: path}, &o)
		if errs.Is(err, errs.NotFound) || errs.Is(err, errs.Denied) { // denied: not even the rights are there
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if o.Metadata.Annotations[addonKey] == "" {
			return "", nil // somebody else's of that name
		}
		seen = append(seen, o.Metadata.Annotations[addonKey])
	}
	if seen = slices.Compact(seen); len(seen) != 1 {
		return mixed, nil
	}
	return seen[0], nil
}
