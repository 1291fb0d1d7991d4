package machined

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/version"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
)

// machineServer is machine.v1.Machine.
type machineServer struct {
	machinev1.UnimplementedMachineServer
	d *Daemon
}

// witness notes that a call with credentials came all the way through apid: the proof "api" of a version on trial.
func (d *Daemon) witness(ctx context.Context) {
	if peer.CallerFrom(ctx).Name != "" {
		d.answered.Store(true)
	}
}

func (s *machineServer) GetVersion(ctx context.Context, _ *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	s.d.witness(ctx)
	return &machinev1.GetVersionResponse{
		Version: version.Version, Platform: runtime.GOOS + "/" + runtime.GOARCH, Kernel: s.d.cfg.host.Release(),
		Kubernetes: version.Kubernetes, Go: runtime.Version(),
	}, nil
}

func (s *machineServer) GetHealth(ctx context.Context, _ *machinev1.GetHealthRequest) (*machinev1.GetHealthResponse, error) {
	if err := s.d.lookedUp(ctx); err != nil {
		return nil, err
	}
	s.d.witness(ctx)
	return s.d.health(s.d.protection.trouble()), nil
}

// health asks everybody now. open is what is wrong with the node's own protection.
func (d *Daemon) health(open string) *machinev1.GetHealthResponse {
	units, err := d.units()
	now, _ := d.running.Get()
	reports := map[string]report{}
	for _, h := range d.hands {
		converged, st := h.report(now.Number)
		reports[h.daemon] = report{converged, st}
	}
	return health(now.Number, d.answered.Load(), units, err, reports, open, d.clockTrouble())
}

func (s *machineServer) GetSecurity(context.Context, *machinev1.GetSecurityRequest) (*machinev1.GetSecurityResponse, error) {
	out := &machinev1.GetSecurityResponse{}
	for _, x := range security.Report(s.d.cfg.facts()) {
		out.Settings = append(out.Settings, &machinev1.SecuritySetting{Name: x.Name, Wanted: x.Wanted, Actual: x.Actual, Ok: x.OK, Why: x.Why, Advisory: x.Advisory})
	}
	return out, nil
}

func (s *machineServer) ListServices(ctx context.Context, _ *machinev1.ListServicesRequest) (*machinev1.ListServicesResponse, error) {
	s.d.witness(ctx)
	units, err := s.d.units()
	if err != nil {
		return nil, errs.New(errs.Unavailable, "ask PID 1 for its units: %w", err)
	}
	out := &machinev1.ListServicesResponse{}
	for _, u := range units {
		memory, cpu := s.d.cfg.host.Usage(u.Name)
		out.Services = append(out.Services, &machinev1.Service{
			Name: u.Name, State: u.State, Pid: uint32(u.PID), Restarts: u.Restarts, Since: timestamppb.New(u.Since), LastExit: u.LastExit,
			MemoryBytes: memory, CpuSeconds: cpu,
		})
	}
	return out, nil
}

func (s *machineServer) RestartService(ctx context.Context, r *machinev1.RestartServiceRequest) (*machinev1.RestartServiceResponse, error) {
	if err := s.d.known(r.GetName()); err != nil {
		return nil, err
	}
	s.d.events.say(r.GetName(), typeService, "restart ordered by "+caller(ctx))
	restart := func() error { return s.d.cfg.init.Restart(r.GetName()) }
	if r.GetName() == "machined" || r.GetName() == "apid" { // the answer's own way
		return &machinev1.RestartServiceResponse{}, s.d.order(restart)
	}
	if err := restart(); err != nil {
		return nil, orderError("restart "+r.GetName(), err)
	}
	return &machinev1.RestartServiceResponse{}, nil
}

// known returns an error that helps if there is no such unit.
func (d *Daemon) known(name string) error {
	units, err := d.units()
	if err != nil {
		return errs.New(errs.Unavailable, "ask PID 1 for its units: %w", err)
	}
	var names []string
	for _, u := range units {
		if u.Name == name {
			return nil
		}
		names = append(names, u.Name)
	}
	text := fmt.Sprintf("no service %.64q", name)
	if n := config.Nearest(name, names); n != "" {
		text += "; nearest is " + n
	}
	return errs.New(errs.NotFound, "%s; there are %s", text, strings.Join(names, ", "))
}

