package kubeletd

import (
	"encoding/base64"

	"google.golang.org/protobuf/proto"

	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// figures is the daemon's metrics.
type figures struct {
	desired, observed, converged *metrics.Vec
	api, node, up, healthy       *metrics.Vec
}

func newFigures(m *metrics.Set) figures {
	return figures{
		desired:   m.Gauge("bulkhead_kubeletd_generation_desired", "Generation of the configuration that is worked towards."),
		observed:  m.Gauge("bulkhead_kubeletd_generation_observed", "Generation of the configuration of the last round."),
		converged: m.Gauge("bulkhead_kubeletd_converged", "1 if the last round left nothing to do."),
		api:       m.Gauge("bulkhead_kubeletd_api_ready", "1 if the API server is ready."),
		node:      m.Gauge("bulkhead_kubeletd_node_ready", "1 if the kubelet reports the node Ready."),
		up:        m.Gauge("bulkhead_kubeletd_component_up", "1 if the component's unit runs, or has done what it is for.", "component"),
		healthy:   m.Gauge("bulkhead_kubeletd_component_healthy", "1 if the component runs and answers well.", "component"),
	}
}

// report is called after each round with what was read.
func (d *Daemon) report(s State) {
	want, generation := d.loop.Spec()
	st := d.loop.State()
	d.kernel.mu.Lock()
	version := d.kernel.version
	d.kernel.mu.Unlock()
	out := statusOf(want, s)
	out.Generation, out.Converged, out.Pending, out.Error, out.Version = st.GetGeneration(), st.GetConverged(), st.GetPending(), st.GetError(), version
	if was, _ := d.status.Get(); !proto.Equal(was, out) {
		d.status.Set(out)
	}
	d.figures.desired.Set(float64(generation))
	d.figures.observed.Set(float64(st.GetGeneration()))
	d.figures.converged.Set(number(st.GetConverged()))
	d.figures.api.Set(number(out.GetApiReady()))
	d.figures.node.Set(number(out.GetNodeReady()))
	d.figures.up.Reset()
	d.figures.healthy.Reset()
	for _, c := range out.GetComponents() {
		d.figures.up.Set(number(c.GetState() == "up" || c.GetState() == "done"), c.GetName())
		d.figures.healthy.Set(number(c.GetHealthy()), c.GetName())
	}
}

// statusOf says what was read in the API's words. It is pure.
func statusOf(want spec, s State) *kubernetesv1.Status {
	out := &kubernetesv1.Status{ApiReady: s.API, NodeName: want.Node, NodeReason: "the kubelet has not registered the node yet"}
	if s.Absent {
		out.NodeReason = "this image has no Kubernetes"
		return out
	}
	if s.Node != nil {
		out.NodeReady, out.NodeReason = s.Node.Ready, s.Node.Reason
	}
	for _, r := range rules {
		if want.Role == config.Worker && !r.worker {
			continue
		}
		u := s.Units[r.unit]
		c := &kubernetesv1.Component{Name: r.unit, State: u.State, Detail: u.LastExit}
		switch h, asked := s.Health[r.unit]; {
		case r.once && s.loaded(r.unit):
			c.State, c.Healthy, c.Detail = "done", true, ""
		case u.State != "up":
		case asked && h != "":
			c.Detail = h
		default: // units without a probe are well if they run
			c.Healthy, c.Detail = true, ""
		}
		out.Components = append(out.Components, c)
	}
	return out
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func base64Of(data []byte) string { return base64.StdEncoding.EncodeToString(data) }
