package rolling

import (
	"strings"
	"testing"
	"time"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

func start() *clusterv1.StartRequest {
	return &clusterv1.StartRequest{Kind: reboot, DrainTimeoutSeconds: 60, NodeTimeoutSeconds: 120}
}

// rounds takes some.
func (w *world) rounds(n int) {
	for range n {
		w.round(nil)
	}
}

// A node that stays unhealthy halts the change: no other one goes, until somebody mended it and resumes.
func TestHaltsAndResumes(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	w.node("n2").broken = true
	w.order(start())
	w.rounds(20) // not ready before: it waits, and does not restart what is not well
	if r := w.record(); w.reboots() != "n1:0 n2:0 n3:0 w1:0" || r.Phase != running || !strings.Contains(r.Nodes[0].Why, "waits: n2 is not ready: kubelet.up") {
		t.Fatalf("with a control plane that is not ready: %s, %+v", w.reboots(), r)
	}
	w.node("n2").broken = false
	for w.node("n2").reboots == 0 {
		w.round(nil)
	}
	w.node("n2").broken = true
	r := w.until(halted, nil)
	if !strings.Contains(r.Why, "n2: it is back, but within 2m0s was not as it should be: it is not ready: kubelet.up: waiting") {
		t.Errorf("why: %s", r.Why)
	}
	before := w.reboots()
	w.rounds(100)
	if after := w.reboots(); after != before {
		t.Errorf("halted, and nodes restart: %s, then %s", before, after)
	}
	if _, err := w.server().Start(t.Context(), start()); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), r.ID) || !strings.Contains(errs.Text(err), "halted at n2") {
		t.Errorf("another one while one has halted: %v, want the first to be named", err)
	}
	w.node("n2").broken = false
	if _, err := w.server().Resume(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.until(done, nil)
	if got := w.reboots(); got != "n1:1 n2:1 n3:1 w1:1" {
		t.Errorf("restarts: %s, want one of each: what was done is not done again", got)
	}
	if _, err := w.server().Resume(t.Context(), nil); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), r.ID) {
		t.Errorf("resume what is done: %v", err)
	}
}

