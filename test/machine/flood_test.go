package machine

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

// secretName is the node's host name in these tests: a word that no error to a stranger may contain.
const secretName = "quietharbor"

// TestFlood does to both doors of a node what strangers can do, while those with credentials must be served all the time.
func TestFlood(t *testing.T) {
	n := newNode(t)
	var ways [2][]*way
	flags := []string{"--cpus", "2"}
	for i := range 4 {
		for door, guest := range []int{50000, 50001} {
			port := freePort(t)
			ways[door] = append(ways[door], &way{address: fmt.Sprintf("127.0.0.1:%d", port), first: 10_000 + (2*i+door)*wayPorts})
			flags = append(flags, "--forward", fmt.Sprintf("%d:%d", port, guest))
		}
	}
	n.upBare(t, fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: %s\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: test\nnames: [localhost, 127.0.0.1]\n", secretName), flags...)
	f := newFlood(t, n)
	f.ways = ways
	f.serveAll(t)
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"strangers", f.strangers},
		{"5 MiB", f.large},
		{"bodies of strangers", f.bodies},
		{"slow clients", f.slow},
		{"garbage", f.garbage},
		{"idle connections", f.idle},
	} {
		start := time.Now()
		t.Run(s.name, s.run)
		f.report(t, s.name, time.Since(start))
	}
	f.judge(t)
}

// upBare brings the machine up to a configured node without a cluster.
func (n *node) upBare(t *testing.T, documents string, flags ...string) {
	t.Helper()
	file := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(file, []byte(documents), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.bare(t.Context(), file, flags...); err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
}

// bare's machine has one processor unless flags say more: its test shares the host's with another, and emulated, a second one costs a boot a quarter more.
func (n *node) bare(ctx context.Context, file string, flags ...string) error {
	_, err := n.try(ctx, 4*time.Minute, "bhctl", append(append([]string{"--cpus", "1"}, flags...), "up", "--no-bootstrap", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
		"--kubernetes-port", fmt.Sprint(n.kubePort), "--image", filepath.Join(n.root, "out/image"), "--memory", "2048", "-f", file)...)
	return err
}

// flood is one node under attack.
type flood struct {
	n           *node
	api, rest   string    // host:port
	ways        [2][]*way // more ways to the two doors, for strangers
	owner       *grpc.ClientConn
	cred        client.Credentials
	admin       string // a token
	expired     string // a token of one second, made at the start
	mintedAt    time.Time
	tls         *tls.Config // that knows the node and shows nothing
	memoryMax   map[string]uint64
	memoryPeak  map[string]uint64
	stop        func()
	loops       sync.WaitGroup
	served      [4]record
	mu          sync.Mutex
	connections []net.Conn // guarded by mu; opened by strangers
}

// record is what became of one kind of calls that are made all the time.
type record struct {
	what          string
	calls, failed atomic.Int64
	slowest       atomic.Int64 // nanoseconds
}

func newFlood(t *testing.T, n *node) *flood {
	t.Helper()
	f := &flood{n: n, api: fmt.Sprintf("localhost:%d", n.apiPort), rest: fmt.Sprintf("localhost:%d", n.gatewayPort), cred: n.credentials(t),
		memoryMax: map[string]uint64{}, memoryPeak: map[string]uint64{}}
	f.owner = f.dial(t, f.cred)
	mint := func(seconds uint64) string {
		r, err := trustv1.NewTrustClient(f.owner).MintToken(t.Context(), &trustv1.MintTokenRequest{Name: "flood", Roles: []string{"admin"}, TtlSeconds: seconds})
		if err != nil {
			t.Fatal(err)
		}
		return r.Token
	}
	f.admin, f.expired, f.mintedAt = mint(3600), mint(1), time.Now()
	cfg, err := client.TLS(client.Credentials{CA: f.cred.CA})
	if err != nil {
		t.Fatal(err)
	}
	f.tls = cfg
	f.tls.ServerName = "localhost" // both doors' certificates have it
	units, err := unitfile.Load(os.DirFS(n.root))
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range units {
		if u.Name == "apid" || u.Name == "gateway" {
			f.memoryMax[u.Name] = u.MemoryMax
		}
	}
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, c := range f.connections {
			c.Close()
		}
	})
	return f
}

func (f *flood) dial(t *testing.T, c client.Credentials) *grpc.ClientConn {
	t.Helper()
	conn, err := client.Dial(f.api, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (f *flood) http() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: f.tls.Clone(), ForceAttemptHTTP2: true}}
}

