package gateway

import (
	"fmt"
	"maps"
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
)

// metricsHandler turns the figures of all daemons into Prometheus' text, read with the caller's own token: a scrape
// without one gets 401 like any other request.
func metricsHandler(apid *grpc.ClientConn) http.Handler {
	machine := machinev1.NewMachineClient(apid)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := metadata.NewOutgoingContext(r.Context(), nodeOf(r.Context()))
		if token := r.Header.Get("Authorization"); token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
		}
		resp, err := machine.ListMetrics(ctx, &machinev1.ListMetricsRequest{})
		if err != nil {
			refuse(r.Context(), w, err)
			return
		}
		reg := prometheus.NewRegistry()
		if err := reg.Register(collector(resp.Daemons)); err != nil {
			writeProblem(w, status.Convert(err))
			return
		}
		promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}).ServeHTTP(w, r)
	})
}

// collector is one answer of ListMetrics as a prometheus.Collector. It describes nothing beforehand: an unchecked collector.
type collector []*machinev1.DaemonMetrics

func (collector) Describe(chan<- *prometheus.Desc) {}

func (c collector) Collect(out chan<- prometheus.Metric) {
	up := prometheus.NewDesc("bulkhead_daemon_up", "1 if the daemon answered with its figures.", []string{"daemon"}, nil)
	for _, d := range c {
		v := 1.0
		if d.Error != "" {
			v = 0
		}
		out <- prometheus.MustNewConstMetric(up, prometheus.GaugeValue, v, d.Daemon)
		for _, f := range d.Families {
			collectFamily(out, d.Daemon, f)
		}
	}
}

// collectFamily gives every sample the label daemon. A name or label that Prometheus does not take becomes an error in the
// scrape, not a crash.
func collectFamily(out chan<- prometheus.Metric, daemon string, f *controlv1.Family) {
	kind := prometheus.GaugeValue
	if f.Type == controlv1.Family_COUNTER {
		kind = prometheus.CounterValue
	}
	for _, s := range f.Samples {
		names := slices.Sorted(maps.Keys(s.Labels))
		values := make([]string, 0, len(names)+1)
		for _, n := range names {
			values = append(values, s.Labels[n])
		}
		desc := prometheus.NewDesc(f.Name, f.Help, append(names, "daemon"), nil)
		m, err := prometheus.NewConstMetric(desc, kind, s.Value, append(values, daemon)...)
		if err != nil {
			m = prometheus.NewInvalidMetric(desc, fmt.Errorf("%s of %s: %w", f.Name, daemon, err))
		}
		out <- m
	}
}
