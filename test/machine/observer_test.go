package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// observerDocuments are those that "bhctl up" makes, and the way to the observer's port.
const observerDocuments = `apiVersion: bulkhead.dev/v1
kind: Machine
hostname: %[1]s
---
apiVersion: bulkhead.dev/v1
kind: Cluster
name: %[1]s
names: [localhost, 127.0.0.1]
---
apiVersion: bulkhead.dev/v1
kind: Network
firewall:
  allow: [{port: 50009}]
`

// upObserved is up with the image of "make observer".
func (n *node) upObserved(t *testing.T) string {
	t.Helper()
	file := filepath.Join(n.dir, "observed.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, observerDocuments, n.name), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := n.try(t.Context(), 15*time.Minute, "bhctl", "up", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
		"--kubernetes-port", fmt.Sprint(n.kubePort), "--forward", fmt.Sprintf("%d:30080", n.nodePort), "--forward", fmt.Sprintf("%d:50009", n.observerPort),
		"--image", filepath.Join(n.root, "out/observer/image"), "-f", file)
	if err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
	return out
}

// observe asks the node's observer (test/observer): what, with parameters "unit=x".
func (n *node) observe(ctx context.Context, method, what, body string, parameters ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	q := url.Values{}
	for _, p := range parameters {
		k, v, _ := strings.Cut(p, "=")
		q.Set(k, v)
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d/%s?%s", n.observerPort, what, q.Encode()), strings.NewReader(body))
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("observer: %s %s %q: %s", method, what, parameters, text)
	}
	return string(text), err
}

// act is observe for what must succeed.
func (n *node) act(t *testing.T, method, what, body string, parameters ...string) string {
	t.Helper()
	out, err := n.observe(t.Context(), method, what, body, parameters...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// observed is the node's process table, as the observer sees it.
func (n *node) observed(t *testing.T) map[int]process {
	t.Helper()
	var list []process
	if err := json.Unmarshal([]byte(n.act(t, "GET", "ps", "")), &list); err != nil {
		t.Fatal(err)
	}
	out := map[int]process{}
	for _, p := range list {
		out[p.PID] = p
	}
	return out
}
