package kubeletd

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/etcdd/rolling"
)

// shop is a small cluster of Kubernetes' own API server, scheduler and controllers, in which a test does what kubelets do, and the coordinator of rolling changes in front of it.
type shop struct {
	*realServer
	rolling *rolling.Server

	mu   sync.Mutex
	boot string // guarded by mu; the boot of n1 that has reported
}

const shopPods = "/api/v1/namespaces/default/pods"

// newShop serves until the test ends. n1 is there and takes pods.
func newShop(t *testing.T) *shop {
	s := &shop{realServer: newRealServer(t, testca.New(t)), boot: "b1"}
	cert, key := s.ca.PEM(t, "kubernetes-admin", certOf("admin", "system:masters"))
	config := s.file("kubeconfig", fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {server: %q, certificate-authority: %q}}]\nusers: [{name: a, user: {client-certificate: %q, client-key: %q}}]\ncontexts: [{name: a, context: {cluster: a, user: a}}]\ncurrent-context: a\n",
		s.url, filepath.Join(s.dir, "ca.pem"), s.file("admin.pem", cert), s.file("admin-key.pem", key)))
	s.program("kube-controller-manager", "--kubeconfig="+config, "--leader-elect=false", "--secure-port=0",
		"--controllers=deployment-controller,replicaset-controller,daemonset-controller,disruption-controller,serviceaccount-controller")
	s.program("kube-scheduler", "--kubeconfig="+config, "--leader-elect=false", "--secure-port=0")
	s.until("there is a service account for pods", func() bool { return s.get("/api/v1/namespaces/default/serviceaccounts/default") != nil })
	s.join("n1")

	coordinator := s.coordinator()
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	t.Cleanup(func() { cancel(); g.Wait() }) // before the client of etcd is closed
	g.Go(func() { s.kubelets(ctx) })
	s.rolling = &rolling.Server{C: coordinator}
	g.Go(func() { _ = coordinator.Run(ctx) })
	return s
}

