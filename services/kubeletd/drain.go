package kubeletd

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Bounds of emptying a node.
const (
	maxNodeName = 253
	maxChange   = 63
	maxLeft     = 100 // pods that an answer names
	maxEvict    = 64  // evictions in one call; who calls calls again
	podsPage    = 250 // of one list
)

// changeKey is the annotation that says for which rolling change a node was made unschedulable.
const changeKey = "bulkhead.dev/rolling-change"

// callers are those besides apid.
var callers = peer.List{
	kubernetesv1.Drain_ServiceDesc.ServiceName: {uid.Etcdd}, // before a node restarts
}

// Callers is who may call what, besides apid and machined's Control: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers }

// drainServer is kubernetes.v1.Drain.
type drainServer struct {
	kubernetesv1.UnimplementedDrainServer
	program string // whose absence means that the image has no Kubernetes
	// admin makes a client that may evict any pod: kubeletd's own identity may not.
	admin func(context.Context) (*cluster, error)

	mu    sync.Mutex
	api   *cluster  // guarded by mu; nil: none was made
	until time.Time // guarded by mu; when api is too old
}

func newDrainServer(d *Daemon) *drainServer {
	return &drainServer{program: d.cfg.Program, admin: func(ctx context.Context) (*cluster, error) { return d.kernel.admin(ctx) }}
}

// client returns one whose certificate is good for this call; one for each call would be thousands.
func (s *drainServer) client(ctx context.Context) (*cluster, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.api != nil && time.Now().Before(s.until) {
		return s.api, nil
	}
	c, err := s.admin(ctx)
	if err != nil {
		return nil, err
	}
	if s.api != nil {
		s.api.close()
	}
	s.api, s.until = c, time.Now().Add(adminLife/2)
	return c, nil
}

