package machine

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

// prowled is what "hello prowl" prints.
type prowled struct {
	Processes, Groups, Sockets, Abstract, Files, Under, Spaces, Written []string
	Strangers                                                           []int
}

// testPrivilegedPod: a pod with every capability, in the host's namespaces and with the host's root, sees the workload side and nothing of the rest. What it can still
// do stands in docs/threat-model.md.
func testPrivilegedPod(t *testing.T, n *node) {
	n.run(t, "kubectl", "apply", "-f", filepath.Join(n.root, "test/machine/testdata/prowl.yaml"))
	eventually(t, 2*time.Minute, "prowl runs", func() error {
		_, err := n.try(t.Context(), time.Minute, "kubectl", "exec", "-n", "kube-system", "prowl", "--", "/hello", "env")
		return err
	})
	var p prowled
	out := n.run(t, "kubectl", "exec", "-n", "kube-system", "prowl", "--", "/hello", "prowl", "/host")
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatal(err)
	}
	n.run(t, "kubectl", "delete", "pod", "-n", "kube-system", "prowl", "--now")
	if err := os.WriteFile(filepath.Join(n.dir, "prowl.json"), []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	units, err := unitfile.Load(os.DirFS(n.root))
	if err != nil {
		t.Fatal(err)
	}
	services, inside := n.services(t), 0
	for _, u := range units {
		lives := u.Inside == "workload" || u.Name == "workload"
		running := services[u.Name] != nil && services[u.Name].Pid != 0
		if seen := slices.Contains(p.Processes, u.Name); seen && !lives || lives && running && !seen {
			t.Errorf("%s lives on the workload side: %v, and a pod sees its process: %v", u.Name, lives, seen)
		}
		if lives && running {
			inside++
		}
		if u.Inside == "" && slices.Contains(p.Groups, u.Name) {
			t.Errorf("a pod sees the control group of %s", u.Name)
		}
	}
	if inside < 4 || !slices.Contains(p.Processes, "/hello") || !slices.Contains(p.Groups, "kubepods") {
		t.Errorf("it does not even see its own side, so the look is wrong: %d units, %q, %q", inside, p.Processes, p.Groups)
	}
	if slices.Contains(p.Processes, "/sbin/init") || slices.Contains(p.Groups, "bulkhead") {
		t.Errorf("it sees PID 1: %q, %q", p.Processes, p.Groups)
	}
	for what, found := range map[string][]string{"other namespaces": p.Spaces, "sockets without a path": p.Abstract, "files of daemons to write": p.Written, "processes to signal": texts(p.Strangers)} {
		if len(found) > 0 {
			t.Errorf("a pod finds %s: %q", what, found)
		}
	}
	containerd := false
	for _, s := range p.Sockets {
		containerd = containerd || s == "/run/containerd/containerd.sock"
		if strings.HasPrefix(s, "/run/bulkhead") {
			t.Errorf("a pod can call at %s", s)
		}
	}
	if !containerd {
		t.Errorf("it does not even reach containerd, so the look is wrong: %q", p.Sockets)
	}
	// All that is shown of daemons: what the units of the workload side read.
	shown := []string{"/run/bulkhead/etc/", "/run/bulkhead/networkd/", "/run/bulkhead/kubeletd/cni/", "/run/bulkhead/kubeletd/containerd/",
		"/run/bulkhead/kubeletd/kubernetes/kubelet/", "/run/bulkhead/kubeletd/kubernetes/kube-proxy/", "/run/bulkhead/kubeletd/kubernetes/pki/"}
	for _, f := range p.Files {
		if !slices.ContainsFunc(shown, func(s string) bool { return strings.HasPrefix(f, s) }) {
			t.Errorf("a pod sees %s", f)
		}
	}
	if len(p.Files) < 8 {
		t.Errorf("it does not even see what is shown, so the look is wrong: %q", p.Files)
	}
	// Below the mounts that it took off there is the root of the image, whose folders are empty.
	if len(p.Under) > 0 {
		t.Errorf("under the mounts that a pod took off there is %q", p.Under)
	}
	t.Logf("» a privileged pod sees %d kinds of processes, %d files and %d sockets, and none of a daemon", len(p.Processes), len(p.Files), len(p.Sockets))
}

func texts(numbers []int) (out []string) {
	for _, n := range numbers {
		out = append(out, fmt.Sprint(n))
	}
	return out
}
