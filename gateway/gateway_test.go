package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	authv1 "github.com/bulkhead-os/bulkhead/api/auth/v1"
	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/gate"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// door is what the gateway needs of apid: it refuses calls without the token "good".
type door struct {
	machinev1.UnimplementedMachineServer
	healthv1.UnimplementedHealthServer
	configv1.UnimplementedConfigServer
}

func (door) Check(ctx context.Context, _ *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	return &healthv1.HealthCheckResponse{}, admit(ctx)
}

func (door) Apply(ctx context.Context, r *configv1.ApplyRequest) (*configv1.ApplyResponse, error) {
	return &configv1.ApplyResponse{Generation: uint64(len(r.Documents))}, admit(ctx)
}

func admit(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	for key := range md {
		if strings.HasPrefix(key, "bulkhead-") && key != peer.NodeKey || key == "x-evil" {
			return status.Errorf(codes.Internal, "metadata %q got through the gateway", key)
		}
	}
	if a := md.Get("authorization"); len(a) != 1 || a[0] != "Bearer good" {
		return status.Error(codes.Unauthenticated, "no valid credential")
	}
	return nil
}

func (door) GetVersion(ctx context.Context, _ *machinev1.GetVersionRequest) (*machinev1.GetVersionResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	return &machinev1.GetVersionResponse{Version: "v1.2.3", Platform: fmt.Sprint(md.Get(peer.NodeKey))}, admit(ctx)
}

func (door) RestartService(ctx context.Context, r *machinev1.RestartServiceRequest) (*machinev1.RestartServiceResponse, error) {
	if err := admit(ctx); err != nil {
		return nil, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	return nil, status.Errorf(codes.PermissionDenied, "RestartService needs role operator or admin (unit %s%v)", r.Name, md.Get(peer.NodeKey))
}

func (door) StreamEvents(_ *machinev1.StreamEventsRequest, s grpc.ServerStreamingServer[machinev1.Event]) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	for _, text := range append(md.Get(peer.NodeKey), "one", "two") {
		if err := s.Send(&machinev1.Event{Text: text}); err != nil {
			return err
		}
	}
	return nil
}

func (door) StreamKernelLog(_ *machinev1.StreamKernelLogRequest, s grpc.ServerStreamingServer[machinev1.LogLine]) error {
	return admit(s.Context())
}

func (door) ListMetrics(ctx context.Context, _ *machinev1.ListMetricsRequest) (*machinev1.ListMetricsResponse, error) {
	m := metrics.New("x")
	m.Counter("bulkhead_x_things_total", "Things.", "kind").Add(3, "a\"b")
	md, _ := metadata.FromIncomingContext(ctx)
	for _, node := range md.Get(peer.NodeKey) {
		m.Counter("bulkhead_x_on_total", "Node.", "node").Add(1, node)
	}
	return &machinev1.ListMetricsResponse{Daemons: []*machinev1.DaemonMetrics{
		{Daemon: "x", Families: m.Families()}, {Daemon: "y", Families: metrics.New("y").Families()},
		{Daemon: "z", Error: "does not answer"},
		{Daemon: "bad", Families: []*controlv1.Family{{Name: "not a name", Type: controlv1.Family_GAUGE, Samples: []*controlv1.Sample{{Value: 1}}}}},
	}}, admit(ctx)
}

// serve starts the gateway's handler in front of a door, on plain HTTP.
func serve(t *testing.T) *httptest.Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	machinev1.RegisterMachineServer(s, door{})
	clusterv1.RegisterRegistryServer(s, register{})
	healthv1.RegisterHealthServer(s, door{})
	configv1.RegisterConfigServer(s, door{})
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	g, err := New(Config{Env: daemon.Env{Log: slog.New(slog.DiscardHandler), TCP: l, Metrics: metrics.New("gateway")}, Apid: conn, Leaf: leaf.New(leaf.Config{Trust: leaf.NewTrust(nil, slog.New(slog.DiscardHandler))})})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewUnstartedServer(g.server.Handler)
	h.Listener = gate.New(h.Listener, 4, 4, g.control.gate)
	h.Config.ConnContext = withPlace
	h.Start()
	t.Cleanup(h.Close)
	return h
}

