package apid

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// spec is what apid takes from the document.
type spec struct {
	generation uint64 // 0: there is none yet
	hostname   string // for the audit log
	role       string // of the node
	access     *config.Access
	grants     *grants // made of access
}

// figures are apid's metrics.
type figures struct {
	desired, observed, converged *metrics.Vec
	calls, forwarded, exchanges  *metrics.Vec
	auditDropped                 *metrics.Vec
	issuerRead, issuerFailed     *metrics.Vec
	gate                         gate.Figures
}

func newFigures(s *metrics.Set) figures {
	f := figures{
		desired:      s.Gauge("bulkhead_apid_generation_desired", "Generation of the newest specification."),
		observed:     s.Gauge("bulkhead_apid_generation_observed", "Generation that is in use."),
		converged:    s.Gauge("bulkhead_apid_converged", "Whether the newest specification is in use."),
		calls:        s.Counter("bulkhead_apid_calls_total", "Calls since the start, by service and outcome.", "service", "code"),
		forwarded:    s.Counter("bulkhead_apid_forwarded_total", "Calls passed on to other nodes since the start, by outcome.", "code"),
		exchanges:    s.Counter("bulkhead_apid_exchanges_total", "Calls to other nodes for trustd since the start, by method and outcome.", "method", "code"),
		gate:         gate.NewFigures(s, "bulkhead_apid"),
		auditDropped: s.Counter("bulkhead_apid_audit_refused_dropped_total", "Lines about refused calls that were not written, since the start."),
	}
	f.auditDropped.Add(0)
	f.issuerRead = s.Gauge("bulkhead_apid_issuer_keys_read_timestamp_seconds", "When the issuer's keys were read last, Unix time; not there before that.")
	f.issuerFailed = s.Counter("bulkhead_apid_issuer_failures_total", "How often the issuer's keys could not be read, since the start.")
	return f
}

// call counts an outcome. The service is "unknown" unless it has a route: labels never come from the network.
func (f figures) call(c *call, err error) {
	service := "unknown"
	if c.route != nil {
		service = c.route.service
	}
	f.calls.Add(1, service, codeOf(err).String())
	if !c.aim.here() {
		f.forwarded.Add(1, codeOf(err).String())
	}
}

// healthServer answers for all services: "" is apid itself, a service is asked of the daemon that serves it.
type healthServer struct {
	healthv1.UnimplementedHealthServer
	d *Daemon
}

// probeTime bounds how long a daemon may take to say that it serves.
const probeTime = 2 * time.Second

func (s healthServer) Check(ctx context.Context, r *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	serving := &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}
	if r.GetService() == "" {
		return serving, nil
	}
	for _, route := range s.d.routes {
		if route.service != r.GetService() {
			continue
		}
		if route.daemon == "" {
			return serving, nil
		}
		ctx, cancel := context.WithTimeout(ctx, probeTime)
		defer cancel()
		resp, err := healthv1.NewHealthClient(s.d.conns[route.daemon].first()).Check(ctx, &healthv1.HealthCheckRequest{})
		if err != nil {
			return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_NOT_SERVING}, nil
		}
		return resp, nil
	}
	return nil, status.Error(codes.NotFound, "unknown service")
}

// listed are the services that reflection names.
type listed map[string]*route

func (l listed) GetServiceInfo() map[string]grpc.ServiceInfo {
	out := map[string]grpc.ServiceInfo{}
	for _, r := range l {
		out[r.service] = grpc.ServiceInfo{}
	}
	return out
}

type controlServer struct {
	controlv1.UnimplementedControlServer
	d *Daemon
}

// SetSpec takes the node's name, and who may do what. There is nothing that could fail to converge.
func (s controlServer) SetSpec(_ context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	sp, err := parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	if have, _ := s.d.spec.Get(); sp.generation < have.generation {
		return nil, errs.New(errs.Conflict, "generation %d is older than %d, which runs", sp.generation, have.generation)
	}
	have, _ := s.d.spec.Get()
	sp.grants.keep(have.grants)
	s.d.spec.Set(sp)
	s.d.state.Set(&controlv1.State{Generation: sp.generation, Converged: true})
	s.d.count.desired.Set(float64(sp.generation))
	s.d.count.observed.Set(float64(sp.generation))
	s.d.count.converged.Set(1)
	return &controlv1.SetSpecResponse{}, nil
}

func (s controlServer) PlanSpec(_ context.Context, r *controlv1.PlanSpecRequest) (*controlv1.PlanSpecResponse, error) {
	sp, err := parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	out := &controlv1.PlanSpecResponse{}
	have, _ := s.d.spec.Get()
	if sp.hostname != have.hostname {
		out.Steps = []string{"audit log's node name " + sp.hostname}
	}
	out.Steps = append(out.Steps, config.Diff(config.Set{Access: have.access}, config.Set{Access: sp.access})...)
	return out, nil
}

func (s controlServer) WatchState(_ *controlv1.WatchStateRequest, out grpc.ServerStreamingServer[controlv1.State]) error {
	return s.d.state.Watch(out.Context(), out.Send)
}

func (s controlServer) ReadMetrics(context.Context, *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	return &controlv1.ReadMetricsResponse{Families: s.d.cfg.Env.Metrics.Families()}, nil
}

func parse(s *controlv1.Spec) (spec, error) {
	if s.GetGeneration() == 0 {
		return spec{}, errs.New(errs.Invalid, "spec: generation is 0, must be at least 1")
	}
	set, err := config.Parse("spec", s.GetDocuments())
	if err != nil {
		return spec{}, errs.New(errs.Invalid, "%w", err)
	}
	return spec{generation: s.GetGeneration(), hostname: set.Machine.Hostname, role: string(set.Machine.Role), access: set.Access, grants: newGrants(set.Access)}, nil
}
