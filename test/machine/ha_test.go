package machine

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// Bounds under software emulation: four machines with Kubernetes on two cores. Idle they would take more than there is, and what the rest of Kubernetes does when it is late is more work: so
// their clocks run slower than the host's (bhctl up --slow-clocks). Limits of waiting are slowed as they are; what is measured is told in the machines' time.
const (
	haMemory     = 3072             // MiB for each machine; a control plane with Kubernetes runs in it
	haUp         = 20 * time.Minute // of the machines
	haSettle     = 5 * time.Minute  // of the machines, until a node that was killed is well again
	haRoll       = 40 * time.Minute // of the machines: a rolling restart of all four
	movedBudget  = 10 * time.Second // of a virtual address, as docs/kubeletd.md says
	movedSlack   = 10 * time.Second // of the same, for emulated machines that look at each other late
	virtualIP    = "10.5.0.100"
	servicePort  = 30080 // see testdata/ha.yaml
	virtualPort  = 30443
	haLeastReady = 20 // requests that must have been answered before something is done to the cluster
)

// haSlow is how many times slower: BULKHEAD_HA_SLOW, or 3, which is enough for two cores that build Kubernetes in ten minutes.
var haSlow = func() int {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("BULKHEAD_HA_SLOW"), "3"))
	if err != nil || n < 2 || n > 10 {
		panic(fmt.Sprintf("BULKHEAD_HA_SLOW=%q: want a whole number from 2 to 10", os.Getenv("BULKHEAD_HA_SLOW")))
	}
	return n
}()

// slowly is the host's time in which d passes for the machines.
func slowly(d time.Duration) time.Duration { return time.Duration(haSlow) * d }

// TestHA is a cluster of three control planes and a worker with Kubernetes: all restart in turn while clients ask a Service, and the power of whole machines is cut.
//
// BULKHEAD_HA says which parts run: "all", or names of parts with commas between them (roll, leader, virtual). "make test-ha" runs it: three quarters of an hour under emulation.
func TestHA(t *testing.T) {
	want := os.Getenv("BULKHEAD_HA")
	if want == "" {
		t.Skip("takes three quarters of an hour: make test-ha")
	}
	h := &ha{}
	parts := []haPart{{"roll", h.rolls}, {"leader", h.leaderDies}, {"virtual", h.holderDies}}
	chosen := strings.Split(want, ",")
	for _, c := range chosen {
		if c != "all" && !slices.ContainsFunc(parts, func(p haPart) bool { return p.name == c }) {
			t.Fatalf("BULKHEAD_HA=%q: there is no part %q; allowed are all, roll, leader and virtual, with commas between them", want, c)
		}
	}
	h.n = newNode(t)
	h.c = &cluster{n: h.n, image: filepath.Join(h.n.root, "out/image"), nodes: []string{"test-1", "test-2", "test-3", "test-w1"}}
	h.up(t)
	for _, part := range parts {
		if !slices.Contains(chosen, "all") && !slices.Contains(chosen, part.name) {
			t.Logf("» part %s was not asked for", part.name)
			continue
		}
		if !t.Run(part.name, part.run) {
			t.FailNow()
		}
	}
}

type haPart struct {
	name string
	run  func(*testing.T)
}

// ha is the cluster and who uses it.
type ha struct {
	n     *node
	c     *cluster
	roots *x509.CertPool // of Kubernetes
	admin tls.Certificate
}

// up makes the cluster, gives it a virtual address, and deploys the Service.
func (h *ha) up(t *testing.T) {
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(h.n.dir, "machines"))
	t.Cleanup(func() {
		if t.Failed() {
			h.n.keepKube(t, h.c.nodes)
		}
	})
	start := time.Now()
	if out, err := h.n.try(t.Context(), slowly(haUp), "bhctl", "up", "--name", h.n.name, "--controlplanes", "3", "--workers", "1", "--image", h.c.image, "--memory", fmt.Sprint(haMemory), "--cpus", "1", "--slow-clocks", fmt.Sprint(haSlow), // eight emulated processors on two are slower than four
		"--forward", fmt.Sprintf("0:%d", servicePort), "--forward", fmt.Sprintf("0:%d", virtualPort)); err != nil {
		t.Fatalf("bhctl up: %v\n%s", err, out)
	}
	t.Logf("» four nodes with Kubernetes are ready after %s", time.Since(start).Round(time.Second))
	h.addVirtual(t)
	if _, err := h.n.try(t.Context(), slowly(100*time.Second), "bhctl", "kubeconfig", "--file", h.n.kubeconfig); err != nil {
		t.Fatal(err)
	}
	h.credentials(t)
	eventually(t, slowly(100*time.Second), "the Service is made", func() error {
		_, err := h.n.try(t.Context(), slowly(40*time.Second), "kubectl", "apply", "-f", filepath.Join(h.n.root, "test/machine/testdata/ha.yaml"))
		return err
	})
	h.shopReady(t)
	for _, name := range h.c.nodes {
		eventually(t, slowly(100*time.Second), "the Service answers at "+name, func() error {
			_, err := ask(t.Context(), &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, h.shop(t, name))
			return err
		})
	}
	eventually(t, slowly(100*time.Second), "an API server answers at the virtual address", func() error {
		_, err := h.atVirtual(t)(t.Context(), "")
		return err
	})
}

