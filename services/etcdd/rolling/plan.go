package rolling

import (
	"fmt"
	"slices"
	"strings"
	"time"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

// sight is what a coordinator sees when it decides.
type sight struct {
	now     time.Time
	nodes   []*clusterv1.Node // the registry
	trouble string            // why etcd can spare no member now; "" if it can
	held    time.Duration     // since this coordinator first saw the record's current step

	drained  *drained // nil: not tried in this round
	released *drained // the same, of taking a drain back
}

// drained is what became of a try.
type drained struct {
	left []string // pods that are there still
	err  string
}

func (s sight) node(name string) *clusterv1.Node {
	i := slices.IndexFunc(s.nodes, func(n *clusterv1.Node) bool { return n.GetName() == name })
	if i < 0 {
		return nil
	}
	return s.nodes[i]
}

// op is what plan must have tried before it can decide.
type op int

const (
	nothing op = iota
	drain      // the current node
	release    // the current node: pods may come again
)

// releaseGrace is how much longer than a drain may take its taking back is tried before the change ends without.
const releaseGrace = time.Minute

// plan returns what the record becomes, and what is to be tried first. It is pure, and a step at a time: it never lets a second node go before the first is as it should be.
func plan(old record, s sight) (record, op) {
	r := old.clone()
	i := r.current()
	if i < 0 {
		r.end(done, s.now)
		return r, nothing
	}
	t := &r.Nodes[i]
	n := s.node(t.Name)
	switch t.Step {
	case pending, failed:
		return planPending(r, i, n, s), nothing
	case draining:
		return planDraining(r, i, n, s)
	case restarting:
		planRestarting(&r, t, n, s)
	case settling:
		return planSettling(r, i, n, s)
	}
	return r, nothing
}

func planPending(r record, i int, n *clusterv1.Node, s sight) record {
	t := &r.Nodes[i]
	if r.Phase == aborting {
		r.end(aborted, s.now)
		return r
	}
	switch {
	case n == nil:
		t.Step, t.Why, t.Ended = skipped, "it is not in the cluster any more", s.now
		return r
	case r.Kind == reboot && n.GetNextVersion() != "":
		r.halt(t, n.GetNextVersion()+" lies ready on it, and a restart would try it. Either that is wanted: bhctl upgrade --cluster; or it is cancelled: bhctl -n "+t.Name+" rollback", s.now)
		return r
	case r.Kind == upgrade && n.GetVersion() == r.Version && !n.GetTrial():
		t.Step, t.Why, t.Ended = skipped, "it runs "+r.Version+" already", s.now
		return r
	case r.Kind == upgrade && n.GetVersion() != r.Version && n.GetNextVersion() != r.Version:
		have := "nothing"
		if n.GetNextVersion() != "" {
			have = n.GetNextVersion()
		}
		r.halt(t, r.Version+" does not lie ready on it, "+have+" does; have it installed again: bhctl upgrade --cluster --image …, which goes on here", s.now)
		return r
	}
	if t.Why = unsafe(r, i, s); t.Why == "" {
		t.Step, t.Boot, t.Draining = draining, n.GetBootId(), s.now
	}
	return r
}

// unsafe says why the node may not go now; "" if it may.
func unsafe(r record, i int, s sight) string {
	if s.trouble != "" {
		return "waits: " + s.trouble
	}
	before := map[string]bool{}
	for _, t := range r.Nodes[:i+1] {
		before[t.Name] = t.Step != skipped
	}
	for _, n := range s.nodes {
		if n.GetState() == "ready" && n.GetBootId() != "" || n.GetRole() != "controlplane" && !before[n.GetName()] {
			continue
		}
		return strings.TrimSuffix(fmt.Sprintf("waits: %s is %s: %s", n.GetName(), n.GetState(), n.GetDetail()), ": ")
	}
	return ""
}

func planDraining(r record, i int, n *clusterv1.Node, s sight) (record, op) {
	t := &r.Nodes[i]
	// back lets the node's pods come again; then tells what happened.
	back := func(why string) (record, op) {
		switch {
		case s.released == nil:
			return r, release
		case s.released.err != "" && s.held < r.DrainTimeout+releaseGrace:
			t.Why = s.released.err
			return r, nothing
		case s.released.err != "":
			why += "; it could not be made schedulable again: " + s.released.err
		}
		t.Step, t.Boot, t.Draining = pending, "", time.Time{}
		if t.Why = ""; r.Phase == aborting {
			r.end(aborted, s.now)
		} else {
			r.halt(t, why, s.now)
		}
		return r, nothing
	}
	switch {
	case r.Phase == aborting:
		return back("")
	case n == nil:
		t.Step, t.Why, t.Ended = skipped, "it is not in the cluster any more", s.now
		return r, nothing
	case n.GetBootId() != t.Boot: // by other hands; who took the boot for what it would be must look again
		return back("it restarted by itself while it was drained")
	case s.drained == nil:
		return r, drain
	}
	late := s.held >= r.DrainTimeout
	why := drainText(s.drained)
	switch {
	case why != "" && !late:
		t.Why = why
		return r, nothing
	case why != "" && !r.Force:
		return back(fmt.Sprintf("not drained within %s: %s", r.DrainTimeout, why))
	}
	if wait := unsafe(r, i, s); wait != "" {
		t.Why = wait
		return r, nothing
	}
	if t.Why = ""; why != "" {
		t.Why = fmt.Sprintf("not drained within %s, and restarted all the same: %s", r.DrainTimeout, why)
	}
	t.Step, t.Restarting = restarting, s.now
	return r, nothing
}

// maxPods is how many pods a text names.
const maxPods = 4

func drainText(d *drained) string {
	switch n := len(d.left); {
	case d.err != "":
		return d.err
	case n > maxPods:
		return fmt.Sprintf("%d pods are left: %s, …", n, strings.Join(d.left[:maxPods], ", "))
	case n > 0:
		return fmt.Sprintf("%d pods are left: %s", n, strings.Join(d.left, ", "))
	}
	return ""
}

func planRestarting(r *record, t *turn, n *clusterv1.Node, s sight) {
	switch {
	case n == nil:
		r.halt(t, "it left the cluster while it restarted", s.now)
	case n.GetBootId() != t.Boot && n.GetBootId() != "":
		t.Step, t.Settling, t.Why = settling, s.now, ""
	case s.held >= r.NodeTimeout:
		r.halt(t, fmt.Sprintf("it was told to restart, and within %s has not reported from another boot", r.NodeTimeout), s.now)
	}
}

func planSettling(r record, i int, n *clusterv1.Node, s sight) (record, op) {
	t := &r.Nodes[i]
	if n == nil {
		r.halt(t, "it left the cluster while it restarted", s.now)
		return r, nothing
	}
	if r.Kind == upgrade && n.GetState() != "lost" && n.GetVersion() != r.Version {
		r.fail(t, fmt.Sprintf("it fell back: it runs %s; bhctl -n %s why says what was wrong with %s", n.GetVersion(), t.Name, r.Version), s.now)
		return r, nothing
	}
	wait := ""
	switch {
	case n.GetState() != "ready":
		wait = strings.TrimSuffix(fmt.Sprintf("it is %s: %s", n.GetState(), n.GetDetail()), ": ")
	case n.GetTrial():
		wait = n.GetVersion() + " has not been found good yet"
	case s.trouble != "":
		wait = s.trouble
	case s.released == nil:
		return r, release
	case s.released.err != "":
		wait = s.released.err
	}
	switch {
	case wait == "":
		t.Step, t.Why, t.Ended = finished, "", s.now
	case s.held >= r.NodeTimeout:
		r.halt(t, fmt.Sprintf("it is back, but within %s was not as it should be: %s", r.NodeTimeout, wait), s.now)
	default:
		t.Why = wait
	}
	return r, nothing
}

// halt stops the change where it is. Resuming looks at the same step of the same node anew.
func (r *record) halt(t *turn, why string, now time.Time) {
	t.Why = why
	if r.Phase == aborting {
		r.end(aborted, now)
	} else {
		r.Phase = halted
	}
	r.Why = t.Name + ": " + why
}

// fail is halt where the node needs another turn.
func (r *record) fail(t *turn, why string, now time.Time) {
	r.halt(t, why, now)
	t.Step, t.Ended = failed, now
}

func (r *record) end(p phase, now time.Time) { r.Phase, r.Ended = p, now }

// resume goes on with a change that has halted.
func (r *record) resume() {
	r.Phase, r.Why = running, ""
	r.Resumed++
	i := r.current()
	if i < 0 {
		return
	}
	t := &r.Nodes[i]
	if t.Why = ""; t.Step == failed {
		*t = turn{Name: t.Name, Role: t.Role, Step: pending}
	}
}

// abort ends it at the next moment at which no node is away by its order.
func (r *record) abort(now time.Time) {
	if r.Phase == halted {
		r.end(aborted, now)
		return
	}
	r.Phase = aborting
}
