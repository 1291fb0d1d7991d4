package gateway

import (
	"context"

	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// control is the gateway's Control service. The only thing in the document that concerns the gateway are the names in its
// certificate, and those are trustd's to decide: so a new spec means a new certificate, and there is never anything pending.
type control struct {
	controlv1.UnimplementedControlServer
	state   latest.Cell[*controlv1.State]
	metrics *metrics.Set
	changed func()

	requests, desired, observed, converged *metrics.Vec
	gate                                   gate.Figures
}

func newControl(m *metrics.Set, changed func()) *control {
	c := &control{
		metrics: m, changed: changed,
		requests:  m.Counter("bulkhead_gateway_requests_total", "HTTP requests by status class.", "class"),
		gate:      gate.NewFigures(m, "bulkhead_gateway"),
		desired:   m.Gauge("bulkhead_gateway_generation_desired", "Generation of the configuration to work towards."),
		observed:  m.Gauge("bulkhead_gateway_generation_observed", "Generation of the configuration in force."),
		converged: m.Gauge("bulkhead_gateway_converged", "1 if nothing is left to do."),
	}
	c.state.Set(&controlv1.State{})
	return c
}

func (c *control) SetSpec(_ context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	generation := r.GetSpec().GetGeneration()
	if generation == 0 {
		return nil, errs.New(errs.Invalid, "spec: generation is 0, must be at least 1")
	}
	if _, err := config.Parse("spec", r.GetSpec().GetDocuments()); err != nil {
		return nil, errs.New(errs.Invalid, "spec: %w", err)
	}
	have, _ := c.state.Get()
	if generation < have.Generation {
		return nil, errs.New(errs.Conflict, "generation %d is older than %d, which runs", generation, have.Generation)
	}
	c.state.Set(&controlv1.State{Generation: generation, Converged: true})
	c.desired.Set(float64(generation))
	c.observed.Set(float64(generation))
	c.converged.Set(1)
	if generation > have.Generation {
		c.changed()
	}
	return &controlv1.SetSpecResponse{}, nil
}

func (c *control) PlanSpec(context.Context, *controlv1.PlanSpecRequest) (*controlv1.PlanSpecResponse, error) {
	return &controlv1.PlanSpecResponse{}, nil
}

func (c *control) WatchState(_ *controlv1.WatchStateRequest, s grpc.ServerStreamingServer[controlv1.State]) error {
	return c.state.Watch(s.Context(), s.Send)
}

func (c *control) ReadMetrics(context.Context, *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	return &controlv1.ReadMetricsResponse{Families: c.metrics.Families()}, nil
}