// check looks at what came in. absent: there is no Kubernetes, and nothing to do.
func (s *drainServer) check(node, change string) (absent bool, err error) {
	letters := func(r rune) bool { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' }
	switch {
	case node == "" || len(node) > maxNodeName:
		return false, errs.New(errs.Invalid, "node: %d bytes; allowed are 1 to %d", len(node), maxNodeName)
	case change == "" || len(change) > maxChange || slices.ContainsFunc([]rune(change), func(r rune) bool { return !letters(r) }):
		return false, errs.New(errs.Invalid, "change: %.64q; allowed are 1 to %d letters and digits", change, maxChange)
	}
	_, err = os.Stat(s.program)
	return errors.Is(err, fs.ErrNotExist), nil
}

// Empty does what can be done now.
func (s *drainServer) Empty(ctx context.Context, r *kubernetesv1.EmptyRequest) (*kubernetesv1.EmptyResponse, error) {
	absent, err := s.check(r.GetNode(), r.GetChange())
	if err != nil || absent {
		return &kubernetesv1.EmptyResponse{}, err
	}
	c, err := s.client(ctx)
	if err != nil {
		return nil, err
	}
	n, err := c.nodeMark(ctx, r.GetNode())
	if errs.Is(err, errs.NotFound) { // a machine that is no node of Kubernetes has no pods
		return &kubernetesv1.EmptyResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	switch mine := n.Metadata.Annotations[changeKey]; {
	case n.Spec.Unschedulable && mine == r.GetChange(): // done already
	case n.Spec.Unschedulable && mine == "": // a person's doing: it stays so afterwards
	default: // also what an earlier change left behind
		if err := c.mark(ctx, n, true, r.GetChange()); err != nil {
			return nil, err
		}
	}
	left, err := c.evictAll(ctx, r.GetNode())
	return &kubernetesv1.EmptyResponse{Left: left[:min(len(left), maxLeft)]}, err
}

// Release takes it back.
func (s *drainServer) Release(ctx context.Context, r *kubernetesv1.ReleaseRequest) (*kubernetesv1.ReleaseResponse, error) {
	absent, err := s.check(r.GetNode(), r.GetChange())
	if err != nil || absent {
		return &kubernetesv1.ReleaseResponse{}, err
	}
	c, err := s.client(ctx)
	if err != nil {
		return nil, err
	}
	n, err := c.nodeMark(ctx, r.GetNode())
	if errs.Is(err, errs.NotFound) || err == nil && n.Metadata.Annotations[changeKey] != r.GetChange() {
		return &kubernetesv1.ReleaseResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &kubernetesv1.ReleaseResponse{}, c.mark(ctx, n, false, "")
}

// nodeMark is of a Node what says whether pods may come to it.
type nodeMark struct {
	Metadata struct {
		Name, ResourceVersion string
		Annotations           map[string]string
	}
	Spec struct{ Unschedulable bool }
}

func (c *cluster) nodeMark(ctx context.Context, name string) (nodeMark, error) {
	var n nodeMark
	err := c.do(ctx, request{method: http.MethodGet, path: nodePath(name)}, &n)
	n.Metadata.Name = name
	return n, err
}

// mark changes it, unless somebody else changed the Node since it was read: then it is a CONFLICT, and looked at again.
func (c *cluster) mark(ctx context.Context, n nodeMark, unschedulable bool, change string) error {
	var note any // null removes it
	if change != "" {
		note = change
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": n.Metadata.ResourceVersion, "annotations": map[string]any{changeKey: note}},
		"spec":     map[string]any{"unschedulable": unschedulable},
	})
	if err != nil {
		return err
	}
	return c.do(ctx, request{method: http.MethodPatch, path: nodePath(n.Metadata.Name), content: "application/merge-patch+json", body: body}, nil)
}

// pod is of a Pod what decides whether it has to go.
type pod struct {
	Metadata struct {
		Namespace, Name, UID string
		Annotations          map[string]string
		DeletionTimestamp    string
		OwnerReferences      []struct {
			Kind       string
			Controller bool
		}
	}
	Status struct{ Phase string }
}

func (p pod) String() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

// stays reports whether a pod is left where it is: what a DaemonSet or a file of the node makes is there again at once, what nothing makes again would be lost for ever,
// and what has ended runs no more.
func (p pod) stays() bool {
	if p.Metadata.Annotations["kubernetes.io/config.mirror"] != "" || p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" {
		return true
	}
	for _, o := range p.Metadata.OwnerReferences {
		if o.Controller {
			return o.Kind == "DaemonSet" || o.Kind == "Node"
		}
	}
	return true
}

// pods returns those of a node that have to go.
func (c *cluster) pods(ctx context.Context, node string) ([]pod, error) {
	var out []pod
	next := ""
	for {
		var list struct {
			Metadata struct{ Continue string }
			Items    []pod
		}
		q := url.Values{"fieldSelector": {"spec.nodeName=" + node}, "limit": {strconv.Itoa(podsPage)}}
		if next != "" {
			q.Set("continue", next)
		}
		if err := c.do(ctx, request{method: http.MethodGet, path: "/api/v1/pods", query: q}, &list); err != nil {
			return nil, err
		}
		for _, p := range list.Items {
			if !p.stays() {
				out = append(out, p)
			}
		}
		if next = list.Metadata.Continue; next == "" {
			return out, nil
		}
	}
}

// evictAll asks the pods of a node to go, and returns those that are there still.
func (c *cluster) evictAll(ctx context.Context, node string) ([]string, error) {
	pods, err := c.pods(ctx, node)
	if err != nil {
		return nil, err
	}
	var left []string
	asked := 0
	for _, p := range pods {
		text := p.String()
		switch {
		case p.Metadata.DeletionTimestamp != "":
			text += " (it is going)"
		case asked < maxEvict && timeLeft(ctx):
			asked++
			switch err := c.evict(ctx, p); {
			case errs.Is(err, errs.NotFound):
				continue
			case errs.Is(err, errs.Unavailable) && !aboutBudget(err):
				return nil, err
			case err != nil: // a budget, an admission webhook, another pod of that name: it is this pod's affair
				text += " (" + short(err) + ")"
			}
		}
		left = append(left, text)
	}
	slices.Sort(left)
	return left, nil
}

// answerTime is what is kept of a call's time for the answer.
const answerTime = 2 * time.Second

// timeLeft reports whether a call has time for one more eviction.
func timeLeft(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return !ok || time.Until(deadline) > answerTime
}

// aboutBudget tells a pod's disruption budget from an API server that has too much to do: both are answered with the same code.
func aboutBudget(err error) bool {
	return strings.Contains(strings.ToLower(errs.Text(err)), "disruption")
}

// evict asks the API server to delete one pod if its disruption budgets allow that (policy/v1 Eviction).
func (c *cluster) evict(ctx context.Context, p pod) error {
	m := map[string]string{"namespace": p.Metadata.Namespace, "name": p.Metadata.Name}
	body, err := json.Marshal(map[string]any{
		"apiVersion": "policy/v1", "kind": "Eviction", "metadata": m,
		"deleteOptions": map[string]any{"preconditions": map[string]string{"uid": p.Metadata.UID}},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, apiTime)
	defer cancel()
	path := "/api/v1/namespaces/" + url.PathEscape(p.Metadata.Namespace) + "/pods/" + url.PathEscape(p.Metadata.Name) + "/eviction"
	resp, err := c.send(ctx, request{method: http.MethodPost, path: path, body: body})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}