// version reads the version over REST.
func (f *flood) version(ctx context.Context, c *http.Client, token string) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+f.rest+"/v1/version", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != 200 {
		err = fmt.Errorf("status %d: %.200s", resp.StatusCode, body)
	}
	return err
}

// serveAll starts the calls that must succeed until the end of the test, each within 20 seconds: on connections that stay, where nothing is tried
// twice by this test, and on new connections, where one that a full door refused is tried again, as "curl --retry-all-errors" and gRPC clients do.
func (f *flood) serveAll(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	f.stop = func() { stop(); f.loops.Wait() }
	t.Cleanup(f.stop)
	kept := f.http()
	for i, l := range []struct {
		what string
		call func(context.Context) error
	}{
		{"gRPC, one connection", func(ctx context.Context) error {
			_, err := machinev1.NewMachineClient(f.owner).GetVersion(ctx, &machinev1.GetVersionRequest{})
			return err
		}},
		{"REST, one connection", func(ctx context.Context) error { return f.version(ctx, kept, f.admin) }},
		{"gRPC, new connections", func(ctx context.Context) error {
			conn, err := client.Dial(f.api, f.cred)
			if err != nil {
				return err
			}
			defer conn.Close()
			_, err = machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
			return err
		}},
		{"REST, new connections", func(ctx context.Context) error { return f.persist(ctx) }},
	} {
		r := &f.served[i]
		r.what = l.what
		f.loops.Go(func() {
			for ctx.Err() == nil {
				limit, cancel := context.WithTimeout(ctx, 20*time.Second)
				start := time.Now()
				err := l.call(limit)
				cancel()
				if ctx.Err() != nil {
					return
				}
				took := time.Since(start)
				r.calls.Add(1)
				r.slowest.Store(max(r.slowest.Load(), int64(took)))
				if err != nil {
					r.failed.Add(1)
					t.Errorf("%s: after %s: %v", l.what, took.Round(time.Millisecond), err)
				}
				wait(ctx, 300*time.Millisecond)
			}
		})
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// persist reads the version on new connections until one is served.
func (f *flood) persist(ctx context.Context) error {
	var last error
	for ctx.Err() == nil {
		c := f.http()
		err := f.version(ctx, c, f.admin)
		c.CloseIdleConnections()
		if err == nil {
			return nil
		}
		last = err
		wait(ctx, 200*time.Millisecond)
	}
	return fmt.Errorf("%w; the last try: %v", ctx.Err(), last)
}

// report logs what was served during a part, looks at memory, and begins to count anew.
func (f *flood) report(t *testing.T, part string, took time.Duration) {
	t.Helper()
	var b strings.Builder
	for i := range f.served {
		r := &f.served[i]
		fmt.Fprintf(&b, "; %s: %d calls, %d failed, slowest %s", r.what, r.calls.Swap(0), r.failed.Swap(0), time.Duration(r.slowest.Swap(0)).Round(time.Millisecond))
	}
	f.sample(t)
	t.Logf("» %s: %s%s; apid %s, gateway %s", part, took.Round(100*time.Millisecond), b.String(), mib(f.memoryPeak["apid"]), mib(f.memoryPeak["gateway"]))
}

// sample notes how much memory the doors take.
func (f *flood) sample(t *testing.T) {
	t.Helper()
	s := f.n.services(t)
	for name := range f.memoryMax {
		f.memoryPeak[name] = max(f.memoryPeak[name], s[name].GetMemoryBytes())
	}
}

// judge: neither door was ended by its limit, or by anything.
func (f *flood) judge(t *testing.T) {
	f.stop()
	f.sample(t)
	for name, s := range f.n.services(t) {
		if s.Restarts != 0 && slices.Contains(light, name) {
			t.Errorf("%s restarted %d times: %s", name, s.Restarts, s.LastExit)
		}
		if limit, ok := f.memoryMax[name]; ok {
			t.Logf("» %s: %s at most of those seen, %s now, of %s", name, mib(f.memoryPeak[name]), mib(s.MemoryBytes), mib(limit))
			if s.MemoryBytes == 0 || f.memoryPeak[name] > limit*3/4 {
				t.Errorf("%s: %s now, %s at most, of %s: want it well below", name, mib(s.MemoryBytes), mib(f.memoryPeak[name]), mib(limit))
			}
		}
	}
}

// strangers call without, with expired, and with foreign credentials, at both doors.
func (f *flood) strangers(t *testing.T) {
	wait(t.Context(), time.Until(f.mintedAt.Add(13*time.Second))) // apid lets clocks differ by 10 s
	for _, c := range []struct {
		name string
		cred client.Credentials
		want string
	}{
		{"none", client.Credentials{}, "no valid credentials"},
		{"foreign certificate", foreign(t), "no valid credentials"},
		{"expired token", client.Credentials{Token: f.expired}, "your token expired"},
		{"tampered token", client.Credentials{Token: f.admin[:len(f.admin)-6] + "AAAAAA"}, "no valid credentials"},
		{"not a token", client.Credentials{Token: "garbage"}, "no valid credentials"},
	} {
		c.cred.CA = f.cred.CA
		conn := f.dial(t, c.cred)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		calls := map[string]error{}
		_, calls["GetVersion"] = machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
		_, calls["Apply"] = configv1.NewConfigClient(conn).Apply(ctx, &configv1.ApplyRequest{Documents: "kind: Machine\n"})
		calls["no such method"] = conn.Invoke(ctx, "/machine.v1.Machine/Nothing", &machinev1.GetVersionRequest{}, &machinev1.GetVersionResponse{})
		for method, err := range calls {
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("%s: %s: %v, want Unauthenticated", c.name, method, err)
			}
			f.tellsNothing(t, c.name+": "+method, c.want, fmt.Sprint(err))
		}
		if len(c.cred.Certificate) > 0 {
			continue // the gateway knows tokens only
		}
		code, body, err := f.n.get(t, "/v1/version", c.cred.Token)
		if err != nil || code != 401 {
			t.Errorf("%s: GET /v1/version: %d, %v, want 401", c.name, code, err)
		}
		f.tellsNothing(t, c.name+": GET /v1/version", c.want, body)
	}
}

// tellsNothing looks at a refusal: it has the words that it should, and none about the node.
func (f *flood) tellsNothing(t *testing.T, what, want, got string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Errorf("%s: said %q, want %q in it", what, got, want)
	}
	for _, word := range []string{secretName, "0.1.0", "go1.", "v1.3", "linux", "6.1.", "machined"} {
		if strings.Contains(strings.ToLower(got), word) {
			t.Errorf("%s: %q tells a stranger %q", what, got, word)
		}
	}
}

