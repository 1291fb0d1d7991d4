package apid

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// Reports that fail alike, as during a boot, are one line on each node and then a number; and one report that fails does not become many on its way.
func TestFailedReports(t *testing.T) {
	t.Parallel() // it waits for repetitions
	c := newCluster(t, "cp1", "w1")
	etcd := c.registries()["cp1"]
	w1, cp1 := c.nodes["w1"], c.nodes["cp1"]
	report := func() error {
		_, err := clusterv1.NewRegistryClient(w1.as(uid.Machined)).Report(with(w1.ctx(), peer.NodeKey, peer.ControlPlanes), &clusterv1.ReportRequest{}, grpc.WaitForReady(false))
		return err
	}
	lines := func(n *node, code string) (out []string) {
		for _, l := range n.audits() {
			if strings.Contains(l, "Registry/Report") && strings.Contains(l, "code="+code) {
				out = append(out, l)
			}
		}
		return out
	}
	etcd.away.Store(true)
	says(t, "the register is away", report(), codes.Unavailable, "no quorum")
	if got := etcd.calls.Load(); got > 5 {
		t.Errorf("one report became %d", got)
	}
	for range 2 {
		says(t, "the register is away", report(), codes.Unavailable, "no quorum")
	}
	for _, node := range []*node{w1, cp1} {
		if got := lines(node, "Unavailable"); len(got) != 1 {
			t.Errorf("a run: %q, want one line", got)
		}
	}
	etcd.away.Store(false)
	for range 2 {
		w1.must(report())
	}
	for _, node := range []*node{w1, cp1} {
		if got := lines(node, "OK"); len(got) != 1 || !strings.HasSuffix(got[0], "repeated=2") {
			t.Errorf("after the run: %q, want one line with two more failures", got)
		}
	}
	etcd.away.Store(true)
	says(t, "away again", report(), codes.Unavailable, "no quorum")
	if got := lines(cp1, "Unavailable"); len(got) != 2 {
		t.Errorf("the next run: %q, want a line of its own", got)
	}
}

// A run that goes on is told again in time, another outcome at once, and strangers with many names fill no memory.
func TestRuns(t *testing.T) {
	now := time.Unix(1e9, 0)
	a := newAuditor(nil, func() time.Time { return now }, figures{})
	by := func(name, address string) *call {
		return &call{who: identity{name: name}, peer: address}
	}
	news := func(c *call, code codes.Code) string {
		more, is := a.news(c, "", code)
		return fmt.Sprint(is, more)
	}
	for i, x := range []struct {
		call  *call
		code  codes.Code
		after time.Duration
		want  string
	}{
		{by("w1", "10.0.0.1:5"), codes.OK, 0, "false 0"},
		{by("w1", "10.0.0.1:5"), codes.Unavailable, 0, "true 0"},
		{by("w1", "10.0.0.1:6"), codes.Unavailable, time.Second, "false 0"}, // another connection
		{by("w2", "10.0.0.1:5"), codes.Unavailable, 0, "true 0"},
		{by("w1", "10.0.0.2:5"), codes.Unavailable, 0, "true 0"}, // who says so is elsewhere
		{by("w1", "10.0.0.1:5"), codes.PermissionDenied, 0, "true 1"},
		{by("w1", "10.0.0.1:5"), codes.PermissionDenied, time.Minute, "false 0"},
		{by("w1", "10.0.0.1:5"), codes.PermissionDenied, runTime, "true 1"},
		{by("w1", "10.0.0.1:5"), codes.OK, 0, "false 0"},
	} {
		now = now.Add(x.after)
		if got := news(x.call, x.code); got != x.want {
			t.Errorf("%d: %s, want %s", i, got, x.want)
		}
	}
	for i := range 2 * maxRuns {
		if got := news(by("", fmt.Sprintf("10.1.%d.%d:1", i/256, i%256)), codes.Unauthenticated); got != "true 0" {
			t.Fatalf("stranger %d: %s", i, got)
		}
	}
	if len(a.runs) > maxRuns {
		t.Errorf("%d runs are remembered", len(a.runs))
	}
	now = now.Add(runTime)
	news(by("w3", "10.0.0.3:1"), codes.Unavailable)
	if len(a.runs) != 1 {
		t.Errorf("%d runs are remembered after they were over, want 1", len(a.runs))
	}
}
