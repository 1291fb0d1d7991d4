package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// kubeNodes are the machines of "bhctl up --controlplanes 1 --workers 1", and the addresses at which they reach each other.
var kubeNodes = map[string]string{"test-1": "10.5.0.11", "test-w1": "10.5.0.101"}

// TestKubeNodes is Kubernetes on a control plane and a worker: pods reach pods of the other node, kubelets have their certificates and a worker's kubeletd cannot give any.
func TestKubeNodes(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	t.Cleanup(func() {
		if t.Failed() {
			n.keepKube(t, slices.Sorted(maps.Keys(kubeNodes)))
		}
	})
	start := time.Now()
	if out, err := n.try(t.Context(), 20*time.Minute, "bhctl", "up", "--name", n.name, "--controlplanes", "1", "--workers", "1", "--image", filepath.Join(n.root, "out/image"), "--memory", "3072"); err != nil {
		t.Fatalf("bhctl up: %v\n%s", err, out)
	}
	t.Logf("» both nodes are ready after %s", time.Since(start).Round(time.Second))
	n.run(t, "bhctl", "kubeconfig", "--file", n.kubeconfig)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"nodes", n.kubeNodes},
		{"pods reach pods on the other node", n.podsAcross},
		{"certificates", n.kubeletCertificates},
		{"a worker's kubeletd only looks", n.workerOnlyLooks},
		{"a worker comes back", n.workerReboots},
		{"a node is removed", n.kubeNodeRemoved},
	} {
		if !t.Run(part.name, part.run) {
			t.FailNow()
		}
	}
}

