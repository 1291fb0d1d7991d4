package rolling

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Bounds of an order. A record with all of them fits into one value of etcd.
const (
	maxNodes     = 4096
	maxTimeout   = 24 * time.Hour
	maxVersion   = 128 // bytes
	standardPods = 5 * time.Minute
)

// standardNode is how long a node may take.
var standardNode = map[string]time.Duration{reboot: 15 * time.Minute, upgrade: time.Hour}

// Server takes orders for a coordinator.
type Server struct {
	clusterv1.UnimplementedRollingServer
	C *Coordinator
}

// parse checks what was ordered.
func parse(q *clusterv1.StartRequest) (record, error) {
	r := record{Kind: q.GetKind(), Version: q.GetVersion(), Force: q.GetOnTimeout() == "force",
		DrainTimeout: standardPods, NodeTimeout: standardNode[q.GetKind()]}
	switch {
	case r.NodeTimeout == 0:
		return r, errs.New(errs.Invalid, `kind: %.64q; allowed are "reboot" and "upgrade"`, q.GetKind())
	case (r.Kind == upgrade) != (r.Version != ""):
		return r, errs.New(errs.Invalid, `version: %.64q; "upgrade" needs one, and "reboot" has none`, q.GetVersion())
	case len(r.Version) > maxVersion:
		return r, errs.New(errs.Invalid, "version: %d bytes; at most %d are allowed", len(r.Version), maxVersion)
	case q.GetOnTimeout() != "" && q.GetOnTimeout() != "halt" && q.GetOnTimeout() != "force":
		return r, errs.New(errs.Invalid, `on_timeout: %.64q; allowed are "halt" and "force"`, q.GetOnTimeout())
	case len(q.GetNodes()) > maxNodes:
		return r, errs.New(errs.Invalid, "nodes: %d; at most %d are allowed", len(q.GetNodes()), maxNodes)
	}
	for _, f := range []struct {
		name string
		got  uint64
		into *time.Duration
	}{{"drain_timeout_seconds", q.GetDrainTimeoutSeconds(), &r.DrainTimeout}, {"node_timeout_seconds", q.GetNodeTimeoutSeconds(), &r.NodeTimeout}} {
		if f.got > uint64(maxTimeout/time.Second) {
			return r, errs.New(errs.Invalid, "%s: %d; at most %d are allowed", f.name, f.got, maxTimeout/time.Second)
		}
		if f.got > 0 {
			*f.into = time.Duration(f.got) * time.Second
		}
	}
	return r, nil
}

// pick returns the nodes that are named, or all.
func pick(all []*clusterv1.Node, names []string) ([]*clusterv1.Node, error) {
	if len(names) == 0 {
		names = nil
		for _, n := range all {
			names = append(names, n.GetName())
		}
	}
	var out []*clusterv1.Node
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		i := slices.IndexFunc(all, func(n *clusterv1.Node) bool { return n.GetName() == name })
		if i < 0 {
			var have []string
			for _, n := range all[:min(len(all), 16)] {
				have = append(have, n.GetName())
			}
			return nil, errs.New(errs.NotFound, "no node %.64q is registered; there are: %s", name, strings.Join(have, ", "))
		}
		out = append(out, all[i])
	}
	if len(out) == 0 || len(out) > maxNodes {
		return nil, errs.New(errs.Precondition, "%d nodes are registered; allowed are 1 to %d", len(out), maxNodes)
	}
	return out, nil
}

// Start makes the record. Whether the cluster can spare a node is looked at before each, and so not now.
func (s *Server) Start(ctx context.Context, q *clusterv1.StartRequest) (*clusterv1.StartResponse, error) {
	r, err := parse(q)
	if err != nil {
		return nil, err
	}
	all, err := s.C.cfg.Nodes()
	if err != nil {
		return nil, err
	}
	nodes, err := pick(all, q.GetNodes())
	if err != nil {
		return nil, err
	}
	leader, _ := s.C.cfg.Voters(ctx) // only the order depends on it
	r.By = peer.CallerFrom(ctx).Name
	st, err := s.C.change(ctx, func(old record) (record, error) {
		if old.ID != "" && !old.over() {
			return old, errs.New(errs.Precondition, "%s, is %s; one at a time. See it with bhctl rolling status, end it with bhctl rolling abort%s", old, phaseText(old), resumeHint(old))
		}
		return begin(r, nodes, leader, s.C.cfg.Now()), nil
	})
	return &clusterv1.StartResponse{Status: st}, err
}

func phaseText(r record) string {
	if r.Phase == halted {
		return "halted at " + r.Why
	}
	return string(r.Phase)
}

func resumeHint(r record) string {
	if r.Phase == halted {
		return ", or go on with it: bhctl rolling resume"
	}
	return ""
}