// coordinator is a control plane's etcdd, as far as rolling changes go: its records are in the API server's etcd, and it speaks to kubeletd over its socket.
func (s *shop) coordinator() *rolling.Coordinator {
	store, err := clientv3.New(clientv3.Config{Endpoints: []string{s.etcd}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { store.Close() })
	program := s.file("kubelet", "")
	drain := serveDrain(s.T, &drainServer{program: program, admin: func(context.Context) (*cluster, error) { return s.as("admin", "system:masters"), nil }}, uid.Etcdd)
	return rolling.New(rolling.Config{
		Log: slog.New(slog.DiscardHandler), Name: func() string { return "cp" },
		Get: func(ctx context.Context, prefix string) (*clientv3.GetResponse, error) {
			return store.Get(ctx, prefix, clientv3.WithPrefix())
		},
		Txn: func(ctx context.Context, conditions []clientv3.Cmp, ops []clientv3.Op) (bool, error) {
			r, err := store.Txn(ctx).If(conditions...).Then(ops...).Commit()
			return err == nil && r.Succeeded, err
		},
		// Each change has all keys told anew.
		Follow: func(ctx context.Context, prefix string, f func(*storev1.WatchResponse) error) error {
			tell := func() error {
				r, err := store.Get(ctx, prefix, clientv3.WithPrefix())
				if err != nil {
					return err
				}
				m := &storev1.WatchResponse{Complete: true, Revision: uint64(r.Header.GetRevision())}
				for _, kv := range r.Kvs {
					m.Entries = append(m.Entries, &storev1.Entry{Key: string(kv.Key), Value: kv.Value, Revision: uint64(kv.ModRevision)})
				}
				return f(m)
			}
			changes := store.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			for range changes {
				if err := tell(); err != nil {
					return err
				}
			}
			return ctx.Err()
		},
		Nodes: func() ([]*clusterv1.Node, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return []*clusterv1.Node{{Name: "cp", Role: "controlplane", State: "ready", BootId: "c"}, {Name: "n1", Role: "worker", State: "ready", BootId: s.boot}}, nil
		},
		Voters: func(context.Context) (string, error) { return "cp", nil }, Kubernetes: drainer{drain},
	})
}

// drainer calls as etcdd does.
type drainer struct{ c kubernetesv1.DrainClient }

func (d drainer) Drain(ctx context.Context, node, id string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := d.c.Empty(ctx, &kubernetesv1.EmptyRequest{Node: node, Change: id})
	return r.GetLeft(), err
}

func (d drainer) Release(ctx context.Context, node, id string) error {
	_, err := d.c.Release(ctx, &kubernetesv1.ReleaseRequest{Node: node, Change: id})
	return err
}

// join makes a Node to which pods may come.
func (s *shop) join(name string) {
	s.Helper()
	s.register(name, "127.0.0.1", "10.244.0.0/24")
	room := object{"cpu": "4", "memory": "4Gi", "pods": "100"}
	s.send(s.admin, http.MethodPatch, nodePath(name)+"/status", object{"status": object{"capacity": room, "allocatable": room}})
	s.send(s.admin, http.MethodPatch, nodePath(name), object{"spec": object{"taints": nil}}) // a controller's, that the node is not ready yet
}

// kubelets run what was scheduled, and end what is to go.
func (s *shop) kubelets(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for ; ctx.Err() == nil; <-tick.C {
		for _, p := range s.pods(ctx) {
			path, patch := shopPods+"/"+p.Metadata.Name, ""
			switch {
			case p.Metadata.DeletionTimestamp != "":
				_ = s.admin.do(ctx, request{method: http.MethodDelete, path: path, body: []byte(`{"gracePeriodSeconds":0}`)}, nil)
			case p.Spec.NodeName == "" || p.Status.Phase != "Pending":
			case p.Metadata.Labels["app"] == "finished":
				patch = `{"status":{"phase":"Succeeded"}}`
			default:
				patch = `{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True"}]}}`
			}
			if patch != "" { // it is looked at again if this fails
				_ = s.admin.do(ctx, request{method: http.MethodPatch, path: path + "/status", content: "application/merge-patch+json", body: []byte(patch)}, nil)
			}
		}
	}
}

// shopPod is what the test looks at.
type shopPod struct {
	Metadata struct {
		Name, UID, DeletionTimestamp string
		Labels                       map[string]string
	}
	Spec   struct{ NodeName string }
	Status struct{ Phase string }
}

func (s *shop) pods(ctx context.Context) []shopPod {
	var list struct{ Items []shopPod }
	_ = s.admin.do(ctx, request{method: http.MethodGet, path: shopPods}, &list) // none are none
	return list.Items
}

// where are the pods of an application that run: UIDs by node.
func (s *shop) where(app string) map[string][]string {
	out := map[string][]string{}
	for _, p := range s.pods(s.Context()) {
		if p.Metadata.Labels["app"] == app && (p.Status.Phase == "Running" || p.Status.Phase == "Succeeded") {
			out[p.Spec.NodeName] = append(out[p.Spec.NodeName], p.Metadata.UID)
		}
	}
	for _, uids := range out {
		slices.Sort(uids)
	}
	return out
}

// closed says for which change n1 takes no pods; "" if it takes some.
func (s *shop) closed() string {
	node := s.get(nodePath("n1"))
	if spec, _ := node["spec"].(object); spec["unschedulable"] != true {
		return ""
	}
	notes, _ := node["metadata"].(object)["annotations"].(object)
	return fmt.Sprint(notes[changeKey])
}

// order has n1 restart.
func (s *shop) order(seconds uint64, policy string) string {
	s.Helper()
	r, err := s.rolling.Start(s.Context(), &clusterv1.StartRequest{Kind: "reboot", Nodes: []string{"n1"}, DrainTimeoutSeconds: seconds, OnTimeout: policy})
	if err != nil {
		s.Fatal(err)
	}
	return r.GetStatus().GetId()
}

// reaches waits until the change is over, or its node is at a step.
func (s *shop) reaches(state string) *clusterv1.RollingNode {
	s.Helper()
	var st *clusterv1.RollingStatus
	s.until("the change is "+state, func() bool {
		var err error
		if st, err = s.rolling.GetStatus(s.Context(), nil); err != nil {
			s.Fatal(err)
		}
		return st.GetState() == state || state != "done" && st.GetNodes()[0].GetState() == state
	})
	return st.GetNodes()[0]
}

// restart is n1, back from one.
func (s *shop) restart(boot string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.boot = boot
}

// fill makes the pods: two behind a budget that can spare none, and one of each kind that a drain leaves alone.
func (s *shop) fill() {
	s.Helper()
	spec := object{"containers": []any{object{"name": "c", "image": "x"}}}
	here := maps.Clone(spec)
	here["nodeName"] = "n1"
	template := func(app string) object { return object{"metadata": object{"labels": object{"app": app}}, "spec": spec} }
	selector := func(app string) object { return object{"matchLabels": object{"app": app}} }
	pod := func(app string, meta object) object {
		meta["name"], meta["labels"] = app, object{"app": app}
		return object{"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": here}
	}
	owner := func(version, kind, name, uid string) []any {
		return []any{object{"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": true}}
	}
	node := s.get(nodePath("n1"))["metadata"].(object)["uid"].(string)
	for path, o := range map[string]object{
		"/apis/apps/v1/namespaces/default/deployments": {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": object{"name": "web"},
			"spec": object{"replicas": 2, "selector": selector("web"), "template": template("web")}},
		"/apis/apps/v1/namespaces/default/daemonsets": {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": object{"name": "agent"},
			"spec": object{"selector": selector("agent"), "template": template("agent")}},
		"/apis/policy/v1/namespaces/default/poddisruptionbudgets": {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": object{"name": "web"},
			"spec": object{"minAvailable": 2, "selector": selector("web")}},
	} {
		s.send(s.admin, http.MethodPost, path, o)
	}
	s.send(s.admin, http.MethodPost, shopPods, pod("alone", object{}))
	s.send(s.admin, http.MethodPost, shopPods, pod("finished", object{"ownerReferences": owner("batch/v1", "Job", "job", "5f1e4b6a-0000-4000-8000-000000000001")}))
	s.send(s.as(nodeUser+"n1", "system:nodes"), http.MethodPost, shopPods, pod("static", object{"annotations": object{"kubernetes.io/config.mirror": "x"}, "ownerReferences": owner("v1", "Node", "n1", node)}))
}

// stay are the applications whose pods a drain does not touch.
var stay = []string{"agent", "alone", "finished", "static"}

func (s *shop) stayed() (out []string) {
	for _, app := range stay {
		out = append(out, s.where(app)["n1"]...)
	}
	return out
}

// TestNodeDrainAndTheRealAPIServer: a rolling change empties a node of a real API server. What a budget keeps is waited for until the time is over, and then the policy says what becomes of
// it; DaemonSets' pods, static ones, those without a controller and those that have ended stay; afterwards the node takes pods again.
func TestNodeDrainAndTheRealAPIServer(t *testing.T) {
	s := newShop(t)
	s.fill()
	s.until("all pods run", func() bool { return len(s.where("web")["n1"]) == 2 && len(s.stayed()) == len(stay) })
	web, stayed := s.where("web"), s.stayed()
	same := func() {
		t.Helper()
		if now, rest := s.where("web"), s.stayed(); fmt.Sprint(now) != fmt.Sprint(web) || !slices.Equal(rest, stayed) {
			t.Errorf("pods %v and %v, want %v and %v as before", now, rest, web, stayed)
		}
	}
	budget := "/apis/policy/v1/namespaces/default/poddisruptionbudgets/web"
	s.until("the budget is counted", func() bool {
		status, _ := s.get(budget)["status"].(object)
		return fmt.Sprint(status["currentHealthy"]) == "2"
	})

	id := s.order(3, "halt")
	s.reaches("draining")
	s.until("no pods come to n1", func() bool { return s.closed() == id })
	n := s.reaches("halted")
	if why := n.GetDetail(); !strings.Contains(why, "not drained within 3s: 2 pods are left: default/web-") || !strings.Contains(why, "disruption budget") {
		t.Errorf("halted: %q, want it to name the pods and their budget", why)
	}
	if by := s.closed(); by != "" {
		t.Errorf("n1 takes no pods after a halt, for %q", by)
	}
	same()
	if _, err := s.rolling.Abort(t.Context(), nil); err != nil {
		t.Fatal(err)
	}

	id = s.order(3, "force")
	if n = s.reaches("restarting"); !strings.Contains(n.GetDetail(), "restarted all the same: 2 pods are left") || s.closed() != id {
		t.Errorf("forced: %q, closed for %q, want it to say which pods were left, and %q", n.GetDetail(), s.closed(), id)
	}
	s.restart("b2")
	s.reaches("done")
	if by := s.closed(); by != "" {
		t.Errorf("n1 takes no pods after its turn, for %q", by)
	}
	same()

	s.join("n2")
	s.send(s.admin, http.MethodPatch, budget, object{"spec": object{"minAvailable": 1}})
	id = s.order(120, "halt")
	if n = s.reaches("restarting"); n.GetDetail() != "" || s.closed() != id {
		t.Errorf("restarting: %q, closed for %q", n.GetDetail(), s.closed())
	}
	s.until("both run on the other node", func() bool { return len(s.where("web")["n2"]) == 2 })
	s.restart("b3")
	s.reaches("done")
	if by := s.closed(); by != "" || len(s.where("web")["n1"]) > 0 || !slices.Equal(s.stayed(), stayed) {
		t.Errorf("in the end n1 is closed for %q, has %v and %v, want %v as before", by, s.where("web")["n1"], s.stayed(), stayed)
	}

	// What a person closed stays closed.
	s.send(s.admin, http.MethodPatch, nodePath("n1"), object{"spec": object{"unschedulable": true}})
	s.order(30, "halt")
	s.reaches("restarting")
	s.restart("b4")
	s.reaches("done")
	if s.closed() == "" {
		t.Error("what a person closed is open after a rolling change")
	}
	if _, err := s.rolling.Abort(t.Context(), nil); !errs.Is(err, errs.Precondition) {
		t.Errorf("abort what is done: %v", err)
	}
}
