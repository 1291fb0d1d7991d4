package machine

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// A step is a part of a node's life.
type step struct {
	name string
	run  func(*testing.T, *node)
}

// TestNode is one life of one node, in order: each part stands on the one before. The node runs the observer's image, which has one unit more than the real one: see docs/faults.md.
func TestNode(t *testing.T) {
	n := newNode(t)
	only := os.Getenv("BULKHEAD_VM_STEPS") // for work on one step: "up,workload,reboot"
	for _, s := range []step{
		{"up", testUp},
		{"up again changes nothing", testUpAgain},
		{"strangers are refused", testStrangers},
		{"bad input", testBadInput},
		{"rest", testREST},
		{"tools", testTools},
		{"workload", testWorkload},
		{"a privileged pod sees no daemon", testPrivilegedPod},
		{"secrets at rest", testSecretsAtRest},
		{"reboot", testReboot},
		{"faults", testFaults},
		{"flipped bit", testFlippedBit},
	} {
		if only != "" && !strings.Contains(","+only+",", ","+s.name+",") {
			continue
		}
		if !t.Run(s.name, func(t *testing.T) { s.run(t, n) }) && (s.name == "up" || s.name == "workload") {
			t.Fatalf("%s failed: what follows stands on it", s.name)
		}
	}
}

func testUp(t *testing.T, n *node) {
	start := time.Now()
	out := n.upObserved(t)
	t.Logf("» up after %s", time.Since(start).Round(time.Second))
	for _, want := range []string{"bhctl health", "kubectl"} {
		if !strings.Contains(out, want) {
			t.Errorf("the end of up does not name %q:\n%s", want, out)
		}
	}
	n.run(t, "bhctl", "health", "--wait=2m") // and so the kernel is closed for modules, before the workload needs any
	n.run(t, "bhctl", "kubeconfig", "--file", n.kubeconfig)
	if out := n.run(t, "kubectl", "get", "nodes", "--no-headers"); !strings.Contains(out, " Ready ") {
		t.Errorf("kubectl get nodes: %s", out)
	}
}

func testUpAgain(t *testing.T, n *node) {
	before := n.run(t, "bhctl", "get", "generations", "-o", "json")
	boot := n.services(t)["machined"].Pid
	start := time.Now()
	n.upObserved(t)
	t.Logf("» up again after %s", time.Since(start).Round(100*time.Millisecond))
	if after := n.run(t, "bhctl", "get", "generations", "-o", "json"); after != before {
		t.Errorf("generations changed: %s, were %s", after, before)
	}
	if now := n.services(t)["machined"].Pid; now != boot {
		t.Errorf("machined is process %d, was %d: the node was started again", now, boot)
	}
}

// services returns the node's units by name.
func (n *node) services(t *testing.T) map[string]*machinev1.Service {
	t.Helper()
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	l, err := machinev1.NewMachineClient(conn).ListServices(ctx, &machinev1.ListServicesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*machinev1.Service{}
	for _, s := range l.Services {
		out[s.Name] = s
	}
	return out
}

// credentials are those that bhctl stored.
func (n *node) credentials(t *testing.T) client.Credentials {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.dir, "config.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var cfg struct {
		Current  string
		Contexts map[string]struct{ CA, Certificate, Key string }
	}
	if err := yaml.Unmarshal(data, &cfg); err != nil {
		t.Fatal(err)
	}
	c := cfg.Contexts[cfg.Current]
	return client.Credentials{CA: []byte(c.CA), Certificate: []byte(c.Certificate), Key: []byte(c.Key)}
}

// mustFail runs bhctl and returns what it said.
func (n *node) mustFail(t *testing.T, args ...string) string {
	t.Helper()
	_, err := n.try(t.Context(), time.Minute, "bhctl", args...)
	if err == nil {
		t.Fatalf("bhctl %s succeeded", strings.Join(args, " "))
	}
	return err.Error()
}