// keepKube saves what a failed test leaves of its machines.
func (n *node) keepKube(t *testing.T, names []string) {
	dir := filepath.Join(n.root, "out", "test-vm", t.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	save := func(file string, args ...string) {
		out, err := n.try(context.Background(), 20*time.Second, args[0], args[1:]...)
		if err != nil {
			out += "\n" + err.Error()
		}
		_ = os.WriteFile(filepath.Join(dir, file), []byte(out), 0o644)
	}
	save("cluster.txt", "kubectl", "get", "nodes,pods,services,csr", "-A", "-o", "wide")
	for _, name := range names {
		if data, err := os.ReadFile(filepath.Join(n.dir, "machines", name, "console.log")); err == nil {
			_ = os.WriteFile(filepath.Join(dir, name+"-console.log"), data, 0o644)
		}
		save(name+"-health.txt", "bhctl", "-n", name, "health")
		save(name+"-network.txt", "bhctl", "-n", name, "get", "routes")
		for _, u := range []string{"trustd", "networkd", "kubeletd", "kubelet", "kube-proxy", "containerd", "kube-apiserver", "kube-controller-manager"} {
			save(name+"-"+u+".txt", "bhctl", "-n", name, "logs", u)
		}
	}
	t.Logf("what the nodes say is in out/test-vm/%s", t.Name())
}

// kubectlJSON decodes what kubectl prints.
func (n *node) kubectlJSON(t *testing.T, into any, args ...string) {
	t.Helper()
	if err := json.Unmarshal([]byte(n.run(t, "kubectl", append(args, "-o", "json")...)), into); err != nil {
		t.Fatal(err)
	}
}

// kubeNodes: each is Ready, at the address that the other one reaches, with a subnet of its own.
func (n *node) kubeNodes(t *testing.T) {
	var list struct {
		Items []struct {
			Metadata struct {
				Name   string
				Labels map[string]string
			}
			Spec   struct{ PodCIDR string }
			Status struct {
				Addresses  []struct{ Type, Address string }
				Conditions []struct{ Type, Status string }
			}
		}
	}
	n.kubectlJSON(t, &list, "get", "nodes")
	seen, subnets := map[string]string{}, map[string]bool{}
	for _, o := range list.Items {
		for _, a := range o.Status.Addresses {
			if a.Type == "InternalIP" {
				seen[o.Metadata.Name] = a.Address
			}
		}
		for _, c := range o.Status.Conditions {
			if c.Type == "Ready" && c.Status != "True" {
				t.Errorf("%s is not Ready", o.Metadata.Name)
			}
		}
		_, control := o.Metadata.Labels["node-role.kubernetes.io/control-plane"]
		if control != (o.Metadata.Name == "test-1") || o.Metadata.Labels["bulkhead.dev/member"] == "" {
			t.Errorf("%s: labels %v", o.Metadata.Name, o.Metadata.Labels)
		}
		subnets[o.Spec.PodCIDR] = true
	}
	if fmt.Sprint(seen) != fmt.Sprint(kubeNodes) || len(subnets) != len(kubeNodes) {
		t.Errorf("nodes at %v, want %v; pod subnets %v", seen, kubeNodes, subnets)
	}
}

// podsAcross: by address, by the Service's address, and by name; the other side sees the pod's own address.
func (n *node) podsAcross(t *testing.T) {
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/spread.yaml"))
	pods := []string{"on-cp", "on-worker"}
	address := map[string]string{}
	for _, pod := range pods {
		eventually(t, 4*time.Minute, pod+" runs", func() error {
			out, err := n.try(t.Context(), time.Minute, "kubectl", "get", "pod", pod, "-o", "jsonpath={.status.phase} {.status.podIP}")
			phase, ip, _ := strings.Cut(out, " ")
			if address[pod] = ip; err == nil && (phase != "Running" || ip == "") {
				err = fmt.Errorf("it is %q at %q", phase, ip)
			}
			return err
		})
	}
	for i, from := range pods {
		to := pods[1-i]
		service := strings.TrimSpace(n.run(t, "kubectl", "get", "service", to, "-o", "jsonpath={.spec.clusterIP}"))
		for _, url := range []string{"http://" + address[to] + ":8080", "http://" + service, "http://" + to, "http://" + to + ".default.svc.cluster.local"} {
			eventually(t, 2*time.Minute, from+" reads "+url, func() error {
				out, err := n.try(t.Context(), time.Minute, "kubectl", "exec", from, "--", "/hello", "get", url)
				if err == nil && !strings.Contains(out, "hello from "+to) {
					err = fmt.Errorf("somebody else answers: %s", out)
				}
				return err
			})
		}
		if out := n.run(t, "kubectl", "logs", to); !strings.Contains(out, "from "+address[from]+":") {
			t.Errorf("%s at %s does not see %s's own address %s:\n%s", to, address[to], from, address[from], out)
		}
	}
}

// kubeletCertificates: each kubelet has one to ask with and one to serve with, by way of the certificates API. That "exec" and "logs" went through says that they are good.
func (n *node) kubeletCertificates(t *testing.T) {
	eventually(t, 2*time.Minute, "each kubelet has both certificates", func() error {
		var list struct {
			Items []struct {
				Spec   struct{ SignerName, Username string }
				Status struct{ Certificate []byte }
			}
		}
		n.kubectlJSON(t, &list, "get", "csr")
		var got []string
		for _, o := range list.Items {
			if len(o.Status.Certificate) > 0 {
				got = append(got, o.Spec.SignerName+" "+o.Spec.Username)
			}
		}
		for name := range kubeNodes {
			for _, want := range []string{"kubernetes.io/kube-apiserver-client-kubelet system:bootstrap:" + name, "kubernetes.io/kubelet-serving system:node:" + name} {
				if !slices.Contains(got, want) {
					return fmt.Errorf("no certificate %s among %q", want, got)
				}
			}
		}
		return nil
	})
}

// workerOnlyLooks: what the worker's kubeletd is to the API server may read Nodes, and nothing that matters; another identity it does not get.
func (n *node) workerOnlyLooks(t *testing.T) {
	const user, group = "--as=bulkhead:kubeletd:test-w1", "--as-group=bulkhead:kubeletd-nodes"
	for _, c := range []struct{ verb, what, sub, want string }{
		{"list", "nodes", "", "yes"}, {"patch", "nodes", "", "no"}, {"delete", "nodes", "", "no"}, {"list", "secrets", "", "no"}, {"list", "certificatesigningrequests", "", "no"},
		{"update", "certificatesigningrequests", "approval", "no"}, {"update", "certificatesigningrequests", "status", "no"},
	} {
		out, err := n.try(t.Context(), time.Minute, "kubectl", "auth", "can-i", c.verb, c.what, "--subresource="+c.sub, user, group) // "no" is an exit code, too
		if !strings.HasPrefix(strings.TrimSpace(out), c.want) {
			t.Errorf("%s %s/%s: %q (%v), want %q", c.verb, c.what, c.sub, out, err, c.want)
		}
	}
	request := strings.Fields(n.run(t, "kubectl", "get", "csr", "-o", "name"))[0]
	if out, err := n.try(t.Context(), time.Minute, "kubectl", "certificate", "approve", strings.TrimPrefix(request, "certificatesigningrequest.certificates.k8s.io/"), user, group); err == nil || !strings.Contains(err.Error(), "orbidden") {
		t.Errorf("a worker's kubeletd approves: %v\n%s", err, out)
	}
	var list []struct{ Profile string }
	if err := json.Unmarshal([]byte(n.run(t, "bhctl", "-n", "test-w1", "get", "certificates", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, c := range list {
		have[c.Profile] = true
	}
	if !have["kubeletd-node"] || have["kubeletd"] || have["kubelet-client"] || have["kubernetes-admin"] || have["kube-apiserver-kubelet-client"] {
		t.Errorf("a worker's certificates: %v", have)
	}
	if err := n.mustFail(t, "-n", "test-w1", "kubeconfig"); !strings.Contains(err, "is a worker") {
		t.Errorf("a worker makes a kubeconfig: %s", err)
	}
	if out := n.run(t, "bhctl", "-n", "test-w1", "services"); !strings.Contains(out, "kubelet") || strings.Contains(lineOf(out, "kube-apiserver"), " up ") {
		t.Errorf("a worker's services:\n%s", out)
	}
}

// lineOf returns the first line that begins with a word.
func lineOf(text, word string) string {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, word+" ") {
			return line
		}
	}
	return ""
}

// workerReboots: with nobody's help its pod is reached again.
func (n *node) workerReboots(t *testing.T) {
	if _, err := n.try(t.Context(), 12*time.Minute, "bhctl", "-n", "test-w1", "reboot", "--wait=10m"); err != nil {
		t.Fatalf("bhctl reboot: %v", err)
	}
	eventually(t, 5*time.Minute, "its pod is reached by name", func() error {
		_, err := n.try(t.Context(), time.Minute, "kubectl", "exec", "on-cp", "--", "/hello", "get", "http://on-worker")
		return err
	})
}

// kubeNodeRemoved: Kubernetes forgets it, too, and the other one stays.
func (n *node) kubeNodeRemoved(t *testing.T) {
	if _, err := n.try(t.Context(), 3*time.Minute, "bhctl", "node", "remove", "test-w1", "--yes"); err != nil {
		t.Fatalf("node remove: %v", err)
	}
	eventually(t, 3*time.Minute, "its Node is gone", func() error {
		out, err := n.try(t.Context(), time.Minute, "kubectl", "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")
		if err == nil && out != "test-1" {
			err = fmt.Errorf("nodes: %s", out)
		}
		return err
	})
}
