package machined

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/needs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
)

// chains are the causes of an answer, a line each.
func chains(w *machinev1.WhyResponse) string {
	var lines []string
	for _, c := range w.GetCauses() {
		var steps []string
		for _, s := range c.GetSteps() {
			steps = append(steps, s.GetSubject())
		}
		lines = append(lines, strings.Join(steps, " < ")+": "+c.GetCommand())
	}
	return strings.Join(lines, "\n")
}

// unexplained are checks of health that fail and that no cause names.
func unexplained(h *machinev1.GetHealthResponse, w *machinev1.WhyResponse) (out []string) {
	told := map[string]bool{}
	for _, c := range w.GetCauses() {
		for _, s := range c.GetSteps() {
			told[s.GetSubject()] = true
		}
		for _, a := range c.GetAlso() {
			told[a] = true
		}
	}
	for _, c := range h.GetChecks() {
		if !c.GetOk() && !told[c.GetName()] {
			out = append(out, c.GetName())
		}
	}
	return out
}

// TestWhy: whatever makes the node not well in health has its cause here, with the time at which it began and the last words of what ended.
func TestWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t)
		n.host.mounted = true
		d, stop := n.start()
		defer stop()
		d.answered.Store(true)
		ask := func(want string) *machinev1.WhyResponse {
			t.Helper()
			synctest.Wait()
			s := &machineServer{d: d}
			w, err := s.Why(t.Context(), &machinev1.WhyRequest{})
			if err != nil {
				t.Fatal(err)
			}
			h, err := s.GetHealth(t.Context(), &machinev1.GetHealthRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if got := chains(w); got != want || w.GetHealthy() != (want == "") {
				t.Errorf("healthy %v, got\n%s\nwant\n%s", w.GetHealthy(), got, want)
			}
			if u := unexplained(h, w); len(u) > 0 {
				t.Errorf("health says that these fail, and nobody why: %s", u)
			}
			return w
		}
		ask("apid.converged < config.applied: bhctl apply -f FILE")
		if _, err := apply(d, ""); err != nil {
			t.Fatal(err)
		}
		ask("")
		begun := time.Now()
		n.links["networkd"].state.Set(&controlv1.State{Generation: 1, Converged: true, Conditions: []*controlv1.Condition{{Name: "address", Trouble: "no address", Explains: true, Help: "bhctl get links"}}})
		ask("") // it only explains
		synctest.Wait()
		time.Sleep(time.Minute)
		n.links["etcdd"].state.Set(&controlv1.State{Generation: 1, Pending: []string{"wait for member"}, Conditions: []*controlv1.Condition{
			{Name: "member", Trouble: "no leader", Explains: true, Needs: []string{"networkd/address"}}}})
		w := ask("etcd.converged < etcd.member < networkd.address: bhctl get links")
		if s := w.GetCauses()[0].GetSteps()[2]; !s.GetSince().AsTime().Equal(begun) || s.GetOrEarlier() {
			t.Errorf("since %v, want %v", s, begun)
		}
		for _, name := range []string{"networkd", "etcdd"} {
			n.links[name].state.Set(&controlv1.State{Generation: 1, Converged: true})
		}
		ask("")

		fell := time.Now()
		for i := range 3 { // it crashes again and again: since when is since the first time
			u := initctl.Status{Name: "gateway", State: "waiting", Restarts: uint32(i), Since: time.Now(), LastExit: "exit 2"}
			n.init.watch <- u
			synctest.Wait()
			time.Sleep(time.Second)
			n.init.watch <- initctl.Status{Name: "gateway", State: "up", Restarts: uint32(i + 1), Since: time.Now(), LastExit: "exit 2"}
			synctest.Wait()
			time.Sleep(time.Second)
			d.mu.Lock()
			l := d.logs["gateway"]
			d.mu.Unlock()
			l.Append(time.Now(), "panic: no map", "", "goroutine 1 [running]:", "main.main()")
		}
		n.init.mu.Lock()
		n.init.units[2].State, n.init.units[2].LastExit = "waiting", "exit 2"
		n.init.mu.Unlock()
		w = ask("gateway.up: bhctl logs gateway")
		if s := w.GetCauses()[0].GetSteps()[0]; !s.GetSince().AsTime().Equal(fell) || fmt.Sprint(s.GetLastWords()) != "[panic: no map]" {
			t.Errorf("got %v, want since %v, and its last words", s, fell)
		}
	})
}