func testStrangers(t *testing.T, n *node) {
	reader := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "reader"))
	backup := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "etcd-backup"))
	n.run(t, "bhctl", "--token", reader, "version")
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"garbage", []string{"--token", "garbage", "version"}, "does not know you"},
		{"tampered", []string{"--token", reader[:len(reader)-4] + "AAAA", "version"}, "does not know you"},
		{"reader restarts", []string{"--token", reader, "service", "restart", "apid"}, "operator"},
		{"reader mints", []string{"--token", reader, "token"}, "admin"},
		{"reader applies", []string{"--token", reader, "apply", "-f", filepath.Join(n.root, "test/machine/testdata/other.yaml")}, "admin"},
		{"backup reads", []string{"--token", backup, "services"}, "reader"},
		{"claimed already", []string{"claim", fmt.Sprintf("127.0.0.1:%d", n.apiPort), "--code", "0000000000", "--as", "thief"}, ""},
	} {
		if got := n.mustFail(t, c.args...); !strings.Contains(got, c.want) {
			t.Errorf("%s: said %q, want %q in it", c.name, got, c.want)
		}
	}
	n.run(t, "bhctl", "--token", backup, "etcd", "snapshot", filepath.Join(n.dir, "snapshot.db"))
	if st, err := os.Stat(filepath.Join(n.dir, "snapshot.db")); err != nil || st.Size() < 1<<16 {
		t.Errorf("snapshot: %v, %v", st, err)
	}
	// Without any credential: nothing about the node leaks, not even its version.
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), client.Credentials{CA: n.credentials(t).CA})
	if err == nil {
		defer conn.Close()
		_, err = machinev1.NewMachineClient(conn).GetVersion(t.Context(), &machinev1.GetVersionRequest{})
	}
	if err == nil {
		t.Error("a call without a credential was answered")
	}
}

func testBadInput(t *testing.T, n *node) {
	before := n.run(t, "bhctl", "get", "generations", "-o", "json")
	file := filepath.Join(n.dir, "bad.yaml")
	for _, c := range []struct{ doc, want string }{
		{"apiVersion: bulkhead.dev/v1\nkind: Machine\nhostnam: x\n", "hostname"},
		{"apiVersion: bulkhead.dev/v1\nkind: Network\ninterfaces:\n  - name: eth0\n    mtu: 12\n", "68"},
		{"apiVersion: bulkhead.dev/v2\nkind: Machine\n", "bulkhead.dev/v1"},
		{"apiVersion: bulkhead.dev/v1\nkind: Machin\n", "Machine"},
	} {
		if err := os.WriteFile(file, []byte(c.doc), 0o600); err != nil {
			t.Fatal(err)
		}
		got := n.mustFail(t, "apply", "-f", file)
		if !strings.Contains(got, c.want) || !strings.Contains(got, "bad.yaml:") {
			t.Errorf("%q: said %q; want the file with its line, and %q", c.doc, got, c.want)
		}
		// The node itself refuses it too: a client may be of another version.
		conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
		if err != nil {
			t.Fatal(err)
		}
		_, err = configv1.NewConfigClient(conn).Apply(t.Context(), &configv1.ApplyRequest{Documents: c.doc, Name: "n.yaml"})
		conn.Close()
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "n.yaml:") {
			t.Errorf("the node on %q: %v", c.doc, err)
		}
	}
	if after := n.run(t, "bhctl", "get", "generations", "-o", "json"); after != before {
		t.Errorf("refused documents made a generation: %s", after)
	}
}

