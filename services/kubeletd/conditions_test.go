package kubeletd

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/needs"
)

// TestConditions: each step on the way to a Ready node says that it is missing, and what it needs from whom.
func TestConditions(t *testing.T) {
	want := spec{Node: "n1", Role: config.ControlPlane, Cluster: "demo", Domain: "cluster.local", PodSubnet: netip.MustParsePrefix("10.244.0.0/16"), ServiceSubnet: netip.MustParsePrefix("10.96.0.0/12"), CNI: "bridge"}
	worker := want
	worker.Role = config.Worker
	up := func(names ...string) map[string]Unit {
		out := map[string]Unit{"image-load": {State: "down", LastExit: "exit 0"}}
		for _, n := range names {
			out[n] = Unit{State: "up"}
		}
		return out
	}
	for _, c := range []struct {
		name, condition string
		want            spec
		have            State
		trouble, needs  string // parts
	}{
		{"no volume", "containerd", want, State{}, "containerd is not started yet: it waits for volume VAR, workload", "storaged/VAR.mounted storaged/VAR.room"},
		{"a full volume", "containerd", want, State{Volume: true, Units: map[string]Unit{"containerd": {State: "waiting", LastExit: "exit 1"}}}, "containerd: unit is waiting (exit 1)", "storaged/VAR.room"},
		{"no address", "kube-apiserver", want, State{Volume: true, Hostname: "n1"}, "it waits for bootstrap, address, etcd", "etcdd/member kubeletd/certificate kubeletd/certificates networkd/address"},
		{"etcd went away", "kube-apiserver", want, State{Volume: true, Units: up("kube-apiserver"), Health: map[string]string{"kube-apiserver": "etcd failed"}}, "kube-apiserver: unit is up: etcd failed", "etcdd/member"},
		{"a worker whose control planes are away", apiCondition, worker, State{Volume: true, Units: up("kubelet"), Trouble: "connection refused"}, "no API server of the cluster answers: connection refused", "networkd/address"},
		{"the same, its kubelet", "kubelet", worker, State{Volume: true, Units: map[string]Unit{}}, "it waits for", "kubeletd/api kubeletd/certificate"},
		{"not Ready", "node", want, State{API: true, Node: &Node{Reason: "cni plugin not initialized"}}, "the node is not Ready: cni plugin not initialized", "kubeletd/api kubeletd/kube-apiserver kubeletd/kubelet"},
		{"nobody knows", "node", want, State{}, "no API server answers", "kubeletd/kube-apiserver"},
		{"Ready", "node", want, State{API: true, Node: &Node{Ready: true}}, "", ""},
		{"well", "kubelet", want, State{Units: up("kubelet")}, "", ""},
		{"unsigned", "certificates", want, State{Address: netip.MustParseAddr("10.0.0.5"), Trust: trust{Bootstrapped: true, Kubernetes: "k", Etcd: "e", FrontProxy: "f"}, Members: map[string]Member{"n1": {}}}, "trustd has not signed these certificates: ", "trustd/answers trustd/bootstrap"},
	} {
		t.Run(c.name, func(t *testing.T) {
			found := false
			for _, x := range conditions(c.want, c.have) {
				if !x.GetExplains() {
					t.Errorf("%s counts in health", x.GetName())
				}
				if !slices.IsSorted(x.GetNeeds()) || x.GetHelp() == "" {
					t.Errorf("%s: needs %v, help %q", x.GetName(), x.GetNeeds(), x.GetHelp())
				}
				if x.GetName() != c.condition {
					continue
				}
				found = true
				if !strings.Contains(x.GetTrouble(), c.trouble) || (c.trouble == "") != (x.GetTrouble() == "") {
					t.Errorf("got %q, want %q", x.GetTrouble(), c.trouble)
				}
				for _, n := range strings.Fields(c.needs) {
					if !slices.Contains(x.GetNeeds(), n) {
						t.Errorf("it does not need %s, but %s", n, x.GetNeeds())
					}
				}
			}
			if !found {
				t.Errorf("no condition %s", c.condition)
			}
		})
	}
	if got := conditions(want, State{Absent: true}); got != nil {
		t.Errorf("an image without Kubernetes: %v", got)
	}
}

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	for _, c := range append(conditions(spec{Role: config.Worker}, State{}), conditions(spec{Role: config.ControlPlane}, State{})...) {
		told[c.GetName()] = true
		for _, ref := range c.GetNeeds() {
			if !needs.Known(ref) {
				t.Errorf("%s needs %s, which nobody reports", c.GetName(), ref)
			}
		}
	}
	for _, name := range needs.Of("kubeletd") {
		if !told[name] {
			t.Errorf("others refer to %s, which is not reported", name)
		}
	}
}