// order has something done once the answer is out; there is one such order at a time.
func (d *Daemon) order(do func() error) error {
	select {
	case d.power <- do:
		return nil
	default:
		return errs.New(errs.Unavailable, "another order is being carried out; try again")
	}
}

// orderError gives PID 1's refusals their kinds.
func orderError(what string, err error) error {
	kind := errs.Internal
	switch {
	case errors.Is(err, initctl.NotFound):
		kind = errs.NotFound
	case errors.Is(err, initctl.Halting), errors.Is(err, initctl.Busy):
		kind = errs.Unavailable
	}
	return errs.New(kind, "%s: %w", what, err)
}

func (s *machineServer) Reboot(ctx context.Context, _ *machinev1.RebootRequest) (*machinev1.RebootResponse, error) {
	return &machinev1.RebootResponse{}, s.d.powerOrder(ctx, "reboot", s.d.cfg.init.Reboot)
}

func (s *machineServer) Shutdown(ctx context.Context, _ *machinev1.ShutdownRequest) (*machinev1.ShutdownResponse, error) {
	return &machinev1.ShutdownResponse{}, s.d.powerOrder(ctx, "shutdown", s.d.cfg.init.PowerOff)
}

func (d *Daemon) powerOrder(ctx context.Context, what string, do func() error) error {
	text := what + " ordered by " + caller(ctx)
	if err := d.order(func() error { d.noteOrder(text); d.lastReport(); return do() }); err != nil {
		return err
	}
	d.cfg.Log.Info("power order", "step", what)
	d.events.say("machined", typePower, text)
	return nil
}

// slot takes one of the few slots for streams. The caller calls the function it gets.
func (d *Daemon) slot() (func(), error) {
	select {
	case d.streams <- struct{}{}:
		return func() { <-d.streams }, nil
	default:
		return nil, errs.New(errs.Exhausted, "%d streams of logs and events are open already, which is the limit", maxStreams)
	}
}

func sendLine(stream grpc.ServerStreamingServer[machinev1.LogLine]) func(logs.Line) error {
	return func(l logs.Line) error {
		return stream.Send(&machinev1.LogLine{Time: timestamppb.New(l.Time), Text: l.Text})
	}
}

func (s *machineServer) StreamLogs(r *machinev1.StreamLogsRequest, stream grpc.ServerStreamingServer[machinev1.LogLine]) error {
	free, err := s.d.slot()
	if err != nil {
		return err
	}
	defer free()
	s.d.mu.Lock()
	l := s.d.logs[r.GetName()]
	s.d.mu.Unlock()
	if l == nil {
		if err := s.d.known(r.GetName()); err != nil {
			return err
		}
		return errs.New(errs.Unavailable, "the log of %s is not open yet; try again", r.GetName())
	}
	return l.Stream(stream.Context(), r.GetTail(), r.GetFollow(), sendLine(stream))
}

func (s *machineServer) StreamKernelLog(r *machinev1.StreamKernelLogRequest, stream grpc.ServerStreamingServer[machinev1.LogLine]) error {
	free, err := s.d.slot()
	if err != nil {
		return err
	}
	defer free()
	return s.d.kernel.Stream(stream.Context(), r.GetTail(), r.GetFollow(), kernelPause, sendLine(stream))
}

func (s *machineServer) StreamEvents(r *machinev1.StreamEventsRequest, stream grpc.ServerStreamingServer[machinev1.Event]) error {
	free, err := s.d.slot()
	if err != nil {
		return err
	}
	defer free()
	return s.d.events.stream(stream.Context(), r.GetTail(), r.GetFollow(), stream.Send)
}

func (s *machineServer) ListMetrics(ctx context.Context, _ *machinev1.ListMetricsRequest) (*machinev1.ListMetricsResponse, error) {
	s.d.witness(ctx)
	return &machinev1.ListMetricsResponse{Daemons: s.d.readMetrics(ctx)}, nil
}

// TellEvent takes an event of another daemon, under that one's name.
func (s *machineServer) TellEvent(ctx context.Context, r *machinev1.TellEventRequest) (*machinev1.TellEventResponse, error) {
	if r.GetType() == "" || r.GetText() == "" || strings.ContainsAny(r.GetType()+r.GetText(), "\t\n") {
		return nil, errs.New(errs.Invalid, "an event is one word and one sentence")
	}
	s.d.events.say(caller(ctx), r.GetType(), r.GetText())
	return &machinev1.TellEventResponse{}, nil
}