// get asks the gateway, with a token of the given role; "" for none.
func (n *node) get(t *testing.T, path, token string) (int, string, error) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(n.credentials(t).CA)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("https://localhost:%d%s", n.gatewayPort, path), nil)
	if err != nil {
		return 0, "", err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := (&http.Client{Transport: tr, Timeout: 30 * time.Second}).Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

func testREST(t *testing.T, n *node) {
	token := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "operator", "--role", "etcd-backup"))
	code, body, err := n.get(t, "/openapi.json", "")
	if err != nil || code != 200 {
		t.Fatalf("/openapi.json: %d, %v", code, err)
	}
	var doc struct {
		Paths map[string]map[string]json.RawMessage
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil {
		t.Fatal(err)
	}
	read := 0
	for path, methods := range doc.Paths {
		if methods["get"] == nil || strings.HasSuffix(path, ":watch") {
			continue
		}
		real := strings.NewReplacer("{name}", "apid", "{boot}", "0", "{node}", n.name).Replace(path)
		switch {
		case strings.HasSuffix(path, "/auditanchors"):
			real += "?name=" + n.name
		case strings.HasSuffix(path, "/access/issuer"): // for who has no credentials yet; this node has no issuer
			for _, token := range []string{"", token} {
				if code, body, err := n.get(t, real, token); err != nil || code != 404 || !strings.Contains(body, "names no issuer") {
					t.Errorf("GET %s: %d, %v, %.200s", real, code, err, body)
				}
			}
			continue
		}
		if code, body, err := n.get(t, real, ""); err != nil || code != 401 || !strings.Contains(body, `"code":"UNAUTHENTICATED"`) {
			t.Errorf("GET %s without a token: %d, %v, %.200s", real, code, err, body)
		}
		if code, body, err := n.get(t, real, token); err != nil || code != 200 {
			t.Errorf("GET %s: %d, %v, %.300s", real, code, err, body)
		}
		read++
	}
	if read < 10 {
		t.Errorf("only %d paths were read", read)
	}
	code, body, err = n.get(t, "/metrics", token)
	if err != nil || code != 200 {
		t.Fatalf("/metrics: %d, %v", code, err)
	}
	for _, d := range []string{"machined", "apid", "gateway", "networkd", "storaged", "trustd", "etcdd", "kubeletd"} {
		if !strings.Contains(body, fmt.Sprintf("bulkhead_daemon_up{daemon=%q} 1", d)) {
			t.Errorf("/metrics has no figures of %s", d)
		}
	}
	if err := os.WriteFile(filepath.Join(n.dir, "metrics.txt"), []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
}

func testWorkload(t *testing.T, n *node) {
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/hello.yaml"))
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/inspect.yaml"))
	eventually(t, 4*time.Minute, "Deployment ready", func() error {
		_, err := n.try(t.Context(), 30*time.Second, "kubectl", "rollout", "status", "deployment/hello", "--timeout=20s")
		return err
	})
	eventually(t, 2*time.Minute, "pod answers on its NodePort", func() error { return n.ask(t.Context()) })
	ip := strings.TrimSpace(n.run(t, "kubectl", "get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}"))
	for _, url := range []string{"http://" + ip, "http://hello", "http://hello.default.svc.cluster.local"} {
		eventually(t, 2*time.Minute, "a pod reads "+url, func() error {
			_, err := n.try(t.Context(), time.Minute, "kubectl", "exec", "deployment/hello", "--", "/hello", "get", url)
			return err
		})
	}
	if out := n.run(t, "kubectl", "logs", "deployment/hello"); !strings.Contains(out, "GET /") {
		t.Errorf("kubectl logs has no request line:\n%s", out)
	}
	eventually(t, 2*time.Minute, "inspect runs", func() error {
		_, err := n.try(t.Context(), time.Minute, "kubectl", "exec", "-n", "kube-system", "inspect", "--", "/hello", "env")
		return err
	})
	eventually(t, 2*time.Minute, "a pod with users of its own runs", func() error {
		phase, err := n.try(t.Context(), time.Minute, "kubectl", "get", "pod", "own-users", "-o", "jsonpath={.status.phase}")
		if err == nil && phase != "Running" {
			err = fmt.Errorf("it is %s", phase)
		}
		return err
	})
	// Pod Security "baseline" holds where it should.
	if out, err := n.try(t.Context(), time.Minute, "kubectl", "run", "bad", "--image=bulkhead.dev/hello:1", "--privileged"); err == nil || !strings.Contains(err.Error(), "baseline") {
		t.Errorf("a privileged pod in default was not refused: %s %v", out, err)
	}
}

// ask reads the hello pod through its Service's NodePort, from outside the machine.
func (n *node) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("http://127.0.0.1:%d/", n.nodePort), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	return err
}

