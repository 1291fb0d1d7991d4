package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzREST sends a gateway requests as they stand on the wire. In place of apid there is one that answers whoever has the token, whatever is asked, and wants to see
// nothing of a request's headers but that and the node. A request is answered or it is refused with a reason, and never is the gateway itself at fault.
func FuzzREST(f *testing.F) {
	l := bufconn.Listen(64 << 10)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(s.Context())
		for key := range md {
			if strings.HasPrefix(key, "bulkhead-") && key != peer.NodeKey || strings.HasPrefix(key, "x-") && !strings.HasPrefix(key, "x-forwarded-") {
				return status.Errorf(codes.Internal, "metadata %q got through the gateway", key)
			}
		}
		if a := md.Get("authorization"); len(a) != 1 || a[0] != "Bearer good" {
			return status.Error(codes.Unauthenticated, "no valid credential")
		}
		if err := s.RecvMsg(new(emptypb.Empty)); err != nil {
			return err
		}
		return s.SendMsg(new(emptypb.Empty))
	}))
	go func() { _ = s.Serve(l) }()
	f.Cleanup(s.Stop)
	conn, err := grpc.NewClient("passthrough:", grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { conn.Close() })
	g, err := New(Config{Env: daemon.Env{Log: slog.New(slog.DiscardHandler), TCP: l, Metrics: metrics.New("gateway")}, Apid: conn, Leaf: leaf.New(leaf.Config{Trust: leaf.NewTrust(nil, slog.New(slog.DiscardHandler))})})
	if err != nil {
		f.Fatal(err)
	}
	const good = " HTTP/1.1\r\nHost: n1\r\nAuthorization: Bearer good\r\n"
	for _, request := range []string{
		"GET /v1/version" + good + "\r\n",
		"GET /v1/version HTTP/1.1\r\nHost: n1\r\n\r\n",
		"GET /v1/version HTTP/1.1\r\nHost: n1\r\nAuthorization: Bearer bad\r\nX-Evil: 1\r\nBulkhead-Roles: admin\r\nGrpc-Metadata-Bulkhead-Caller: root\r\n\r\n",
		"GET /v1/nodes/w1.example/services/ap%69d/logs?tail=10&follow=true" + good + "Accept: text/event-stream\r\n\r\n",
		"GET /v1/events?tail=many&node=w1" + good + "\r\n",
		"POST /v1/services/apid:restart" + good + "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 6\r\n\r\nname=x",
		"POST /v1/config:apply" + good + "Content-Type: application/json\r\nContent-Length: 37\r\n\r\n{\"documents\":\"YQ==\",\"dryRun\":  true }",
		"POST /v1/config:apply" + good + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"DELETE /v1/trust/tokens/%2e%2e" + good + "\r\n",
		"GET /v1/services/%ff/logs" + good + "\r\n",
		"GET /v1/events?kind=%c3%28" + good + "\r\n",
		"GET /v1/nodes/%ff/version" + good + "\r\n",
		"GET /metrics?node=w1" + good + "\r\n", "GET /v1/prometheus/targets?via=gateway" + good + "\r\n", "GET /openapi.json HTTP/1.0\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET https://n1//v1/../v1/version" + good + "Grpc-Timeout: 1H\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	testfuzz.Run(f, func(t *testing.T, text []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			return
		}
		for key, values := range r.Header { // net/http's server looks at this before a handler does
			for _, v := range values {
				if !httpguts.ValidHeaderFieldName(key) || !httpguts.ValidHeaderFieldValue(v) {
					return
				}
			}
		}
		w := httptest.NewRecorder()
		g.server.Handler.ServeHTTP(w, r)
		body := w.Body.Bytes()
		switch {
		case w.Code < 200 || w.Code >= 500 && !(w.Code == http.StatusGatewayTimeout && r.Header.Get("Grpc-Timeout") != ""):
			t.Errorf("%q is answered with %d %s", text, w.Code, body)
		case w.Code < 300 && r.Header.Get("Authorization") != "Bearer good" && r.URL.Path != "/openapi.json":
			t.Errorf("%q is answered with %d %s, for nobody", text, w.Code, body)
		case w.Code >= 400:
			var p problem
			if err := json.Unmarshal(body, &p); err != nil || p.Status != w.Code || p.Detail == "" || len(p.Detail) > 8<<10 || w.Header().Get("Content-Type") != "application/problem+json" {
				t.Errorf("%q is refused with %d %s %q: %v", text, w.Code, w.Header().Get("Content-Type"), body, err)
			}
		}
	})
}