// A certificate that nobody has renewed is named, though its daemon notices nothing.
func TestExpired(t *testing.T) {
	now := time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)
	family := func(name string, end time.Time) []*controlv1.Family {
		return []*controlv1.Family{{Name: name, Samples: []*controlv1.Sample{{Labels: map[string]string{"profile": "apid-server"}, Value: float64(end.Unix())}}}}
	}
	const mine, authority = "bulkhead_apid_certificate_expiry_timestamp_seconds", "bulkhead_trustd_authority_expiry_timestamp_seconds"
	const want = "the certificate apid-server has expired at 2026-03-01T02:00:00Z, and was not renewed"
	for _, c := range []struct {
		name string
		end  time.Time
		want string
	}{
		{mine, now.Add(-time.Hour), want}, {authority, now.Add(-time.Hour), want},
		{mine, now.Add(time.Hour), ""}, {mine, time.Unix(0, 0), ""}, {"bulkhead_apid_calls_total", now.Add(-time.Hour), ""},
	} {
		if got := expired(family(c.name, c.end), now); got != c.want {
			t.Errorf("%s, %s: got %q, want %q", c.name, c.end, got, c.want)
		}
	}
}

func TestTelling(t *testing.T) {
	for in, want := range map[string]string{
		"":                               "[]",
		"starting\nbind: address in use": "[bind: address in use]",
		`{"level":"ERROR","msg":"daemon ended","err":"listen: denied"}`: "[daemon ended: listen: denied]",
		"fatal error: out of memory\n\nruntime stack:\nx":               "[fatal error: out of memory]",
		"\x1b[31mred":             "[ [31mred]",
		strings.Repeat("x", 5000): "[" + strings.Repeat("x", wordBytes-3) + "…]",
	} {
		var lines []string
		if in != "" {
			lines = strings.Split(in, "\n")
		}
		if got := fmt.Sprint(telling(lines)); got != want {
			t.Errorf("%.60q: got %s, want %s", in, got, want)
		}
	}
}

// frozen is a daemon that was stopped: its streams stay open, and it answers nothing.
type frozen struct{ control }

func (frozen) ReadMetrics(ctx context.Context, _ *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestWhyOfFrozenDaemon: over real sockets. The answer comes in time and names the daemon, though its connection is there and its unit is up; so does one for a daemon whose
// process takes no connection at all.
func TestWhyOfFrozenDaemon(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	before, stop := n.start() // it has a document from before
	if _, err := apply(before, ""); err != nil {
		t.Fatal(err)
	}
	stop()
	sockets := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	var ended []<-chan error
	serve := func(name string, who uid.ID, run func(context.Context, daemon.Env) error) {
		t.Helper()
		l, err := net.Listen("unix", filepath.Join(sockets, name))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		env := daemon.Env{Name: name, Log: slog.New(slog.DiscardHandler), Listen: l, Ready: func() {}, Metrics: metrics.New(name), Who: func(net.Conn) (uid.ID, error) { return who, nil }}
		go func() { done <- run(ctx, env) }()
		ended = append(ended, done)
	}
	defer func() {
		cancel()
		for _, done := range ended {
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
	}()
	cfg := Config{Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("machined"), Runtime: n.runtime, host: n.host, past: n.past, init: n.init, links: map[string]link{},
		facts: func() security.Facts { return n.facts }, others: n.others, cluster: n.cluster}
	for name, l := range n.links {
		cfg.links[name] = l
	}
	link := func(name string) {
		c, err := peer.Dial(filepath.Join(sockets, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		cfg.links[name] = conn{c, controlv1.NewControlClient(c)}
	}
	link("trustd")
	link("gateway")
	// PID 1 listens for a daemon that is stopped before it accepts.
	silent, err := net.Listen("unix", filepath.Join(sockets, "gateway"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	serve("trustd", uid.Machined, func(ctx context.Context, env daemon.Env) error {
		return daemon.Serve(ctx, env, nil, func(s *grpc.Server) { controlv1.RegisterControlServer(s, frozen{control{l: n.links["trustd"]}}) })
	})
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	serve("machined", uid.Apid, d.Run)
	client, err := peer.Dial(filepath.Join(sockets, "machined"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	as := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "alice", peer.RolesKey, "reader")
	for _, h := range d.hands { // all but the one that nobody reaches have the document
		for h.daemon != "gateway" {
			now, _ := d.running.Get()
			_, changed := h.status.Get()
			if converged, _ := h.report(now.Number); converged {
				break
			}
			<-changed
		}
	}
	start := time.Now()
	w, err := machinev1.NewMachineClient(client).Why(as, &machinev1.WhyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took > probeTime+3*time.Second {
		t.Errorf("the answer took %s", took)
	}
	lines := strings.Split(chains(w), "\n")
	slices.Sort(lines)
	if got, want := strings.Join(lines, "\n"), "gateway.converged < gateway.answers: bhctl service restart gateway\ntrustd.answers: bhctl service restart trustd"; got != want || w.GetHealthy() {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	short, hurry := context.WithTimeout(as, probeTime/4) // a caller in a hurry gets an error and no half answer
	defer hurry()
	if _, err := machinev1.NewMachineClient(client).Why(short, &machinev1.WhyRequest{}); err == nil {
		t.Error("an answer without having waited")
	}
}

func TestNeeds(t *testing.T) {
	refs := slices.Clone(signing)
	for _, l := range leans {
		refs = append(refs, l...)
	}
	for _, ref := range refs {
		if !needs.Known(ref) {
			t.Errorf("nobody reports %s", ref)
		}
	}
}