func do(t *testing.T, method, url string, header map[string]string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func TestREST(t *testing.T) {
	h := serve(t)
	good := map[string]string{"Authorization": "Bearer good", "Bulkhead-Roles": "admin", "X-Evil": "1", "Grpc-Metadata-Bulkhead-Caller": "root"}
	for _, c := range []struct {
		name, method, path string
		header             map[string]string
		status             int
		kind, body         string
	}{
		{"get", "GET", "/v1/version", good, 200, "application/json", `"version":"v1.2.3"`},
		{"no token", "GET", "/v1/version", nil, 401, "application/problem+json", `"code":"UNAUTHENTICATED"`},
		{"wrong role", "POST", "/v1/services/apid:restart", good, 403, "application/problem+json", `needs role operator or admin (unit apid[])`},
		{"this node", "GET", "/v1/version", good, 200, "application/json", `"platform":"[]"`},
		{"another node", "GET", "/v1/version?node=w1", good, 200, "application/json", `"platform":"[w1]"`},
		{"another node, in the path", "GET", "/v1/nodes/w1.example/version", good, 200, "application/json", `"platform":"[w1.example]"`},
		{"a change on another node", "POST", "/v1/nodes/w1/services/ap%69d:restart", good, 403, "application/problem+json", `(unit apid[w1])`},
		{"a stream of another node", "GET", "/v1/nodes/w1/events?tail=3", good, 200, "application/json", `"text":"w1"`},
		{"a query besides the node", "GET", "/v1/events?tail=many&node=w1", good, 400, "application/problem+json", `"code":"INVALID_ARGUMENT"`},
		{"two nodes", "GET", "/v1/nodes/w1/version?node=w2", good, 400, "application/problem+json", `2 nodes are named`},
		{"one twice", "GET", "/v1/version?node=w2&node=w2", good, 400, "application/problem+json", `2 nodes are named`},
		{"no node", "GET", "/v1/version?node=", good, 400, "application/problem+json", `no name of a node`},
		{"a name with a line's end", "GET", "/v1/version?node=w1%0d%0ax-evil:1", good, 400, "application/problem+json", `no name of a node`},
		{"nothing on a node", "GET", "/v1/nodes/w1/nothing", good, 404, "application/problem+json", `/openapi.json`},
		{"another node without token", "GET", "/v1/version?node=w1", nil, 401, "application/problem+json", `"code":"UNAUTHENTICATED"`},
		{"another node's figures", "GET", "/metrics?node=w1", good, 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", `bulkhead_x_on_total{daemon="x",node="w1"} 1`},
		{"the list of nodes is no node", "GET", "/v1/nodes", good, 200, "application/json", `"nodes":[{"name":"cp1"`},

		{"no such path", "GET", "/v1/nothing", good, 404, "application/problem+json", `/openapi.json`},
		{"a path that is no text", "GET", "/v1/services/%ff/logs", good, 400, "application/problem+json", `the path is no UTF-8`},
		{"a query that is no text", "GET", "/v1/events?daemon=%c3%28", good, 400, "application/problem+json", `the query is no UTF-8`},
		{"a token that cannot be one", "GET", "/v1/version", map[string]string{"Authorization": "Bearer g\u00f6\u00f6d"}, 401, "application/problem+json", `printable ASCII`},
		{"outside", "GET", "/", nil, 404, "application/problem+json", `/openapi.json`},
		{"wrong method", "DELETE", "/v1/version", good, 405, "application/problem+json", `DELETE is not allowed`},
		{"bad query", "GET", "/v1/events?tail=many", good, 400, "application/problem+json", `"code":"INVALID_ARGUMENT"`},
		{"lines", "GET", "/v1/events", good, 200, "application/json", `{"result":`},
		{"events", "GET", "/v1/events", map[string]string{"Accept": "text/event-stream"}, 200, "text/event-stream", "data: {"},
		{"stream without token", "GET", "/v1/kernel/log", nil, 401, "application/problem+json", `"code":"UNAUTHENTICATED"`},
		{"events without token", "GET", "/v1/kernel/log", map[string]string{"Accept": "text/event-stream"}, 401, "application/problem+json", `{"type":`},
		{"openapi", "GET", "/openapi.json", nil, 200, "application/json", `"openapi": "3.1.0"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, body := do(t, c.method, h.URL+c.path, c.header)
			if resp.StatusCode != c.status || resp.Header.Get("Content-Type") != c.kind || !strings.Contains(body, c.body) {
				t.Errorf("%s %s = %d %s\n%s\nwant %d %s with %s", c.method, c.path, resp.StatusCode, resp.Header.Get("Content-Type"), body, c.status, c.kind, c.body)
			}
		})
	}
}

// TestPublicRPCs walks every proto: what apid would let out must be in REST and in the OpenAPI document.
func TestPublicRPCs(t *testing.T) {
	var doc struct {
		Paths map[string]map[string]json.RawMessage
	}
	h := serve(t)
	anything := regexp.MustCompile(`\{[^}]*\}`)
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	nowhere := []authv1.Role{authv1.Role_INTERNAL, authv1.Role_CLAIM, authv1.Role_UNLOCK, authv1.Role_NODE, authv1.Role_JOIN} // each is proved by something that REST has not
	seen := 0
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			for j := range f.Services().Get(i).Methods().Len() {
				m := f.Services().Get(i).Methods().Get(j)
				need, _ := proto.GetExtension(m.Options(), authv1.E_Need).([]authv1.Role)
				if len(need) == 0 || slices.Contains(nowhere, need[0]) || m.IsStreamingClient() { // no such thing in REST
					continue
				}
				seen++
				rule, _ := proto.GetExtension(m.Options(), annotations.E_Http).(*annotations.HttpRule)
				path := rule.GetGet() + rule.GetPost() + rule.GetDelete()
				there := strings.Replace(path, "/v1/", "/v1/nodes/{node}/", 1)
				for p, parameter := range map[string]string{path: "#/components/parameters/node", there: "#/components/parameters/nodeInPath"} {
					if item := doc.Paths[p]; p == "" || !strings.Contains(string(item["parameters"]), `"`+parameter+`"`) {
						t.Errorf("%s: path %q is not in openapi.json with parameter %s", m.FullName(), p, parameter)
					}
				}
				if rule.GetBody() != "*" && m.Input().Fields().ByName("node") != nil {
					t.Errorf("%s: its field \"node\" cannot be in a query, where that is the node that is to answer", m.FullName())
				}
				method := map[bool]string{rule.GetGet() != "": "GET", rule.GetPost() != "": "POST", rule.GetDelete() != "": "DELETE"}[true]
				for _, p := range []string{path, there} {
					resp, body := do(t, method, h.URL+anything.ReplaceAllString(p, "x"), map[string]string{"Authorization": "Bearer good"})
					if resp.StatusCode == 405 || resp.StatusCode == 404 {
						t.Errorf("%s %s: %d %s: it is not registered in rest.go", method, p, resp.StatusCode, body)
					}
				}
			}
		}
		return true
	})
	if seen < 20 {
		t.Errorf("saw %d public RPCs: the walk does not work", seen)
	}
}

func TestMetrics(t *testing.T) {
	h := serve(t)
	if resp, _ := do(t, "GET", h.URL+"/metrics", nil); resp.StatusCode != 401 {
		t.Errorf("without a token: %d, want 401", resp.StatusCode)
	}
	resp, body := do(t, "GET", h.URL+"/metrics", map[string]string{"Authorization": "Bearer good"})
	if resp.StatusCode != 200 {
		t.Fatalf("%d: %s", resp.StatusCode, body)
	}
	for _, want := range []string{
		`bulkhead_x_things_total{daemon="x",kind="a\"b"} 3`,
		`bulkhead_daemon_up{daemon="x"} 1`, `bulkhead_daemon_up{daemon="z"} 0`,
		`bulkhead_daemon_goroutines{daemon="y"}`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
}
