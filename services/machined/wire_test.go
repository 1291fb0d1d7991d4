package machined

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
)

// control is a daemon's Control service in front of a model.
type control struct {
	controlv1.UnimplementedControlServer
	l *modelLink
}

func (c control) SetSpec(ctx context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	return &controlv1.SetSpecResponse{}, c.l.Set(ctx, r.GetSpec())
}

func (c control) PlanSpec(ctx context.Context, r *controlv1.PlanSpecRequest) (*controlv1.PlanSpecResponse, error) {
	steps, err := c.l.Plan(ctx, r.GetSpec())
	return &controlv1.PlanSpecResponse{Steps: steps}, err
}

func (c control) WatchState(_ *controlv1.WatchStateRequest, s grpc.ServerStreamingServer[controlv1.State]) error {
	return c.l.Watch(s.Context(), func(st *controlv1.State) {
		if err := s.Send(st); err != nil {
			return // the stream's context ends too
		}
	})
}

// TestOverSockets runs machined and one daemon on real sockets: who may call, what arrives, and a daemon that is killed.
func TestOverSockets(t *testing.T) {
	n := newNode(t)
	n.host.mounted = true
	sockets := t.TempDir()
	serve := func(ctx context.Context, name string, who uid.ID, run func(context.Context, daemon.Env) error) <-chan error {
		t.Helper()
		l, err := net.Listen("unix", filepath.Join(sockets, name))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		env := daemon.Env{Name: name, Log: slog.New(slog.DiscardHandler), Listen: l, Ready: func() {}, Metrics: metrics.New(name),
			Who: func(net.Conn) (uid.ID, error) { return who, nil }}
		go func() { done <- run(ctx, env) }()
		return done
	}
	networkd := func(ctx context.Context, env daemon.Env) error {
		return daemon.Serve(ctx, env, nil, func(s *grpc.Server) { controlv1.RegisterControlServer(s, control{l: n.links["networkd"]}) })
	}
	dialed, err := peer.Dial(filepath.Join(sockets, "networkd"))
	if err != nil {
		t.Fatal(err)
	}
	defer dialed.Close()
	cfg := Config{Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("machined"), Runtime: n.runtime, host: n.host, past: n.past, init: n.init, links: map[string]link{},
		facts: func() security.Facts { return n.facts }}
	for name, l := range n.links {
		cfg.links[name] = l
	}
	cfg.links["networkd"] = conn{dialed, controlv1.NewControlClient(dialed)}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, kill := context.WithCancel(ctx)
	networkdDone := serve(first, "networkd", uid.Machined, networkd)
	machinedDone := serve(ctx, "machined", uid.Apid, d.Run)

	client, err := peer.Dial(filepath.Join(sockets, "machined"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	as := metadata.AppendToOutgoingContext(ctx, peer.CallerKey, "alice", peer.RolesKey, "admin")
	n.links["networkd"].steps = []string{"link eth0 up"}
	r, err := configv1.NewConfigClient(client).Apply(as, &configv1.ApplyRequest{Documents: doc("a")})
	if err != nil || r.GetGeneration() != 1 || len(r.GetPlans()) != 1 {
		t.Fatalf("apply: %v, %v", r, err)
	}
	g, err := configv1.NewConfigClient(client).Get(as, &configv1.GetRequest{})
	if err != nil || g.GetCaller() != "alice" {
		t.Errorf("get: %v, %v", g, err)
	}
	if _, err := controlv1.NewControlClient(client).SetSpec(as, &controlv1.SetSpecRequest{}); err == nil {
		t.Error("machined takes specs")
	}
	if _, err := configv1.NewConfigClient(client).Apply(as, &configv1.ApplyRequest{Documents: "x"}); !errs.Is(err, errs.Invalid) {
		t.Errorf("got %v", err)
	}
	<-awaitEvent(as, t, client, "networkd", "reached generation 1")
	h, err := machinev1.NewMachineClient(client).GetHealth(as, &machinev1.GetHealthRequest{})
	if err != nil || !slices.ContainsFunc(h.GetChecks(), func(c *machinev1.Check) bool { return c.GetName() == "api.answered" && c.GetOk() }) {
		t.Errorf("a call through apid is no proof that calls are answered: %v, %v", h, err)
	}
	if _, err := machinev1.NewMachineClient(client).TellEvent(as, &machinev1.TellEventRequest{Type: "update", Text: "x"}); !errs.Is(err, errs.Denied) {
		t.Errorf("apid may tell events: %v", err)
	}
	kill()
	if err := <-networkdDone; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	n.links["networkd"].restart()
	networkdDone = serve(ctx, "networkd", uid.Machined, networkd)
	for { // its spec comes again
		_, changed := n.links["networkd"].state.Get()
		if len(n.links["networkd"].generations()) == 2 {
			break
		}
		<-changed
	}
	cancel()
	for _, done := range []<-chan error{networkdDone, machinedDone} {
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// awaitEvent returns a channel that is closed once an event was streamed.
func awaitEvent(ctx context.Context, t *testing.T, c *grpc.ClientConn, source, text string) <-chan struct{} {
	t.Helper()
	s, err := machinev1.NewMachineClient(c).StreamEvents(ctx, &machinev1.StreamEventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		for {
			e, err := s.Recv()
			if err != nil {
				return
			}
			if e.GetSource() == source && e.GetText() == text {
				close(done)
				return
			}
		}
	}()
	return done
}