// addVirtual puts the address into each control plane's document.
func (h *ha) addVirtual(t *testing.T) {
	for _, name := range h.c.nodes[:3] {
		out, err := h.n.try(t.Context(), slowly(40*time.Second), "bhctl", "-n", name, "get", "config")
		if err != nil {
			t.Fatal(err)
		}
		const kind = "kind: Cluster\n"
		if strings.Count(out, kind) != 1 {
			t.Fatalf("%s: no Cluster in its document:\n%s", name, out)
		}
		file := filepath.Join(h.n.dir, name+".yaml")
		if err := os.WriteFile(file, []byte(strings.Replace(out, kind, kind+"virtualIPs: ["+virtualIP+"]\n", 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := h.n.try(t.Context(), slowly(100*time.Second), "bhctl", "-n", name, "apply", "-f", file); err != nil {
			t.Fatalf("apply to %s: %v\n%s", name, err, out)
		}
	}
}

// credentials are those in the kubeconfig.
func (h *ha) credentials(t *testing.T) {
	text, err := os.ReadFile(h.n.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Clusters []struct {
			Cluster struct {
				CA string `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Certificate string `json:"client-certificate-data"`
				Key         string `json:"client-key-data"`
			}
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil || len(file.Clusters) != 1 || len(file.Users) != 1 {
		t.Fatalf("kubeconfig: %v; want one cluster and one user", err)
	}
	plain := func(text string) []byte {
		data, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	h.roots = x509.NewCertPool()
	h.roots.AppendCertsFromPEM(plain(file.Clusters[0].Cluster.CA))
	if h.admin, err = tls.X509KeyPair(plain(file.Users[0].User.Certificate), plain(file.Users[0].User.Key)); err != nil {
		t.Fatal(err)
	}
}

func (h *ha) shop(t *testing.T, name string) string {
	return fmt.Sprintf("http://127.0.0.1:%d/", h.c.machine(t, name).Port(servicePort))
}

// shopReady waits until the Deployment is whole.
func (h *ha) shopReady(t *testing.T) {
	t.Helper()
	eventually(t, slowly(haSettle), "three pods of the Service are ready", func() error {
		out, err := h.n.try(t.Context(), slowly(20*time.Second), "kubectl", "get", "deployment", "shop", "-o", "jsonpath={.status.readyReplicas}")
		if err == nil && strings.TrimSpace(out) != "3" {
			err = fmt.Errorf("%q are ready", out)
		}
		return err
	})
}

// kube makes calls to one API server of the host's forwards. serverName is what its certificate must have.
func (h *ha) kube(port int, serverName string) *http.Client {
	dial := net.Dialer{}
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dial.DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", port))
		},
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: h.roots, Certificates: []tls.Certificate{h.admin}, ServerName: serverName}, ForceAttemptHTTP2: true,
	}}
}

// call makes one, and returns the certificate of who answered.
func call(ctx context.Context, c *http.Client, method, path, body string) (*x509.Certificate, error) {
	req, err := http.NewRequestWithContext(ctx, method, "https://kubernetes"+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %.200q", method, path, resp.Status, data)
	}
	return resp.TLS.PeerCertificates[0], err
}

// atVirtual asks whoever has the virtual address whether it is ready, over a connection of its own, and says who that is. The way is the one of a machine on the nodes' network: the
// worker connects to the address, for the Service "virtual".
func (h *ha) atVirtual(t *testing.T) func(context.Context, string) (string, error) {
	port := h.c.machine(t, "test-w1").Port(virtualPort)
	return func(ctx context.Context, _ string) (string, error) {
		c := h.kube(port, virtualIP)
		defer c.CloseIdleConnections()
		cert, err := call(ctx, c, http.MethodGet, "/readyz", "")
		if err != nil {
			return "", err
		}
		for _, name := range h.c.nodes[:3] {
			if slices.Contains(cert.DNSNames, name) { // each API server's certificate has its own host's name
				return name, nil
			}
		}
		return "", fmt.Errorf("the certificate is none of our nodes': %v", cert.DNSNames)
	}
}

// kubeWrites are writes by each control plane's API server, over a connection that is there.
func (h *ha) kubeWrites(t *testing.T) *pulse {
	doors := map[string]*http.Client{}
	for _, name := range h.c.nodes[:3] {
		doors[name] = h.kube(h.c.machine(t, name).Port(6443), "127.0.0.1")
		t.Cleanup(doors[name].CloseIdleConnections)
	}
	return &pulse{Every: slowly(500 * time.Millisecond), Limit: slowly(15 * time.Second), Slow: haSlow, Try: func(ctx context.Context, door string) (string, error) {
		_, err := call(ctx, doors[door], http.MethodPatch, "/api/v1/namespaces/default/configmaps/written", fmt.Sprintf(`{"data":{"count":"%d"}}`, time.Now().UnixNano()))
		return door, err
	}}
}

// visited runs f while clients ask the Service, and returns the requests that failed beyond the policy.
func (h *ha) visited(t *testing.T, f func()) []string {
	v := &visitors{}
	for _, name := range h.c.nodes {
		v.doors = append(v.doors, h.shop(t, name))
	}
	ctx, stop := context.WithCancel(t.Context())
	var g sync.WaitGroup
	g.Go(func() { v.run(ctx) })
	defer g.Wait()
	defer stop()
	eventually(t, slowly(100*time.Second), "requests are answered", func() error {
		if n := v.answered(); n < haLeastReady {
			return fmt.Errorf("%d so far", n)
		}
		return nil
	})
	f()
	stop()
	g.Wait()
	return v.report(t)
}
