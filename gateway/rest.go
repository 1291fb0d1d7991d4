package gateway

import (
	"context"
	_ "embed"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"strings"
	"unicode/utf8"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
)

//go:embed openapi.json
var openAPI []byte

// routes is everything that HTTP sees.
func (g *Gateway) routes() (http.Handler, error) {
	json := messages{&runtime.JSONPb{MarshalOptions: protojson.MarshalOptions{EmitDefaultValues: true}}}
	rest := runtime.NewServeMux(
		runtime.WithMarshalerOption(runtime.MIMEWildcard, json),
		runtime.WithMarshalerOption("text/event-stream", events{json}),
		runtime.WithIncomingHeaderMatcher(passHeader),
		runtime.WithOutgoingHeaderMatcher(func(string) (string, bool) { return "", false }),
		runtime.WithMetadata(func(ctx context.Context, _ *http.Request) metadata.MD { return nodeOf(ctx) }),
		runtime.WithErrorHandler(func(ctx context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, _ *http.Request, err error) {
			refuse(ctx, w, err)
		}),
		runtime.WithRoutingErrorHandler(routingProblem),
	)
	ctx := context.Background() // the handlers close nothing: the connection is the caller's
	for _, register := range []func(context.Context, *runtime.ServeMux, *grpc.ClientConn) error{
		machinev1.RegisterMachineHandler, configv1.RegisterConfigHandler, networkv1.RegisterNetworkHandler, storagev1.RegisterStorageHandler, storagev1.RegisterKeysHandler, storagev1.RegisterSecureBootHandler,
		accessv1.RegisterAccessHandler, trustv1.RegisterTrustHandler, trustv1.RegisterMembershipHandler, trustv1.RegisterAuthoritiesHandler, clusterv1.RegisterRegistryHandler, clusterv1.RegisterRollingHandler, etcdv1.RegisterEtcdHandler, kubernetesv1.RegisterKubernetesHandler, updatev1.RegisterUpdateHandler,
	} {
		if err := register(ctx, rest, g.cfg.Apid); err != nil {
			return nil, err
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/v1/", onNode(rest))
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI)
	})
	mux.Handle("GET /metrics", onNode(metricsHandler(g.cfg.Apid)))
	mux.Handle("GET "+targetsPath, targetsHandler(g.cfg.Apid))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeProblem(w, status.Newf(codes.NotFound, "nothing at %.100q; the paths are in /openapi.json", r.URL.Path))
	})
	return mux, nil
}

// readable refuses what no call can carry. gRPC would find it only when it writes the call, and call it an error of the gateway.
func readable(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query, err := url.QueryUnescape(r.URL.RawQuery)
		switch {
		case !strings.HasPrefix(r.URL.Path, "/"):
			writeProblem(w, status.Newf(codes.InvalidArgument, "%.100q is no path; the paths are in /openapi.json", r.RequestURI))
			return
		case !utf8.ValidString(r.URL.Path):
			writeProblem(w, status.Newf(codes.InvalidArgument, "the path is no UTF-8: %.100q", r.URL.Path))
			return
		case err == nil && !utf8.ValidString(query): // what cannot be read is refused where it is read
			writeProblem(w, status.Newf(codes.InvalidArgument, "the query is no UTF-8: %.100q", query))
			return
		}
		for _, token := range r.Header.Values("Authorization") {
			if strings.ContainsFunc(token, func(c rune) bool { return c < ' ' || c > '~' }) {
				writeProblem(w, status.New(codes.Unauthenticated, "no valid credential: Authorization has characters that are no printable ASCII"))
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// passHeader lets no header through: grpc-gateway itself passes the bearer token and the caller's own time limit.
func passHeader(string) (string, bool) { return "", false }

// secured adds the headers that browsers should always see.
func secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		h.Set("Strict-Transport-Security", "max-age=31536000")
		next.ServeHTTP(w, r)
	})
}

