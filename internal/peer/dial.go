package peer

import (
	"encoding/json"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/bulkhead-os/bulkhead/internal/methods"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// attempts bounds how often a call is tried; grpc's own limit is five.
const attempts = 5

// Socket returns the path of a daemon's socket.
func Socket(daemon string) string { return unit.SocketDir + "/" + daemon + ".sock" }

// ReadBuffer is the read buffer of one connection, in bytes; gRPC's 32 KiB for each of some forty idle connections would be the
// better part of a daemon. Larger messages are read past it. Write buffers are shared: an idle connection has none.
const ReadBuffer = 4 << 10

// Dial returns a connection to a Unix socket; it is opened when first used and opened again when lost.
// Calls wait until the daemon is there, and calls that may be repeated are, so that the restart of a
// daemon delays callers and fails none. The caller closes it.
func Dial(path string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the server learns who we are from the kernel
		grpc.WithReadBufferSize(ReadBuffer),
	}, append(Patient(), opts...)...)...)
}

// Patient are the options that make a client wait for a server that restarts, and repeat calls that may be repeated.
func Patient() []grpc.DialOption {
	return append(steady(20*time.Second, 50*time.Millisecond, 2*time.Second), grpc.WithDefaultServiceConfig(patient()), grpc.WithIdleTimeout(0))
}

// steady are the options of all clients; connect bounds a try to connect, the server's first word included; pauses between tries grow from first to most.
func steady(connect, first, most time.Duration) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithMaxCallAttempts(attempts),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: first, Multiplier: 1.6, Jitter: 0.2, MaxDelay: most},
			MinConnectTimeout: connect,
		}),
	}
}

// briskConnect bounds a try of Brisk's to connect.
const briskConnect = 6 * time.Second

// Brisk makes connections to servers that may be away for long: calls that may be repeated are, but none waits for a server that does not answer.
// A client that wants to try at once, since somebody calls, calls ResetConnectBackoff. They are many, and share what they need: with a service config of its own each would take a third more memory. The zero value is ready; it is safe for concurrent use.
type Brisk struct {
	once   sync.Once
	config *serviceconfig.ParseResult
}

// Dial returns a connection to a server; it is opened when first used. name is what a dialer in opts gets for an address. The caller closes it.
func (b *Brisk) Dial(name string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient(b.Scheme()+":///"+name, append(append(steady(briskConnect, time.Second, time.Minute), grpc.WithResolvers(b), grpc.WithReadBufferSize(ReadBuffer)), opts...)...)
}

// Scheme is for grpc: Brisk is a resolver.Builder.
func (*Brisk) Scheme() string { return "bulkhead" }

// Build is for grpc. The name is the address.
func (b *Brisk) Build(target resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) (resolver.Resolver, error) {
	b.once.Do(func() { b.config = cc.ParseServiceConfig(serviceConfig(false)) })
	return nothing{}, cc.UpdateState(resolver.State{Addresses: []resolver.Address{{Addr: target.Endpoint()}}, ServiceConfig: b.config})
}

// nothing is a resolver that is done.
type nothing struct{}

func (nothing) ResolveNow(resolver.ResolveNowOptions) {}
func (nothing) Close()                                {}

// Repeatable reports whether the proto of a method, "/service/Method", says that doing it twice is as good as once.
func Repeatable(method string) bool {
	m := methods.Find(method)
	return m != nil && m.Repeatable
}

// patient is the service config of all clients that wait: one text.
var patient = sync.OnceValue(func() string { return serviceConfig(true) })

// serviceConfig is grpc's JSON service config (grpc/service_config.proto): wait for the server if wait is set; repeat, on UNAVAILABLE, the
// methods whose idempotency_level says that this is harmless.
func serviceConfig(wait bool) string {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method,omitempty"`
	}
	type retry struct {
		MaxAttempts          int      `json:"maxAttempts"`
		InitialBackoff       string   `json:"initialBackoff"`
		MaxBackoff           string   `json:"maxBackoff"`
		BackoffMultiplier    float64  `json:"backoffMultiplier"`
		RetryableStatusCodes []string `json:"retryableStatusCodes"`
	}
	type method struct {
		Name         []name `json:"name"`
		WaitForReady bool   `json:"waitForReady"`
		RetryPolicy  *retry `json:"retryPolicy,omitempty"`
	}
	var again []name
	for _, m := range methods.All() {
		if m.Repeatable {
			again = append(again, name{m.Service, m.Name})
		}
	}
	cfg := struct {
		MethodConfig []method `json:"methodConfig"`
	}{[]method{
		{Name: []name{{}}, WaitForReady: wait},
		{Name: again, WaitForReady: wait, RetryPolicy: &retry{
			MaxAttempts: attempts, InitialBackoff: "0.05s", MaxBackoff: "1s", BackoffMultiplier: 2, RetryableStatusCodes: []string{"UNAVAILABLE"},
		}},
	}}
	out, err := json.Marshal(cfg)
	if err != nil {
		panic("peer: service config: " + err.Error()) // fixed types: cannot fail
	}
	return string(out)
}