// Resume goes on.
func (s *Server) Resume(ctx context.Context, _ *clusterv1.ResumeRequest) (*clusterv1.ResumeResponse, error) {
	st, err := s.C.change(ctx, func(r record) (record, error) {
		if r.Phase != halted {
			return r, errs.New(errs.Precondition, "nothing has halted: %s", told(r))
		}
		r.resume()
		return r, nil
	})
	return &clusterv1.ResumeResponse{Status: st}, err
}

// Abort ends it.
func (s *Server) Abort(ctx context.Context, _ *clusterv1.AbortRequest) (*clusterv1.AbortResponse, error) {
	st, err := s.C.change(ctx, func(r record) (record, error) {
		switch {
		case r.Phase == aborting:
			return r, errOver
		case r.ID == "" || r.over():
			return r, errs.New(errs.Precondition, "there is nothing to abort: %s", told(r))
		}
		r.abort(s.C.cfg.Now())
		return r, nil
	})
	return &clusterv1.AbortResponse{Status: st}, err
}

func told(r record) string {
	if r.ID == "" {
		return "no rolling change was ever ordered"
	}
	return r.String() + ", is " + string(r.Phase)
}

// errOver: it is so already.
var errOver = errors.New("it is so already")

// changeTries bounds how often a person's order is tried again because a coordinator changed the record at the same moment.
const changeTries = 8

// change applies f to the record.
func (c *Coordinator) change(ctx context.Context, f func(record) (record, error)) (*clusterv1.RollingStatus, error) {
	for try := 1; ; try++ {
		st, err := c.read(ctx)
		if err != nil {
			return nil, err
		}
		next, err := f(st.record.clone())
		if errors.Is(err, errOver) {
			return status(seen{record: st.record, holder: st.lease.Holder}, c.cfg.Now()), nil
		}
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(next)
		if err != nil {
			return nil, err
		}
		err = c.commit(ctx, st, false, clientv3.OpPut(Current, string(value)))
		if err == nil {
			c.cfg.Log.Info("rolling change "+string(next.Phase), "step", next.String())
			return status(seen{record: next, holder: st.lease.Holder}, c.cfg.Now()), nil
		}
		if !errs.Is(err, errs.Conflict) || try == changeTries {
			return nil, err
		}
	}
}

// GetStatus reads now.
func (s *Server) GetStatus(ctx context.Context, _ *clusterv1.GetStatusRequest) (*clusterv1.RollingStatus, error) {
	st, err := s.C.read(ctx)
	if err != nil {
		return nil, err
	}
	return status(seen{record: st.record, holder: st.lease.Holder}, s.C.cfg.Now()), nil
}

// WatchStatus follows.
func (s *Server) WatchStatus(_ *clusterv1.WatchStatusRequest, out grpc.ServerStreamingServer[clusterv1.RollingStatus]) error {
	type key struct {
		revision uint64
		holder   string
	}
	var last key
	first := true
	return s.C.cell.Watch(out.Context(), func(now seen) error {
		if now.err != nil {
			return now.err
		}
		if k := (key{now.revision, now.holder}); first || k != last { // a sign of life alone is none
			first, last = false, k
			return out.Send(status(now, s.C.cfg.Now()))
		}
		return nil
	})
}

// status puts a record into the API's words. It is pure.
func status(now seen, at time.Time) *clusterv1.RollingStatus {
	r := now.record
	if r.ID == "" {
		return &clusterv1.RollingStatus{State: "none"}
	}
	out := &clusterv1.RollingStatus{Id: r.ID, Kind: r.Kind, Version: r.Version, State: string(r.Phase), Detail: r.Why, OrderedBy: r.By, Began: stamp(r.Began), Ended: stamp(r.Ended),
		OnTimeout: "halt", DrainTimeoutSeconds: uint64(r.DrainTimeout / time.Second), NodeTimeoutSeconds: uint64(r.NodeTimeout / time.Second)}
	if r.Force {
		out.OnTimeout = "force"
	}
	if r.active() {
		out.Coordinator = now.holder
	}
	if !r.Ended.IsZero() {
		at = r.Ended
	}
	elapsed := max(0, at.Sub(r.Began))
	out.ElapsedSeconds = uint64(elapsed / time.Second)
	var took time.Duration
	var over, left int
	for _, t := range r.Nodes {
		out.Nodes = append(out.Nodes, &clusterv1.RollingNode{Name: t.Name, Role: t.Role, State: string(t.Step), Detail: t.Why, BootId: t.Boot,
			Draining: stamp(t.Draining), Restarting: stamp(t.Restarting), Settling: stamp(t.Settling), Ended: stamp(t.Ended)})
		switch t.Step {
		case finished:
			over++
			took += max(0, t.Ended.Sub(t.Draining))
		case skipped:
		default:
			left++
		}
	}
	if over > 0 {
		out.ExpectedSeconds = max(out.ElapsedSeconds, uint64((took+took/time.Duration(over)*time.Duration(left))/time.Second))
	}
	return out
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
