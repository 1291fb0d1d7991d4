package machined

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/auditchain"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

func auditLine(who, method, code string, change bool) string {
	return fmt.Sprintf(`{"level":"INFO","msg":"audit","daemon":"apid","who":%q,"roles":"admin,reader","method":%q,"peer":"192.0.2.1:9","node":"n1","code":%q,"dur":"1ms","change":%v}`+"\n", who, method, code, change)
}

// getAudit follows the audit log until n records passed the filters.
func getAudit(t *testing.T, d *Daemon, r *machinev1.GetAuditRequest, n int) []*machinev1.AuditRecord {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r.Follow = n > 0
	var out []*machinev1.AuditRecord
	err := (&machineServer{d: d}).GetAudit(r, stream[machinev1.AuditRecord]{ctx: ctx, send: func(a *machinev1.AuditRecord) error {
		if out = append(out, a); len(out) == n {
			cancel()
		}
		return nil
	}})
	if err != nil && len(out) < n {
		t.Fatalf("%v: %d records, want %d", err, len(out), n)
	}
	return out
}

// What apid logs comes out as records: through a real pipe, with STATE that opens late, over a restart of machined, and the cluster hears of the end.
func TestAuditLog(t *testing.T) {
	n := newNode(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	n.init.pipe = func(unit string) (*os.File, error) {
		if unit != "apid" {
			return nil, os.ErrClosed
		}
		return dup(r)
	}
	d, stop := n.start()
	defer func() { stop() }()
	say := func(line string) {
		if _, err := w.WriteString(line); err != nil {
			t.Fatal(err)
		}
	}
	say(auditLine("ann", "/config.v1.Config/Apply", "OK", true) + `{"msg":"certificate signed"}` + "\n")
	err = (&machineServer{d: d}).GetAudit(&machinev1.GetAuditRequest{}, stream[machinev1.AuditRecord]{ctx: t.Context()})
	if !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "bhctl logs apid") {
		t.Errorf("before STATE is open: %v", err)
	}
	bad := &machinev1.GetAuditRequest{Since: &timestamppb.Timestamp{Nanos: -1}}
	if err := (&machineServer{d: d}).GetAudit(bad, stream[machinev1.AuditRecord]{ctx: t.Context()}); !errs.Is(err, errs.Invalid) {
		t.Errorf("a time that is none: %v", err)
	}
	n.host.mount()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.5.0.11:6443\n"); err != nil {
		t.Fatal(err)
	}
	say(auditLine("bob", "/machine.v1.Machine/Reboot", "PermissionDenied", true) + auditLine("ann", "/machine.v1.Machine/GetAudit", "OK", false))
	all := getAudit(t, d, &machinev1.GetAuditRequest{}, 4)
	if all[0].GetKind() != "start" || all[1].GetWho() != "ann" || all[1].GetMethod() != "/config.v1.Config/Apply" || !slices.Equal(all[1].GetRoles(), []string{"admin", "reader"}) || all[2].GetCode() != "PermissionDenied" || all[3].GetSequence() != 4 {
		t.Fatalf("%v", all)
	}
	for _, c := range []struct {
		name string
		r    *machinev1.GetAuditRequest
		want []uint64
	}{
		{"user", &machinev1.GetAuditRequest{User: "ann"}, []uint64{2, 4}},
		{"method", &machinev1.GetAuditRequest{Method: "Machine/Reb"}, []uint64{3}},
		{"changed", &machinev1.GetAuditRequest{Changed: true}, []uint64{2}},
		{"since", &machinev1.GetAuditRequest{Since: all[3].GetTime()}, []uint64{4}},
		{"none", &machinev1.GetAuditRequest{User: "eve"}, nil},
	} {
		var got []uint64
		for _, a := range getAudit(t, d, c.r, 0) {
			if c.name != "since" || a.GetSequence() > 3 { // those of one moment may share it
				got = append(got, a.GetSequence())
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("by %s: records %d, want %d", c.name, got, c.want)
		}
	}
	stop()
	d, stop = n.start()
	unlock, err := d.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if ready, err := d.open(); !ready || err != nil {
		t.Fatal(ready, err)
	}
	unlock()
	if got := getAudit(t, d, &machinev1.GetAuditRequest{}, 5); got[4].GetKind() != "start" || got[4].GetChain() != all[0].GetChain() {
		t.Errorf("after a restart: %v", got)
	}
	say(auditLine("ann", "/machine.v1.Machine/Reboot", "OK", true))
	getAudit(t, d, &machinev1.GetAuditRequest{User: "ann", Changed: true}, 2)
	// The machine is to go down: the cluster hears of the end of the log before, and has it as an anchor.
	if _, err := (&machineServer{d: d}).Reboot(t.Context(), &machinev1.RebootRequest{}); err != nil {
		t.Fatal(err)
	}
	told := n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetAudit().GetLast() })
	v := auditchain.Verifier{Anchors: []auditchain.Anchor{{Head: auditchain.Head{Chain: told.GetAudit().GetChain(), Sequence: told.GetAudit().GetSequence(), Hash: told.GetAudit().GetHash()}}}}
	for _, a := range getAudit(t, d, &machinev1.GetAuditRequest{}, 0) {
		v.Add([]byte(a.GetLine()))
	}
	if r := v.Report(true); r.Problems != nil || r.Anchored.Sequence != 6 {
		t.Errorf("what a client gets is not what the cluster heard of: %+v", r)
	}
}

