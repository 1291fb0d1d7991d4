package machined

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		check := func(healthy bool, want ...string) {
			t.Helper()
			synctest.Wait()
			h, err := (&machineServer{d: d}).GetHealth(t.Context(), &machinev1.GetHealthRequest{})
			if err != nil {
				t.Fatal(err)
			}
			var bad []string
			last := ""
			for _, c := range h.GetChecks() {
				if c.GetName() < last {
					t.Errorf("%s is not sorted", c.GetName())
				}
				if last = c.GetName(); !c.GetOk() {
					bad = append(bad, c.GetName()+": "+c.GetDetail())
				}
			}
			if h.GetHealthy() != healthy || strings.Join(bad, "\n") != strings.Join(want, "\n") {
				t.Errorf("healthy %v:\n%s\nwant\n%s", h.GetHealthy(), strings.Join(bad, "\n"), strings.Join(want, "\n"))
			}
		}
		check(false, "api.answered: no call with credentials has come through apid since machined was started", "apid.converged: waits for a configuration", "config.applied: the node has no configuration yet; apply one, an empty document will do",
			"etcd.converged: waits for a configuration", "gateway.converged: waits for a configuration", "kubernetes.converged: waits for a configuration",
			"networkd.converged: waits for a configuration", "storaged.converged: waits for a configuration", "trustd.converged: waits for a configuration", "updated.converged: waits for a configuration")
		d.answered.Store(true) // apid's part, see TestOverSockets
		if _, err := apply(d, ""); err != nil {
			t.Fatal(err)
		}
		check(true)
		n.links["kubeletd"].state.Set(&controlv1.State{Generation: 1, Error: "kubelet: connection refused", Pending: []string{"start kubelet", "start kube-proxy"}})
		n.links["storaged"].state.Set(&controlv1.State{Generation: 1, Converged: true, Conditions: []*controlv1.Condition{{Name: "STATE.room"}, {Name: "VAR.room", Trouble: "full"}}})
		n.init.mu.Lock()
		n.init.units[0].State, n.init.units[0].LastExit = "waiting", "exit 1"
		n.init.units[len(n.init.units)-1].LastExit = "exit 125"
		n.init.mu.Unlock()
		n.init.mu.Lock()
		n.init.units[2].Restarts, n.init.units[2].Since, n.init.units[2].LastExit = 3, time.Now().Add(-calm+10*time.Second), "exit 2"
		n.init.mu.Unlock()
		check(false, "apid.up: waiting; ended last with: exit 1", "gateway.up: was started 3 times since boot without anybody's wish, the last time 50s ago; ended last with: exit 2",
			"kubelet.up: down; ended last with: exit 125", "kubernetes.converged: kubelet: connection refused; left to do: start kubelet and 1 more", "storaged.VAR.room: full")
		time.Sleep(calm)
		check(false, "apid.up: waiting; ended last with: exit 1", "kubelet.up: down; ended last with: exit 125",
			"kubernetes.converged: kubelet: connection refused; left to do: start kubelet and 1 more", "storaged.VAR.room: full")
	})
}

func TestOrders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		d, stop := n.start()
		defer stop()
		s := &machineServer{d: d}
		synctest.Wait()
		if _, err := s.RestartService(t.Context(), &machinev1.RestartServiceRequest{Name: "netwrokd"}); !errs.Is(err, errs.NotFound) || !strings.HasPrefix(errs.Text(err), `no service "netwrokd"; nearest is networkd; there are apid, `) {
			t.Errorf("got %v", err)
		}
		if _, err := s.RestartService(t.Context(), &machinev1.RestartServiceRequest{Name: "networkd"}); err != nil || len(n.init.did()) != 1 {
			t.Errorf("got %v, %v", n.init.did(), err)
		}
		if _, err := s.Reboot(t.Context(), &machinev1.RebootRequest{}); err != nil || len(n.init.did()) != 1 {
			t.Errorf("reboot must be answered first: %v, %v", n.init.did(), err)
		}
		time.Sleep(time.Second)
		if _, err := s.Shutdown(t.Context(), &machinev1.ShutdownRequest{}); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		if got := n.init.did(); !reflect.DeepEqual(got, []string{"restart networkd", "reboot", "power off"}) {
			t.Errorf("got %v", got)
		}
	})
}

