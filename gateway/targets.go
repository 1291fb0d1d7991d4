package gateway

import (
	"encoding/json"
	"net"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

const (
	targetsPath = "/v1/prometheus/targets"
	ownPort     = "50001"
)

// targetGroup is one element of what Prometheus' http_sd reads (https://prometheus.io/docs/prometheus/latest/http_sd/).
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// targetsHandler lists every node of the cluster for Prometheus' http_sd, read with the caller's own token. An error is never an empty list: Prometheus would forget
// all nodes, and so keeps those it knew.
func targetsHandler(apid *grpc.ClientConn) http.Handler {
	registry := clusterv1.NewRegistryClient(apid)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		via := r.URL.Query().Get("via")
		if via != "" && via != "gateway" && via != "direct" {
			refuse(r.Context(), w, status.Errorf(codes.InvalidArgument, "via: %.40q; allowed are direct (each node is scraped itself, the default) and gateway (all are scraped through this one)", via))
			return
		}
		ctx := r.Context()
		if token := r.Header.Get("Authorization"); token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "authorization", token)
		}
		resp, err := registry.ListNodes(ctx, &clusterv1.ListNodesRequest{})
		if err != nil {
			refuse(r.Context(), w, err)
			return
		}
		through := ""
		if via == "gateway" {
			through = r.Host
		}
		data, err := json.Marshal(targets(resp.GetNodes(), through))
		if err != nil {
			writeProblem(w, status.Convert(err))
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		_, _ = w.Write(data) // the caller may be gone
	})
}

// targets makes one group for each node, also for those that are lost: that they do not answer is what an alert wants to see. through is the address at which
// all are scraped; "": each at its own first address. It is pure.
func targets(nodes []*clusterv1.Node, through string) []targetGroup {
	out := []targetGroup{} // none is [], not null
	for _, n := range nodes {
		g := targetGroup{Labels: map[string]string{
			"__scheme__": "https", "__metrics_path__": "/metrics", "__meta_bulkhead_state": n.GetState(),
			"node": n.GetName(), "role": n.GetRole(), "version": n.GetVersion(),
		}}
		switch {
		case through != "":
			g.Targets = []string{through}
			g.Labels["__param_node"] = n.GetName()
			g.Labels["instance"] = n.GetName() // else all would be one instance
		case len(n.GetAddresses()) > 0:
			g.Targets = []string{net.JoinHostPort(n.GetAddresses()[0], ownPort)}
		default: // no address is known: its name may be one in DNS
			g.Targets = []string{net.JoinHostPort(n.GetName(), ownPort)}
		}
		out = append(out, g)
	}
	return out
}