// A folder that cannot be made costs the node its audit log, and not its API; an event says so.
func TestAuditTrouble(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	if err := os.WriteFile(filepath.Join(n.past.folder, auditFolder), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, doc("a")); err != nil {
		t.Fatal(err)
	}
	if events := strings.Join(eventTexts(t, d), "\n"); !strings.Contains(events, "the audit log cannot be written") {
		t.Errorf("no event: %s", events)
	}
}

// What the clock is compared with: the control planes', and what a daemon knows of certificates.
func TestClockCheck(t *testing.T) {
	for name, days := range map[string]int{"ten years behind": 3650, "ten years ahead": -3650} {
		t.Run(name, func(t *testing.T) { clockDiffers(t, days) })
	}
}

// clockDiffers: the control planes' clock is so many days ahead of the node's.
func clockDiffers(t *testing.T, days int) {
	n := newNode(t)
	n.host.mounted = true
	n.cluster.ahead = time.Duration(days) * 24 * time.Hour
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.5.0.11:6443\n"); err != nil {
		t.Fatal(err)
	}
	r := n.cluster.until(t, func(r *clusterv1.Node) bool { return strings.HasPrefix(r.GetDetail(), "clock: ") })
	if year := fmt.Sprint(time.Now().UTC().AddDate(0, 0, days).Year()); !strings.Contains(r.GetDetail(), "the control plane's said "+year) || r.GetState() != "not ready" {
		t.Errorf("report: %v", r)
	}
	for until := time.Now().Add(30 * time.Second); !strings.Contains(strings.Join(eventTexts(t, d), "\n"), "one of the two is wrong"); {
		if time.Now().After(until) {
			t.Fatalf("no event: %q", eventTexts(t, d))
		}
	}
}

// A node whose clock is ten years behind cannot call a control plane, whose certificates are not valid yet for it. Its own trustd knows, and it is told, once.
func TestClockBehindIsAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		trustd := n.links["trustd"]
		const trouble = "the clock says 2016-11-26T00:00:00Z; the cluster's authority is valid from 2026-11-26T00:00:00Z"
		for _, text := range []string{trouble, trouble + ", and a second more", ""} {
			trustd.state.Set(clockState(text))
			time.Sleep(time.Minute)
		}
		var told []string
		for _, e := range eventTexts(t, d) {
			if strings.HasPrefix(e, "machined clock: ") {
				told = append(told, e)
			}
		}
		if want := []string{"machined clock: " + trouble, "machined clock: the clock is right again, as far as this node can know"}; !slices.Equal(told, want) {
			t.Errorf("events %q, want %q", told, want)
		}
	})
}

func TestClockInHealth(t *testing.T) {
	reports := map[string]report{"trustd": {converged: true, state: clockState("the clock says 2016: set it")}}
	find := func(h *machinev1.GetHealthResponse) *machinev1.Check {
		i := slices.IndexFunc(h.GetChecks(), func(c *machinev1.Check) bool { return c.GetName() == clockCheck })
		return h.GetChecks()[i]
	}
	if c := find(health(1, true, []initctl.Status{}, nil, reports, "", "")); c.GetOk() || c.GetDetail() != "the clock says 2016: set it" {
		t.Errorf("a daemon's word: %v", c)
	}
	if c := find(health(1, true, nil, nil, nil, "", "mine")); c.GetOk() || c.GetDetail() != "mine" {
		t.Errorf("the node's own: %v", c)
	}
	if c := find(health(1, true, nil, nil, nil, "", "")); !c.GetOk() {
		t.Errorf("a clock of which nothing bad is known: %v", c)
	}
}

func clockState(trouble string) *controlv1.State {
	return &controlv1.State{Generation: 1, Converged: true, Conditions: []*controlv1.Condition{{Name: "clock", Trouble: trouble}}}
}
