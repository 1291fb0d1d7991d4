package machined

import (
	"context"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

// modelCluster takes reports.
type modelCluster struct {
	mu      sync.Mutex
	reports chan *clusterv1.Node
	refuse  error                     // guarded by mu
	refused chan struct{}             // gets something at each refusal
	answer  *clusterv1.ReportResponse // guarded by mu
	next    string                    // guarded by mu; a version
	trial   bool                      // guarded by mu
	unsure  error                     // guarded by mu
	ahead   time.Duration             // guarded by mu; of its clock
}

func newModelCluster() *modelCluster {
	return &modelCluster{reports: make(chan *clusterv1.Node, 256), refused: make(chan struct{}, 256)}
}

func (m *modelCluster) Addresses(context.Context) ([]string, error) {
	return []string{"10.5.0.11"}, nil
}

func (m *modelCluster) Versions(context.Context) (string, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.next, m.trial, m.unsure
}

func (m *modelCluster) Report(_ context.Context, n *clusterv1.Node) (*clusterv1.ReportResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil {
		m.refused <- struct{}{}
		return nil, m.refuse
	}
	select {
	case m.reports <- n:
	default: // nobody looks
	}
	r := &clusterv1.ReportResponse{Clock: timestamppb.New(time.Now().Add(m.ahead))}
	proto.Merge(r, m.answer)
	return r, nil
}

// until waits for a report.
func (m *modelCluster) until(t *testing.T, ok func(*clusterv1.Node) bool) *clusterv1.Node {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		select {
		case n := <-m.reports:
			if ok(n) {
				return n
			}
			t.Log(n)
		case <-ctx.Done():
			t.Fatal("no such report")
		}
	}
}

func TestReportSelf(t *testing.T) { synctest.Test(t, reportSelf) }

func reportSelf(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.5.0.11:6443\n"); err != nil {
		t.Fatal(err)
	}
	// Nobody called it through apid, and it is ready all the same.
	r := n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetState() == "ready" })
	if r.GetName() != "n1" || r.GetRole() != "worker" || r.GetBootId() != "boot-a" || r.GetVersion() == "" || r.GetDetail() != "" || !reflect.DeepEqual(r.GetAddresses(), []string{"10.5.0.11"}) {
		t.Errorf("report: %v", r)
	}
	// What changes is told long before the next turn.
	n.init.mu.Lock()
	i := len(n.init.units) - 1
	n.init.units[i] = initctl.Status{Name: "kubelet", State: "waiting", LastExit: "signal 9"}
	n.init.mu.Unlock()
	began := time.Now() // synctest's
	r = n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetState() == "not ready" })
	if !strings.Contains(r.GetDetail(), "kubelet.up: waiting") {
		t.Errorf("detail is %q, want the unit that is not up", r.GetDetail())
	}
	if wait := time.Since(began); wait >= reportPause {
		t.Errorf("told after %s, want less than %s", wait, reportPause)
	}
	// A cluster that refuses changes nothing for the node, and hears of it later.
	n.cluster.mu.Lock()
	n.cluster.refuse = errs.New(errs.Denied, "no")
	n.cluster.mu.Unlock()
	n.init.mu.Lock()
	n.init.units[i] = initctl.Status{Name: "kubelet", State: "up", PID: 1}
	n.init.mu.Unlock()
	<-n.cluster.refused
	n.cluster.mu.Lock()
	n.cluster.refuse = nil
	n.cluster.mu.Unlock()
	n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetState() == "ready" })
	// The register hears of a node that stays as it is, too.
	began = time.Now()
	n.cluster.until(t, func(*clusterv1.Node) bool { return true })
	if wait := time.Since(began); wait > reportPause+reportLook {
		t.Errorf("reported again after %s, want at most %s", wait, reportPause)
	}
}

// An order restarts the boot that it means, once, and is asked for more often while one may come.
func TestFollowsOrder(t *testing.T) { synctest.Test(t, followsOrder) }

func followsOrder(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n"); err != nil {
		t.Fatal(err)
	}
	answer := func(boot, text string) {
		n.cluster.mu.Lock()
		n.cluster.answer = &clusterv1.ReportResponse{Soon: true, Order: &clusterv1.Order{Id: "x", BootId: boot, Text: text}}
		n.cluster.mu.Unlock()
		time.Sleep(2 * reportPause) // synctest's
		synctest.Wait()
	}
	answer("another boot", "restart: late")
	if did := n.init.did(); slices.Contains(did, "reboot") {
		t.Fatalf("an order for another boot was followed: %v", did)
	}
	for len(n.cluster.reports) > 0 {
		<-n.cluster.reports
	}
	time.Sleep(reportPause)
	synctest.Wait()
	if got := len(n.cluster.reports); got < int(reportPause/reportLook)-1 {
		t.Errorf("%d reports in %s while an order may come, want one each %s", got, reportPause, reportLook)
	}
	answer("boot-a", "restart: rolling reboot x, ordered by alice")
	if did := n.init.did(); !slices.Contains(did, "reboot") {
		t.Fatalf("orders to PID 1: %v, want a reboot", did)
	}
	time.Sleep(2 * reportPause)
	synctest.Wait()
	if did := n.init.did(); strings.Count(strings.Join(did, ","), "reboot") != 1 {
		t.Errorf("orders to PID 1: %v, want one reboot although the order came again", did)
	}
}

// What changes in the hardening is told in time, also while the cluster wants to hear of the node every second: a machine closes the kernel's modules late in its boot.
func TestReportsHardening(t *testing.T) { synctest.Test(t, reportsHardening) }

