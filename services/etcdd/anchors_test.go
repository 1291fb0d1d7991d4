package etcdd

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

func head(chain string, n uint64, digit string) *clusterv1.AuditHead {
	return &clusterv1.AuditHead{Chain: chain, Sequence: n, Hash: strings.Repeat(digit, 64)}
}

func last(h *clusterv1.AuditHead) *clusterv1.AuditHead { h.Last = true; return h }

func TestRemembered(t *testing.T) {
	now := time.Unix(1e9, 0)
	have := []anchored{{"a", 5, strings.Repeat("0", 64), now.Add(-time.Hour)}, {"b", 9, strings.Repeat("1", 64), now.Add(-5 * time.Minute)}}
	for _, c := range []struct {
		name  string
		have  []anchored
		h     *clusterv1.AuditHead
		after time.Duration
		next  int
		wrong string
	}{
		{"nothing told", have, nil, time.Hour, 0, ""},
		{"the first one", nil, head("a", 1, "1"), 0, 1, ""},
		{"soon after", have, head("b", 10, "2"), 0, 0, ""},
		{"later", have, head("b", 10, "2"), 5 * time.Minute, 3, ""},
		{"at the end", have, last(head("b", 10, "2")), 0, 3, ""},
		{"at the end, in a loop", have, last(head("b", 10, "2")), -5 * time.Minute, 0, ""},
		{"the same", have, head("b", 9, "1"), time.Hour, 0, ""},
		{"began anew", have, head("c", 1, "2"), time.Hour, 3, ""},
		{"shorter", have, head("b", 8, "1"), time.Hour, 0, "went back: it had record 9 at"},
		{"another one", have, head("b", 9, "2"), time.Hour, 0, "rewritten: its record 9"},
		{"an older log comes back, shorter", have, head("a", 4, "2"), time.Hour, 0, "went back: it had record 5"},
	} {
		next, wrong := remembered(c.have, c.h, now.Add(c.after))
		if len(next) != c.next || !strings.Contains(wrong, c.wrong) || (wrong == "") != (c.wrong == "") {
			t.Errorf("%s: %d anchors, %q; want %d, %q", c.name, len(next), wrong, c.next, c.wrong)
		}
	}
	var all []anchored
	for i := range uint64(1000) {
		now = now.Add(anchorPause)
		all, _ = remembered(all, head("a", i+1, "1"), now)
	}
	if len(all) > maxAnchors || all[0].Sequence != 1 || all[len(all)-1].Sequence != 1000 {
		t.Errorf("%d anchors, from %d to %d", len(all), all[0].Sequence, all[len(all)-1].Sequence)
	}
}

// auditAnchors: what a node said once of its audit log stays, and a log that has gone back is told to everybody.
func auditAnchors(ctx context.Context, t *testing.T, c clusterv1.RegistryClient, worker context.Context, skew *atomic.Int64, w *watcher) {
	say := func(h *clusterv1.AuditHead) {
		t.Helper()
		r := report("w1", "worker", "ready", "a")
		r.Node.Audit = h
		resp, err := c.Report(worker, r)
		if err != nil {
			t.Fatal(err)
		}
		if off := time.Until(resp.GetClock().AsTime()) - time.Duration(skew.Load()); off.Abs() > time.Minute {
			t.Errorf("the clock of the answer is %s off", off)
		}
	}
	anchors := func() string {
		t.Helper()
		r, err := c.ListAuditAnchors(ctx, &clusterv1.ListAuditAnchorsRequest{Name: "w1"})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, a := range r.GetAnchors() {
			out = append(out, fmt.Sprintf("%s/%d/%.2s", a.GetHead().GetChain(), a.GetHead().GetSequence(), a.GetHead().GetHash()))
		}
		return strings.Join(out, " ")
	}
	if _, err := c.ListAuditAnchors(ctx, &clusterv1.ListAuditAnchorsRequest{Name: "w1"}); !errs.Is(err, errs.NotFound) {
		t.Errorf("before a word: %v", err)
	}
	if _, err := c.ListAuditAnchors(ctx, &clusterv1.ListAuditAnchorsRequest{}); !errs.Is(err, errs.Invalid) {
		t.Errorf("of no node: %v", err)
	}
	bad := report("w1", "worker", "ready", "a")
	bad.Node.Audit = &clusterv1.AuditHead{Chain: "x", Sequence: 1, Hash: "zz"}
	if _, err := c.Report(worker, bad); !errs.Is(err, errs.Invalid) || !strings.Contains(err.Error(), "64 hexadecimal digits") {
		t.Errorf("a hash that is none: %v", err)
	}
	say(head("x", 7, "1"))
	say(head("x", 8, "2"))
	if got := anchors(); got != "x/7/11" {
		t.Errorf("anchors %q", got)
	}
	back := skew.Load()
	skew.Add(int64(anchorPause))
	say(head("x", 20, "3"))
	skew.Add(int64(2 * lastPause))
	say(last(head("x", 21, "4")))
	if got := anchors(); got != "x/7/11 x/20/33 x/21/44" {
		t.Errorf("anchors %q", got)
	}
	say(head("x", 12, "5"))
	l := w.until("n1 controlplane lost 192.0.2.1; w1 worker not ready 192.0.2.1")
	if d := l.GetNodes()[1].GetDetail(); !strings.Contains(d, "the audit log went back: it had record 21") {
		t.Errorf("detail is %q", d)
	}
	if got := anchors(); got != "x/7/11 x/20/33 x/21/44" {
		t.Errorf("anchors after a log that went back: %q", got)
	}
	say(head("x", 21, "4"))
	skew.Store(back)
	w.until("n1 controlplane not ready 192.0.2.1; w1 worker ready 192.0.2.1")
}