func routingProblem(_ context.Context, _ *runtime.ServeMux, _ runtime.Marshaler, w http.ResponseWriter, r *http.Request, code int) {
	switch code {
	case http.StatusMethodNotAllowed:
		writeProblemAs(w, code, status.Newf(codes.Unimplemented, "%s is not allowed for %.100q; /openapi.json has the methods", r.Method, r.URL.Path))
	case http.StatusNotFound:
		writeProblemAs(w, code, status.Newf(codes.NotFound, "nothing at %.100q; the paths are in /openapi.json", r.URL.Path))
	default:
		writeProblemAs(w, code, status.New(codes.InvalidArgument, http.StatusText(code)))
	}
}

// problem is an RFC 9457 problem document, with the gRPC code as extension member.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	Code   string `json:"code"`
}

func writeProblem(w http.ResponseWriter, s *status.Status) {
	writeProblemAs(w, runtime.HTTPStatusFromCode(s.Code()), s)
}

func writeProblemAs(w http.ResponseWriter, code int, s *status.Status) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(newProblem(code, s))
}

func newProblem(code int, s *status.Status) problem {
	return problem{"about:blank", http.StatusText(code), code, s.Message(), strings.ToUpper(camelGap(s.Code().String()))}
}

// messages writes JSON, and a stream's error, which grpc-gateway hands to the marshaler, as a problem too: as the whole answer if the
// stream never began, else as its last line.
type messages struct{ *runtime.JSONPb }

func streamError(v any) (*status.Status, bool) {
	chunk, ok := v.(map[string]proto.Message)
	if !ok {
		return nil, false
	}
	e, ok := chunk["error"].(*spb.Status)
	return status.FromProto(e), ok
}

func (m messages) ContentType(v any) string {
	if _, ok := streamError(v); ok {
		return "application/problem+json"
	}
	return m.JSONPb.ContentType(v)
}

func (m messages) Marshal(v any) ([]byte, error) {
	if s, ok := streamError(v); ok {
		return json.Marshal(newProblem(runtime.HTTPStatusFromCode(s.Code()), s))
	}
	return m.JSONPb.Marshal(v)
}

// camelGap turns "PermissionDenied" into "Permission_Denied".
func camelGap(s string) string {
	var b strings.Builder
	for i, r := range s {
		if i > 0 && r >= 'A' && r <= 'Z' && s[i-1] >= 'a' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	return b.String()
}

// events writes each message of a stream as a server-sent event (WHATWG HTML, section 9.2).
type events struct{ messages }

func (e events) ContentType(v any) string {
	if _, ok := streamError(v); ok {
		return e.messages.ContentType(v)
	}
	return "text/event-stream"
}

func (events) Delimiter() []byte { return []byte("\n\n") }

func (e events) Marshal(v any) ([]byte, error) {
	data, err := e.messages.Marshal(v)
	if _, ok := streamError(v); ok {
		return data, err
	}
	return append([]byte("data: "), data...), err
}
func (e events) NewEncoder(w io.Writer) runtime.Encoder {
	return runtime.EncoderFunc(func(v any) error {
		data, err := e.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(append(data, e.Delimiter()...))
		return err
	})
}

// counted counts requests by the class of their answer.
func (g *Gateway) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &classed{ResponseWriter: w}
		next.ServeHTTP(c, r)
		g.control.requests.Add(1, c.class())
	})
}

type classed struct {
	http.ResponseWriter
	code int
}

func (c *classed) WriteHeader(code int) {
	c.code = code
	if code == http.StatusUnauthorized {
		c.Header().Set("WWW-Authenticate", `Bearer realm="bulkhead"`) // RFC 6750 section 3
	}
	c.ResponseWriter.WriteHeader(code)
}

// Unwrap lets http.ResponseController flush streams.
func (c *classed) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// Flush is what grpc-gateway looks for.
func (c *classed) Flush() { _ = http.NewResponseController(c.ResponseWriter).Flush() }

func (c *classed) class() string {
	if c.code == 0 {
		return "2xx"
	}
	return string(rune('0'+c.code/100)) + "xx"
}
