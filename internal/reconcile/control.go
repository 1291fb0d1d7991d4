package reconcile

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// Control is the Control service of a daemon with a Loop.
type Control[Spec, State any, Step fmt.Stringer] struct {
	controlv1.UnimplementedControlServer
	Loop    *Loop[Spec, State, Step]
	Metrics *metrics.Set
}

func (c *Control[Spec, State, Step]) SetSpec(_ context.Context, r *controlv1.SetSpecRequest) (*controlv1.SetSpecResponse, error) {
	spec, err := c.parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	return &controlv1.SetSpecResponse{}, c.Loop.Set(r.GetSpec().GetGeneration(), spec)
}

func (c *Control[Spec, State, Step]) PlanSpec(ctx context.Context, r *controlv1.PlanSpecRequest) (*controlv1.PlanSpecResponse, error) {
	spec, err := c.parse(r.GetSpec())
	if err != nil {
		return nil, err
	}
	have, err := c.Loop.sys.Observe(ctx)
	if err != nil {
		return nil, err
	}
	steps, err := c.Loop.sys.Plan(spec, have)
	if err != nil {
		return nil, errs.New(errs.Precondition, "%w", err)
	}
	out := &controlv1.PlanSpecResponse{}
	for _, s := range steps {
		out.Steps = append(out.Steps, s.String())
	}
	return out, nil
}

func (c *Control[Spec, State, Step]) WatchState(_ *controlv1.WatchStateRequest, s grpc.ServerStreamingServer[controlv1.State]) error {
	return c.Loop.state.Watch(s.Context(), s.Send)
}

func (c *Control[Spec, State, Step]) ReadMetrics(context.Context, *controlv1.ReadMetricsRequest) (*controlv1.ReadMetricsResponse, error) {
	return &controlv1.ReadMetricsResponse{Families: c.Metrics.Families()}, nil
}

func (c *Control[Spec, State, Step]) parse(s *controlv1.Spec) (Spec, error) {
	var none Spec
	if s.GetGeneration() == 0 {
		return none, errs.New(errs.Invalid, "spec: generation is 0, must be at least 1")
	}
	spec, err := c.Loop.sys.Parse(s.GetDocuments())
	if err != nil {
		return none, errs.New(errs.Invalid, "spec: %w", err)
	}
	return spec, nil
}