func testSecretsAtRest(t *testing.T, n *node) {
	file := filepath.Join(n.dir, "etcd.db")
	n.run(t, "bhctl", "etcd", "snapshot", file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, []byte("/registry/secrets/default/hidden")) {
		t.Error("the snapshot does not hold the Secret's key: the test looks at the wrong thing")
	}
	if bytes.Contains(data, []byte("not-in-etcd-in-plain-text")) {
		t.Error("etcd holds the Secret in plain text")
	}
	if !bytes.Contains(data, []byte("k8s:enc:kms:v2:")) {
		t.Error("etcd holds no value encrypted by KMS v2")
	}
}

// kill sends SIGKILL to a unit's process.
func (n *node) kill(t *testing.T, pid uint32) {
	t.Helper()
	n.act(t, "POST", "signal", "", "signal=KILL", fmt.Sprint("pid=", pid))
}

// testKillWorkload ends the process that holds the workload side: everything in there ends with it, pods too, and everything comes back by itself.
func testKillWorkload(t *testing.T, n *node) {
	before := n.services(t)
	start := time.Now()
	n.kill(t, before["workload"].Pid)
	eventually(t, time.Minute, "all units of the workload side are new", func() error {
		now := n.services(t)
		for _, name := range []string{"workload", "containerd", "kubelet", "kube-proxy"} {
			if s := now[name]; s.State != "up" || s.Pid == before[name].Pid {
				return fmt.Errorf("%s: %s, process %d", name, s.State, s.Pid)
			}
		}
		return nil
	})
	units := time.Since(start)
	eventually(t, 4*time.Minute, "the pod answers again", func() error { return n.ask(t.Context()) })
	t.Logf("» the workload side was killed: its units were back after %s, the pod answered after %s", units.Round(100*time.Millisecond), time.Since(start).Round(100*time.Millisecond))
	for name, s := range n.services(t) {
		if was := before[name]; s.Pid != was.Pid && name != "workload" && name != "containerd" && name != "kubelet" && name != "kube-proxy" {
			t.Errorf("%s is process %d, was %d: it has nothing to do with that", name, s.Pid, was.Pid)
		}
	}
	n.run(t, "bhctl", "health", "--wait=3m")
	testConfinement(t, n) // of the new processes
}

func testReboot(t *testing.T, n *node) {
	before := n.run(t, "bhctl", "get", "config")
	start := time.Now()
	if _, err := n.try(t.Context(), 12*time.Minute, "bhctl", "reboot", "--wait=10m"); err != nil {
		t.Fatalf("bhctl reboot --wait: %v", err)
	}
	t.Logf("» healthy %s after the order to reboot", time.Since(start).Round(time.Second))
	console, err := os.ReadFile(filepath.Join(n.dir, "machines", n.name, qemu.ConsoleFile))
	if err != nil {
		t.Fatal(err)
	}
	if killed := regexp.MustCompile(`(?m)^.*: does not stop, killing it`).FindAllString(string(console), -1); killed != nil {
		t.Errorf("the reboot was not clean:\n%s", strings.Join(killed, "\n"))
	}
	if after := n.run(t, "bhctl", "get", "config"); after != before {
		t.Errorf("the document changed:\n%s\nwas\n%s", after, before)
	}
	eventually(t, 5*time.Minute, "the pod answers again", func() error { return n.ask(t.Context()) })
	if word := n.run(t, "kubectl", "get", "configmap", "kept", "-o", "jsonpath={.data.word}"); word != "bulkhead" {
		t.Errorf("ConfigMap holds %q", word)
	}
	secret := n.run(t, "kubectl", "get", "secret", "hidden", "-o", "jsonpath={.data.word}")
	if secret != "bm90LWluLWV0Y2QtaW4tcGxhaW4tdGV4dA==" {
		t.Errorf("Secret holds %q", secret)
	}
}
