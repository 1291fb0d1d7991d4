package gateway

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

// register lists nodes for the token "good", and none can be listed for the token "early".
type register struct {
	clusterv1.UnimplementedRegistryServer
}

func (register) ListNodes(ctx context.Context, _ *clusterv1.ListNodesRequest) (*clusterv1.ListNodesResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if a := md.Get("authorization"); len(a) == 1 && a[0] == "Bearer early" {
		return nil, status.Error(codes.Unavailable, "nodes: there is no quorum")
	}
	return &clusterv1.ListNodesResponse{Nodes: []*clusterv1.Node{
		{Name: "cp1", Role: "controlplane", Version: "v0.1.0", State: "ready", Addresses: []string{"10.5.0.11", "192.0.2.1"}},
		{Name: "w1", Role: "worker", Version: "v0.0.9", State: "lost", Addresses: []string{"2001:db8::7"}},
		{Name: "w2", Role: "worker", Version: "v0.1.0", State: "ready"},
	}}, admit(ctx)
}

// labelName is that of Prometheus' data model; http_sd refuses a whole list for one that is none.
var labelName = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

// discovered reads an answer as Prometheus does: status 200, type application/json, and the documented form with nothing more in it.
func discovered(t *testing.T, res *http.Response, body string) map[string]map[string]string {
	t.Helper()
	if res.StatusCode != 200 || !regexp.MustCompile(`^(?i:application/json)(\s*;\s*charset=("utf-8"|utf-8))?$`).MatchString(strings.ToLower(res.Header.Get("Content-Type"))) {
		t.Fatalf("%s, %q: %s", res.Status, res.Header.Get("Content-Type"), body)
	}
	var groups []struct {
		Targets []string          `json:"targets"`
		Labels  map[string]string `json:"labels"`
	}
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&groups); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	out := map[string]map[string]string{}
	for _, g := range groups {
		if len(g.Targets) != 1 {
			t.Errorf("%d targets of one node", len(g.Targets))
		}
		if _, _, err := net.SplitHostPort(g.Targets[0]); err != nil {
			t.Errorf("target %q: %v", g.Targets[0], err)
		}
		for name := range g.Labels {
			if !labelName.MatchString(name) {
				t.Errorf("label %q", name)
			}
		}
		g.Labels["__address__"] = g.Targets[0]
		out[g.Labels["node"]] = g.Labels
	}
	return out
}

// Prometheus finds every node, and what it then scrapes is that node's figures: directly, or all through one gateway.
func TestTargets(t *testing.T) {
	h := serve(t)
	good := map[string]string{"Authorization": "Bearer good"}
	res, body := do(t, "GET", h.URL+targetsPath, good)
	direct := discovered(t, res, body)
	for node, want := range map[string]map[string]string{
		"cp1": {"__address__": "10.5.0.11:50001", "__scheme__": "https", "__metrics_path__": "/metrics", "role": "controlplane", "version": "v0.1.0", "__meta_bulkhead_state": "ready"},
		"w1":  {"__address__": "[2001:db8::7]:50001", "role": "worker", "version": "v0.0.9", "__meta_bulkhead_state": "lost"},
		"w2":  {"__address__": "w2:50001"},
	} {
		for k, v := range want {
			if direct[node][k] != v {
				t.Errorf("%s: %s is %q, want %q", node, k, direct[node][k], v)
			}
		}
	}
	res, body = do(t, "GET", h.URL+targetsPath+"?via=gateway", good)
	through := discovered(t, res, body)
	if len(direct) != 3 || len(through) != 3 {
		t.Fatalf("%d and %d nodes, want 3", len(direct), len(through))
	}
	for node, l := range through {
		at := url.URL{Scheme: "http", Host: l["__address__"], Path: l["__metrics_path__"], RawQuery: url.Values{"node": {l["__param_node"]}}.Encode()} // the test's server has no TLS
		if _, text := do(t, "GET", at.String(), good); !strings.Contains(text, `bulkhead_x_on_total{daemon="x",node="`+node+`"} 1`) || l["instance"] != node {
			t.Errorf("%s at %s: %s", node, &at, text)
		}
	}
	// Whoever may not see metrics sees no targets, and an error is no empty list.
	for _, c := range []struct {
		token, query string
		code         int
		says         string
	}{
		{"", "", 401, "no valid credential"}, {"bad", "", 401, "no valid credential"}, {"early", "", 503, "no quorum"}, {"good", "?via=magic", 400, "allowed are direct"},
	} {
		header := map[string]string{}
		if c.token != "" {
			header["Authorization"] = "Bearer " + c.token
		}
		if res, body := do(t, "GET", h.URL+targetsPath+c.query, header); res.StatusCode != c.code || !strings.Contains(body, c.says) {
			t.Errorf("token %q%s: %s %s, want %d", c.token, c.query, res.Status, body, c.code)
		}
	}
	if data, err := json.Marshal(targets(nil, "")); string(data) != "[]" || err != nil {
		t.Errorf("no nodes: %s, %v", data, err)
	}
}