// A node that never comes back halts it too, however often the coordinator changes; its time begins anew with each, and ends.
func TestNeverBack(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	w.order(start())
	for w.node("w1").reboots == 0 {
		w.round(nil)
	}
	w.node("w1").away = 1 << 30
	w.rounds(60)
	for _, m := range w.nodes {
		if m.coordinator != nil && m.coordinator.renewed.IsZero() == false {
			w.boot(m) // its etcdd restarts
		}
	}
	r := w.until(halted, nil)
	if !strings.Contains(r.Why, "w1: it was told to restart, and within 2m0s has not reported from another boot") {
		t.Errorf("why: %s", r.Why)
	}
	// Ended for good, orders are void: should it come back as it was, it does not restart.
	if _, err := w.server().Abort(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if st, err := w.server().GetStatus(t.Context(), nil); err != nil || st.GetState() != "aborted" || st.GetEnded() == nil {
		t.Errorf("after the abort: %v, %v", st, err)
	}
	w.node("w1").away, w.node("w1").boot = 0, w.node("w1").boot-1
	w.rounds(20)
	if got := w.reboots(); got != "n1:1 n2:1 n3:1 w1:1" {
		t.Errorf("restarts: %s", got)
	}
	if _, err := w.server().Start(t.Context(), start()); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// Aborted while a node restarts, it waits for that one, and takes no other; at once before.
func TestAbort(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	w.order(start())
	for w.node("n2").reboots == 0 {
		w.round(nil)
	}
	if r, err := w.server().Abort(t.Context(), nil); err != nil || r.GetStatus().GetState() != "aborting" {
		t.Fatalf("abort: %v, %v", r, err)
	}
	if _, err := w.server().Start(t.Context(), start()); !errs.Is(err, errs.Precondition) {
		t.Errorf("another one while a node restarts still: %v", err)
	}
	if _, err := w.server().Abort(t.Context(), nil); err != nil {
		t.Errorf("again: %v", err)
	}
	r := w.until(aborted, nil)
	if got := w.reboots(); got != "n1:0 n2:1 n3:0 w1:0" && got != "n1:0 n2:1 n3:1 w1:0" || len(w.kube.cordoned) > 0 {
		t.Errorf("restarts: %s, cordoned: %v", got, w.kube.cordoned)
	}
	if s := r.Nodes[0].Step; s != finished {
		t.Errorf("the node that restarted: %s, want done", s)
	}
	// While it drains, the drain is taken back.
	w.kube.left = map[string][]string{"n2": {"default/web-1"}}
	w.order(start())
	w.rounds(5)
	if w.kube.cordoned["n2"] == "" {
		t.Fatal("it does not drain")
	}
	if _, err := w.server().Abort(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.until(aborted, nil)
	if len(w.kube.cordoned) > 0 {
		t.Errorf("cordoned after the abort: %v", w.kube.cordoned)
	}
}

// Pods that do not go: halt, or force, as was ordered.
func TestDrainTimeout(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	w.kube.left = map[string][]string{"w1": {"default/db-0", "default/db-1"}}
	w.order(start())
	r := w.until(halted, nil)
	if want := "w1: not drained within 1m0s: 2 pods are left: default/db-0, default/db-1"; r.Why != want {
		t.Errorf("why: %q, want %q", r.Why, want)
	}
	if got := w.reboots(); got != "n1:1 n2:1 n3:1 w1:0" || len(w.kube.cordoned) > 0 {
		t.Errorf("restarts: %s, cordoned: %v; want w1 as it was", got, w.kube.cordoned)
	}
	// The API server does not answer: that is no empty node.
	w.kube.left, w.kube.err = nil, errs.New(errs.Unavailable, "the API server does not answer")
	if _, err := w.server().Resume(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if r = w.until(halted, nil); !strings.Contains(r.Why, "the API server does not answer") || w.node("w1").reboots != 0 {
		t.Errorf("without an API server: %q, restarts %s", r.Why, w.reboots())
	}
	if _, err := w.server().Abort(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.kube.err, w.kube.left = nil, map[string][]string{"w1": {"default/db-0"}}
	q := start()
	q.OnTimeout, q.Nodes = "force", []string{"w1"}
	w.order(q)
	w.until(done, nil)
	if got := w.reboots(); got != "n1:1 n2:1 n3:1 w1:1" {
		t.Errorf("restarts: %s, want w1 to restart all the same, and no other", got)
	}
}

// An upgrade restarts into what lies ready, and halts at a node that falls back, or has something else ready.
func TestUpgrade(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	for _, m := range w.nodes {
		m.next, m.trial = "2", false
	}
	w.node("n1").version, w.node("n1").next = "2", "" // it has it already
	w.node("w1").next = "7"
	w.order(&clusterv1.StartRequest{Kind: upgrade, Version: "2", NodeTimeoutSeconds: 120})
	for w.node("n2").reboots == 0 {
		w.round(nil)
	}
	w.node("n2").trial = true
	w.rounds(30)
	if r := w.record(); w.reboots() != "n1:0 n2:1 n3:0 w1:0" || !strings.Contains(r.Nodes[0].Why, "2 has not been found good yet") && !strings.Contains(r.Nodes[1].Why, "2 has not been found good yet") {
		t.Errorf("on trial: %s, %+v", w.reboots(), r.Nodes)
	}
	if n := w.node("n2").witnessed; n < 10 || w.node("n3").witnessed > 0 {
		t.Errorf("its API was called %d times while it has to prove that it can be", n)
	}
	w.node("n2").trial = false
	for w.node("n3").reboots == 0 {
		w.round(nil)
	}
	w.node("n3").version = "1" // tried, and left
	r := w.until(halted, nil)
	if !strings.Contains(r.Why, "n3: it fell back: it runs 1; bhctl -n n3 why says what was wrong with 2") {
		t.Errorf("why: %s", r.Why)
	}
	w.node("n3").next = "2"
	if _, err := w.server().Resume(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if r = w.until(halted, nil); !strings.Contains(r.Why, "w1: 2 does not lie ready on it, 7 does") {
		t.Errorf("why: %s", r.Why)
	}
	w.node("w1").next = "2"
	if _, err := w.server().Resume(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.until(done, nil)
	if got := w.reboots(); got != "n1:0 n2:1 n3:2 w1:1" {
		t.Errorf("restarts: %s", got)
	}
}

// A plain restart does not try a version by the way.
func TestRebootWithVersionReady(t *testing.T) {
	w := newWorld(t, startEtcd(t))
	w.node("n3").next = "2"
	w.order(start())
	r := w.until(halted, nil)
	if !strings.Contains(r.Why, "n3: 2 lies ready on it, and a restart would try it") || !strings.Contains(r.Why, "bhctl -n n3 rollback") || w.reboots() != "n1:0 n2:1 n3:0 w1:0" {
		t.Errorf("%q, restarts %s", r.Why, w.reboots())
	}
}

// A frozen or late word restarts nothing: it is for one boot, and only while the record says so.
func TestOrderFor(t *testing.T) {
	const value = `{"id":"a","kind":"reboot","by":"alice","phase":"%","nodes":[{"name":"n1","step":"done","boot":"b1"},{"name":"n2","step":"restarting","boot":"b2"},{"name":"n3","step":"pending"},{"name":"n4","step":"pending"}]}`
	for _, c := range []struct {
		phase, name, boot string
		want, soon        bool
	}{
		{"running", "n2", "b2", true, true}, {"aborting", "n2", "b2", true, true},
		{"running", "n2", "b3", false, true}, {"running", "n2", "", false, true}, {"running", "n1", "b1", false, false}, {"running", "n3", "b2", false, true}, {"running", "n4", "b2", false, false},
		{"halted", "n2", "b2", false, false}, {"aborted", "n2", "b2", false, false}, {"done", "n2", "b2", false, false},
	} {
		o, soon := OrderFor([]byte(strings.Replace(value, "%", c.phase, 1)), &clusterv1.Node{Name: c.name, BootId: c.boot})
		if (o != nil) != c.want || soon != c.soon {
			t.Errorf("%+v: %v, soon %v", c, o, soon)
		}
	}
	for _, bad := range []string{"", "{", "[]"} {
		if o, soon := OrderFor([]byte(bad), &clusterv1.Node{}); o != nil || soon {
			t.Errorf("%q: %v, %v", bad, o, soon)
		}
	}
}

// Expected is of all of it, if the others take as long as those before.
func TestStatus(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(1000+s), 0) }
	r := record{ID: "a", Kind: reboot, Phase: running, Began: at(0), Nodes: []turn{
		{Name: "n1", Step: finished, Draining: at(0), Ended: at(60)}, {Name: "n2", Step: settling, Draining: at(60)}, {Name: "n3", Step: pending}, {Name: "n4", Step: skipped}}}
	st := status(seen{record: r, holder: "n3"}, at(90))
	if st.GetElapsedSeconds() != 90 || st.GetExpectedSeconds() != 180 || st.GetCoordinator() != "n3" || st.GetOnTimeout() != "halt" || st.GetEnded() != nil {
		t.Errorf("%v", st)
	}
}
