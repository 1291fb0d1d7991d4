package kubeletd

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// evictor is the few paths of Kubernetes' API that a drain uses, with one node "w1".
type evictor struct {
	mu            sync.Mutex
	version       int                 // guarded by mu
	unschedulable bool                // guarded by mu
	notes         map[string]string   // guarded by mu
	pods          map[string]apiPod   // guarded by mu; by namespace/name
	refuses       map[string][]string // guarded by mu; by pod: code and message of each try to evict it, from the first
	down          bool                // guarded by mu
}

// look runs f while nobody else looks or changes.
func (a *evictor) look(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

type apiPod struct {
	owner, phase string
	mirror       bool
	going        bool
}

func (a *evictor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fail := func(code int, text string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]string{"message": text})
	}
	switch {
	case a.down:
		fail(503, "shutting down")
	case r.URL.Path == "/api/v1/nodes/w1" && r.Method == http.MethodGet:
		_ = json.NewEncoder(w).Encode(map[string]any{"metadata": map[string]any{"name": "w1", "resourceVersion": fmt.Sprint(a.version), "annotations": a.notes},
			"spec": map[string]any{"unschedulable": a.unschedulable}})
	case r.URL.Path == "/api/v1/nodes/w1" && r.Method == http.MethodPatch:
		var p struct {
			Metadata struct {
				ResourceVersion string
				Annotations     map[string]*string
			}
			Spec struct{ Unschedulable bool }
		}
		if json.NewDecoder(r.Body).Decode(&p) != nil || p.Metadata.ResourceVersion != fmt.Sprint(a.version) {
			fail(409, "the object has been modified")
			return
		}
		a.version++
		a.unschedulable = p.Spec.Unschedulable
		for k, v := range p.Metadata.Annotations {
			delete(a.notes, k)
			if v != nil {
				a.notes[k] = *v
			}
		}
		fmt.Fprint(w, "{}")
	case r.URL.Path == "/api/v1/pods" && r.URL.Query().Get("fieldSelector") == "spec.nodeName=w1":
		a.list(w, r.URL.Query().Get("continue"))
	case strings.HasSuffix(r.URL.Path, "/eviction") && r.Method == http.MethodPost:
		var e struct {
			Metadata      struct{ Namespace, Name string }
			DeleteOptions struct{ Preconditions struct{ UID string } }
		}
		err := json.NewDecoder(r.Body).Decode(&e)
		name := e.Metadata.Namespace + "/" + e.Metadata.Name
		p, there := a.pods[name]
		switch tries := a.refuses[name]; {
		case err != nil || e.DeleteOptions.Preconditions.UID != "uid-"+e.Metadata.Name:
			fail(400, "bad eviction")
		case !there:
			fail(404, "pods \""+e.Metadata.Name+"\" not found")
		case len(tries) > 0:
			a.refuses[name] = tries[1:]
			var code int
			_, text, _ := strings.Cut(tries[0], " ")
			_, _ = fmt.Sscan(tries[0], &code)
			fail(code, text)
		default:
			p.going = true
			a.pods[name] = p
			w.WriteHeader(201)
		}
	default:
		fail(404, "nothing there")
	}
}

// list sends two pods a page.
func (a *evictor) list(w http.ResponseWriter, from string) {
	items, next := []any{}, ""
	for _, n := range slices.Sorted(maps.Keys(a.pods)) {
		if n <= from {
			continue
		}
		if len(items) == 2 {
			break
		}
		next = n
		p := a.pods[n]
		ns, name, _ := strings.Cut(n, "/")
		m := map[string]any{"namespace": ns, "name": name, "uid": "uid-" + name}
		if p.owner != "" {
			m["ownerReferences"] = []any{map[string]any{"kind": p.owner, "controller": true}}
		}
		if p.mirror {
			m["annotations"] = map[string]string{"kubernetes.io/config.mirror": "x"}
		}
		if p.going {
			m["deletionTimestamp"] = "2026-01-01T00:00:00Z"
		}
		items = append(items, map[string]any{"metadata": m, "status": map[string]any{"phase": p.phase}})
	}
	if len(items) < 2 {
		next = ""
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"metadata": map[string]any{"continue": next}, "items": items})
}