// post sends a body to the gateway.
func (f *flood) post(ctx context.Context, token string, body io.Reader) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, "POST", "https://"+f.rest+"/v1/config:apply", body)
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: f.tls.Clone()}}
	defer c.CloseIdleConnections()
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// jsonOf is an apply whose whole body has n bytes.
func jsonOf(n int) []byte {
	const head, tail = `{"documents":"`, `"}`
	return append(append([]byte(head), bytes.Repeat([]byte("#"), n-len(head)-len(tail))...), tail...)
}

func (f *flood) large(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := configv1.NewConfigClient(f.owner).Apply(ctx, &configv1.ApplyRequest{Documents: strings.Repeat("#", 5<<20)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("5 MiB over gRPC: %v, want ResourceExhausted", err)
	}
	code, body, err := f.post(ctx, f.admin, bytes.NewReader(jsonOf(5<<20)))
	if err != nil || code != http.StatusRequestEntityTooLarge || !strings.Contains(body, `"code":"RESOURCE_EXHAUSTED"`) || !strings.Contains(body, "4194304") {
		t.Errorf("5 MiB over REST: %d, %v, %.300s; want 413 and a problem that names the limit", code, err, body)
	}
	t.Logf("» 5 MiB over REST: %d %s", code, strings.TrimSpace(body))
}

// bodies are what strangers may send just below the limit, all at once: nobody may read them before it is known who sends them.
func (f *flood) bodies(t *testing.T) {
	const clients = 32
	body := jsonOf(4<<20 - 100)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	var refused, cut atomic.Int64
	for i := range clients {
		wg.Go(func() {
			token := ""
			if i%2 == 0 {
				token = "garbage"
			}
			code, text, err := f.post(ctx, token, bytes.NewReader(body))
			switch {
			case err != nil:
				cut.Add(1) // refused before all was sent: the connection ends under the body
			case code == 401:
				refused.Add(1)
			default:
				t.Errorf("a stranger's 4 MiB: %d %.200s", code, text)
			}
		})
	}
	wg.Wait()
	t.Logf("» %d strangers with 4 MiB each at once: %d read 401, %d were cut", clients, refused.Load(), cut.Load())
}

// foreign are credentials that look like an administrator's, of an authority that the node does not know.
func foreign(t *testing.T) client.Credentials {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bulkhead"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "root", Organization: []string{"bulkhead:admin"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter}
	der, err := x509.CreateCertificate(crand.Reader, leaf, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	return client.Credentials{Certificate: text("CERTIFICATE", der), Key: text("PRIVATE KEY", private)}
}