func reportsHardening(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	good := n.facts
	n.facts.Lockdown = "[none] integrity confidentiality"
	n.cluster.answer = &clusterv1.ReportResponse{Soon: true}
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n"); err != nil {
		t.Fatal(err)
	}
	n.cluster.until(t, func(r *clusterv1.Node) bool { return strings.Contains(r.GetDetail(), "lockdown") })
	n.cluster.mu.Lock()
	n.facts = good
	n.cluster.mu.Unlock()
	began := time.Now() // synctest's
	n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetState() == "ready" })
	if wait := time.Since(began); wait > reportPause+reportLook {
		t.Errorf("told after %s, want at most %s", wait, reportPause+reportLook)
	}
}

// What lies ready, and whether the running version was found good, is in each report. If that is not known, it is not good.
func TestReportsVersions(t *testing.T) { synctest.Test(t, reportsVersions) }

func reportsVersions(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	n.cluster.next, n.cluster.trial = "2", true
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n"); err != nil {
		t.Fatal(err)
	}
	n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetNextVersion() == "2" && r.GetTrial() })
	n.cluster.mu.Lock()
	n.cluster.next, n.cluster.trial = "", false
	n.cluster.mu.Unlock()
	n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetNextVersion() == "" && !r.GetTrial() })
	n.cluster.mu.Lock()
	n.cluster.unsure = errs.New(errs.Unavailable, "updated does not answer")
	n.cluster.mu.Unlock()
	n.cluster.until(t, func(r *clusterv1.Node) bool { return r.GetTrial() })
}

func TestVersions(t *testing.T) {
	running := &updatev1.Slot{Version: "1", Status: "good", Running: true, Next: true}
	for _, c := range []struct {
		name  string
		slots []*updatev1.Slot
		next  string
		trial bool
	}{
		{"not looked yet", nil, "", true},
		{"nothing ready", []*updatev1.Slot{running, {Version: "0", Status: "good"}}, "", false},
		{"one is ready", []*updatev1.Slot{{Version: "1", Status: "good", Running: true}, {Version: "2", Status: "on trial", Next: true}}, "2", false},
		{"it is on trial", []*updatev1.Slot{{Version: "1", Status: "good"}, {Version: "2", Status: "on trial", Running: true, Next: true}}, "", true},
	} {
		if next, trial := versions(&updatev1.Status{Slots: c.slots}); next != c.next || trial != c.trial {
			t.Errorf("%s: %q %v, want %q %v", c.name, next, trial, c.next, c.trial)
		}
	}
	if next, trial := versions(&updatev1.Status{Error: "this machine was not started by UEFI"}); next != "" || trial {
		t.Errorf("no slots: %q %v, want neither", next, trial)
	}
}

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		name          string
		checks        []*machinev1.Check
		state, detail string
	}{
		{"nothing", nil, "ready", ""},
		{"nobody called", []*machinev1.Check{{Name: "api.answered"}}, "ready", ""},
		{"two fail", []*machinev1.Check{{Name: "a", Ok: true}, {Name: "b", Detail: "x"}, {Name: "c", Detail: "y"}}, "not ready", "b: x"},
		{"long", []*machinev1.Check{{Name: "b", Detail: strings.Repeat("x", 2000)}}, "not ready", "b: " + strings.Repeat("x", maxDetail-3)},
	} {
		if state, detail := verdict(c.checks); state != c.state || detail != c.detail {
			t.Errorf("%s: %q %q, want %q %q", c.name, state, detail, c.state, c.detail)
		}
	}
}

func TestAddresses(t *testing.T) {
	st := &networkv1.Status{Addresses: []*networkv1.Address{
		{Link: "cni0", Address: "10.244.0.1/24", Origin: "other"}, {Link: "eth0", Address: "10.5.0.11/24", Origin: "static"},
		{Link: "eth0", Address: "fe80::1/64", Origin: "dhcp"}, {Link: "eth1", Address: "10.0.2.15/24", Origin: "dhcp"}, {Link: "eth1", Address: "nonsense", Origin: "dhcp"},
	}}
	if got, want := addresses(st), []string{"10.5.0.11", "10.0.2.15"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A cluster that refuses is asked less and less often, whatever changes on the node, and hears of it within a report's time once it listens.
func TestReportBacksOff(t *testing.T) { synctest.Test(t, reportBacksOff) }

func reportBacksOff(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	n.cluster.refuse = errs.New(errs.Unavailable, "no control plane can answer")
	d, stop := n.start()
	defer stop()
	if _, err := apply(d, "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: worker\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nendpoint: https://10.5.0.11:6443\n"); err != nil {
		t.Fatal(err)
	}
	<-n.cluster.refused
	i := len(n.init.units) - 1
	for look := range 30 { // a boot: something is new at each look
		n.init.mu.Lock()
		n.init.units[i] = initctl.Status{Name: "kubelet", State: []string{"waiting", "starting"}[look%2]}
		n.init.mu.Unlock()
		time.Sleep(reportLook) // synctest's
	}
	synctest.Wait()
	if got := len(n.cluster.refused); got < 6 || got > 10 {
		t.Errorf("%d reports in a minute in which the cluster refused them, want 6 to 10", got)
	}
	n.cluster.mu.Lock()
	n.cluster.refuse = nil
	n.cluster.mu.Unlock()
	began := time.Now()
	n.cluster.until(t, func(*clusterv1.Node) bool { return true })
	if wait := time.Since(began); wait > reportPause+reportLook {
		t.Errorf("the first report came %s after the cluster listened again", wait)
	}
}