// drainSocket serves Drain in front of a.
func drainSocket(t *testing.T, a *evictor, who uid.ID) kubernetesv1.DrainClient {
	t.Helper()
	web := httptest.NewTLSServer(a)
	t.Cleanup(web.Close)
	program := filepath.Join(t.TempDir(), "kubelet")
	if a != nil {
		if err := os.WriteFile(program, nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return serveDrain(t, &drainServer{program: program, admin: func(context.Context) (*cluster, error) { return &cluster{server: web.URL, http: web.Client()}, nil }}, who)
}

// serveDrain is kubeletd's socket, for calls of a user.
func serveDrain(t *testing.T, s *drainServer, who uid.ID) kubernetesv1.DrainClient {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	env := daemon.Env{Name: "kubeletd", Log: slog.New(slog.DiscardHandler), Listen: l, Ready: func() {}, Metrics: metrics.New("kubeletd"), Who: func(net.Conn) (uid.ID, error) { return who, nil }}
	go func() {
		done <- daemon.Serve(ctx, env, callers, func(g *grpc.Server) { kubernetesv1.RegisterDrainServer(g, s) })
	}()
	t.Cleanup(func() { cancel(); <-done })
	conn, err := peer.Dial(sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return kubernetesv1.NewDrainClient(conn)
}

// A drain, step by step as a coordinator asks for it: what has to go goes as far as budgets allow, what must stay stays.
func TestDrain(t *testing.T) {
	a := &evictor{notes: map[string]string{}, pods: map[string]apiPod{
		"default/web-1": {owner: "ReplicaSet", phase: "Running"}, "default/web-2": {owner: "ReplicaSet", phase: "Running"}, "default/db-0": {owner: "StatefulSet", phase: "Running"},
		"kube-system/agent": {owner: "DaemonSet", phase: "Running"}, "kube-system/static": {owner: "Node", phase: "Running", mirror: true},
		"default/alone": {phase: "Running"}, "default/job": {owner: "Job", phase: "Succeeded"},
	}, refuses: map[string][]string{
		"default/web-2": {"429 Cannot evict pod as it would violate the pod's disruption budget."},
		"default/db-0":  {"500 This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."},
	}}
	c := drainSocket(t, a, uid.Etcdd)
	empty := func(change string) []string {
		t.Helper()
		r, err := c.Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: change})
		if err != nil {
			t.Fatal(err)
		}
		return r.GetLeft()
	}
	left := empty("abc")
	if len(left) != 3 || !strings.HasPrefix(left[0], "default/db-0 (") || left[1] != "default/web-1" || !strings.Contains(left[2], "default/web-2 (") || !strings.Contains(left[2], "disruption budget") {
		t.Errorf("left: %q", left)
	}
	a.look(func() {
		if !a.unschedulable || a.notes[changeKey] != "abc" {
			t.Errorf("unschedulable %v, annotations %v", a.unschedulable, a.notes)
		}
	})
	if left = empty("abc"); !reflect.DeepEqual(left, []string{"default/db-0", "default/web-1 (it is going)", "default/web-2"}) {
		t.Errorf("then left: %q", left)
	}
	a.look(func() {
		for _, n := range []string{"default/db-0", "default/web-1", "default/web-2"} {
			delete(a.pods, n)
		}
	})
	left = empty("abc")
	a.look(func() {
		if len(left) > 0 || len(a.pods) != 4 {
			t.Errorf("in the end: %q, there are %v", left, a.pods)
		}
	})
	// Only who made it so takes it back; a later change takes over what an earlier one left.
	release := func(change string, want bool, notes int) {
		t.Helper()
		if _, err := c.Release(t.Context(), &kubernetesv1.ReleaseRequest{Node: "w1", Change: change}); err != nil {
			t.Fatal(err)
		}
		a.look(func() {
			if a.unschedulable != want || len(a.notes) != notes {
				t.Errorf("after the release of %q: unschedulable %v, annotations %v; want %v, %d", change, a.unschedulable, a.notes, want, notes)
			}
		})
	}
	release("other", true, 1)
	empty("later")
	release("later", false, 0)
	release("later", false, 0)
	a.look(func() { a.unschedulable = true }) // by a person
	empty("third")
	release("third", true, 0)
	if r, err := c.Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "no-node", Change: "x"}); err != nil || len(r.GetLeft()) > 0 {
		t.Errorf("a machine that is no node of Kubernetes: %v, %v", r, err)
	}
}

// What is not known is no empty node.
func TestDrainErrors(t *testing.T) {
	a := &evictor{notes: map[string]string{}, pods: map[string]apiPod{"default/web-1": {owner: "ReplicaSet", phase: "Running"}},
		refuses: map[string][]string{"default/web-1": slices.Repeat([]string{"429 too many requests, please try again later"}, 20)}}
	c := drainSocket(t, a, uid.Etcdd)
	if _, err := c.Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: "abc"}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("an API server with too much to do: %v, want Unavailable", err)
	}
	a.look(func() { a.refuses["default/web-1"] = []string{"403 admission webhook says no"} })
	r, err := c.Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: "abc"})
	if err != nil || len(r.GetLeft()) != 1 || !strings.Contains(r.GetLeft()[0], "admission webhook says no") {
		t.Errorf("a refusal: %v, %v, want it to be told", r, err)
	}
	a.look(func() { a.down = true })
	if _, err := c.Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: "abc"}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("without an API server: %v, want Unavailable", err)
	}
	for _, bad := range []*kubernetesv1.EmptyRequest{{Change: "a"}, {Node: "w1"}, {Node: "w1", Change: "a b"}, {Node: strings.Repeat("x", 300), Change: "a"}} {
		if _, err := c.Empty(t.Context(), bad); !errs.Is(err, errs.Invalid) {
			t.Errorf("%v: %v, want Invalid", bad, err)
		}
	}
	for _, who := range []uid.ID{uid.Apid, uid.Trustd} {
		if _, err := drainSocket(t, a, who).Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: "abc"}, grpc.WaitForReady(false)); err == nil {
			t.Errorf("%s drains a node", who.Name())
		}
	}
	if r, err := drainSocket(t, nil, uid.Etcdd).Empty(t.Context(), &kubernetesv1.EmptyRequest{Node: "w1", Change: "abc"}); err != nil || len(r.GetLeft()) > 0 {
		t.Errorf("in an image without Kubernetes: %v, %v, want nothing to do", r, err)
	}
}