// TestEvents: they outlive the process, and what was told is not told again.
func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		time.Sleep(time.Second)
		d, stop := n.start()
		synctest.Wait()
		before := len(eventTexts(t, d))
		if before != len(recipients) { // one "up" each; nothing of kubelet, which was never started
			t.Errorf("got %q", eventTexts(t, d))
		}
		stop()
		time.Sleep(time.Second)
		d, stop = n.start()
		defer stop()
		synctest.Wait()
		n.init.watch <- initctl.Status{Name: "apid", State: "waiting", LastExit: "killed by SIGKILL", Since: time.Now()}
		n.init.watch <- initctl.Status{Name: "apid", State: "up", PID: 77, Since: time.Now()}
		synctest.Wait()
		got := eventTexts(t, d)
		want := []string{"apid service: ended (killed by SIGKILL), will be started again", "apid service: up, process 77"}
		if len(got) != before+2 || !reflect.DeepEqual(got[before:], want) {
			t.Errorf("got %q", got)
		}
		for i := range maxEvents + 50 {
			d.events.say("x", "service", fmt.Sprint(i, strings.Repeat("\x01\n\"", 1000)))
		}
		if got := eventTexts(t, d); len(got) != maxEvents || !strings.HasPrefix(got[0], "x service: 50  \"") {
			t.Errorf("got %d, first %.40q", len(got), got[0])
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		n.links["etcdd"].dead = true
		d, stop := n.start()
		defer stop()
		if _, err := apply(d, ""); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		r, err := (&machineServer{d: d}).ListMetrics(t.Context(), &machinev1.ListMetricsRequest{})
		if err != nil || len(r.GetDaemons()) != len(recipients)+1 || time.Since(start) != metricsTime {
			t.Fatalf("after %s: %v, %v", time.Since(start), r, err)
		}
		for _, m := range r.GetDaemons() {
			switch m.GetDaemon() {
			case "etcdd":
				if m.GetError() != "did not answer within 2s" {
					t.Errorf("etcdd: %q", m.GetError())
				}
			case "machined":
				for _, f := range m.GetFamilies() {
					if !strings.HasPrefix(f.GetName(), "bulkhead_") {
						t.Errorf("name %q", f.GetName())
					}
					if f.GetName() == "bulkhead_machined_converged" && f.GetSamples()[0].GetValue() != 0 {
						t.Error("converged although etcdd does not answer")
					}
				}
			default:
				if m.GetError() != "" || len(m.GetFamilies()) != 1 {
					t.Errorf("%v", m)
				}
			}
		}
	})
}

func TestServicesAndVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, stop := newNode(t).start()
		defer stop()
		s := &machineServer{d: d}
		r, err := s.ListServices(t.Context(), &machinev1.ListServicesRequest{})
		if err != nil || len(r.GetServices()) != len(recipients)+1 || r.GetServices()[0].GetMemoryBytes() != 4096 || r.GetServices()[0].GetCpuSeconds() != 1.5 {
			t.Errorf("got %v, %v", r, err)
		}
		v, err := s.GetVersion(t.Context(), &machinev1.GetVersionRequest{})
		if err != nil || v.GetKernel() != "6.12" || v.GetPlatform() == "" || v.GetKubernetes() == "" {
			t.Errorf("got %v, %v", v, err)
		}
		var text string
		err = s.StreamKernelLog(&machinev1.StreamKernelLogRequest{}, stream[machinev1.LogLine]{ctx: t.Context(), send: func(l *machinev1.LogLine) error { text = l.GetText(); return nil }})
		if err != nil || text != "hello" {
			t.Errorf("kernel log: %q, %v", text, err)
		}
	})
}

// TestLogs reads real pipes: lines of before and after machined's restart come once, in order.
func TestLogs(t *testing.T) {
	n := newNode(t)
	n.init.units = n.init.units[:1] // apid
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	n.init.pipe = func(string) (*os.File, error) { return dup(read) }
	want := 0
	for range 3 { // each time a new machined
		d, stop := n.start()
		fmt.Fprintf(write, "line %d\nline %d\n", want, want+1)
		want += 2
		ctx, cancel := context.WithCancel(t.Context())
		var got []string
		for {
			got = nil
			err := (&machineServer{d: d}).StreamLogs(&machinev1.StreamLogsRequest{Name: "apid", Follow: true}, stream[machinev1.LogLine]{ctx: ctx, send: func(l *machinev1.LogLine) error {
				if got = append(got, l.GetText()); len(got) == want {
					cancel()
				}
				return nil
			}})
			if errors.Is(err, context.Canceled) {
				break
			}
			if !errs.Is(err, errs.Unavailable) { // the log is opened by another goroutine
				t.Fatal(err)
			}
		}
		for i, text := range got {
			if text != fmt.Sprint("line ", i) {
				t.Errorf("line %d is %q", i, text)
			}
		}
		stop()
	}
}

func TestLogsOfNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, stop := newNode(t).start()
		defer stop()
		err := (&machineServer{d: d}).StreamLogs(&machinev1.StreamLogsRequest{Name: "../events"}, stream[machinev1.LogLine]{ctx: t.Context()})
		if !errs.Is(err, errs.NotFound) {
			t.Errorf("got %v", err)
		}
		for range maxStreams {
			d.streams <- struct{}{}
		}
		err = (&machineServer{d: d}).StreamEvents(&machinev1.StreamEventsRequest{}, stream[machinev1.Event]{ctx: t.Context()})
		if !errs.Is(err, errs.Exhausted) {
			t.Errorf("got %v", err)
		}
	})
}

func TestUnit(t *testing.T) {
	data, err := os.ReadFile("unit.json")
	if err != nil {
		t.Fatal(err)
	}
	u, err := unitfile.Parse(data)
	if err != nil || u.Network != "none" || u.Capabilities != unit.Capability("SYSLOG") || u.NewPrivileges {
		t.Errorf("got %+v, %v", u, err)
	}
}

func TestCPUSeconds(t *testing.T) {
	if got := cpuSeconds([]byte("usage_usec 2500000\nuser_usec 1\n")); got != 2.5 {
		t.Errorf("got %g", got)
	}
	if got := cpuSeconds([]byte("garbage")); got != 0 {
		t.Errorf("got %g", got)
	}
}
