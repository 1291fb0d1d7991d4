package balance

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testca"
)

// certify returns a server's certificate for an address and the balancer's own.
func certify(t *testing.T, ca *testca.CA, host string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{IPAddresses: []net.IP{net.ParseIP(host), net.ParseIP("127.0.0.1")}}, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := ca.SignCertificate(t.Context(), &trustv1.SignCertificateRequest{Profile: "kube-apiserver", Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := pem.Decode([]byte(r.GetCertificate()))
	return tls.Certificate{Certificate: [][]byte{b.Bytes}, PrivateKey: key}
}

// server is an API server as far as a balancer can tell: it says its name, streams, and can be frozen like a machine whose power is gone.
type server struct {
	name    string
	address netip.AddrPort
	cert    tls.Certificate

	mu     sync.Mutex
	thawed chan struct{} // guarded by mu; closed while it runs
	ready  int           // guarded by mu; status of /readyz
	asked  []string      // guarded by mu; who asked for /readyz, in order: the other end of each connection
	http   *http.Server  // guarded by mu; nil while it is closed
}

// start serves at host, at a port that the first start chooses.
func start(t *testing.T, ca *testca.CA, host string) *server {
	t.Helper()
	s := &server{name: host, address: netip.AddrPortFrom(netip.MustParseAddr(host), 0), cert: certify(t, ca, host), thawed: make(chan struct{}), ready: 200}
	close(s.thawed)
	s.open(t)
	t.Cleanup(func() { s.thaw(); s.close() })
	return s
}

func (s *server) open(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", s.address.String())
	if err != nil {
		t.Fatal(err)
	}
	s.address = netip.MustParseAddrPort(l.Addr().String())
	h := &http.Server{Handler: http.HandlerFunc(s.serve), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	s.mu.Lock()
	s.http = h
	s.mu.Unlock()
	go h.Serve(tls.NewListener(icy{l, s}, &tls.Config{Certificates: []tls.Certificate{s.cert}})) //nolint:errcheck // it ends with close
}

func (s *server) close() {
	s.mu.Lock()
	h := s.http
	s.http = nil
	s.mu.Unlock()
	if h != nil {
		h.Close() // it writes, for which the connections ask whether they are frozen
	}
}

func (s *server) freeze() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.thawed = make(chan struct{})
}

func (s *server) thaw() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.thawed:
	default:
		close(s.thawed)
	}
}

func (s *server) setReady(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = status
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/readyz":
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked = append(s.asked, r.RemoteAddr)
		w.WriteHeader(s.ready)
		if s.ready == http.StatusInternalServerError { // as kube-apiserver says it
			fmt.Fprint(w, "[+]ping ok\n[-]etcd failed: reason withheld\n[+]log ok\nreadyz check failed\n")
		}
	case "/watch": // a line now, and then nothing until the client goes
		fmt.Fprintln(w, s.name)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	default:
		fmt.Fprint(w, s.name)
	}
}

// icy makes the connections of a frozen server stand still, the ones that it has not yet accepted too.
type icy struct {
	net.Listener
	s *server
}

func (l icy) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return icyConn{c, l.s}, nil
}

type icyConn struct {
	net.Conn
	s *server
}

func (c icyConn) wait() {
	c.s.mu.Lock()
	thawed := c.s.thawed
	c.s.mu.Unlock()
	<-thawed
}

func (c icyConn) Read(p []byte) (int, error)  { n, err := c.Conn.Read(p); c.wait(); return n, err }
func (c icyConn) Write(p []byte) (int, error) { c.wait(); return c.Conn.Write(p) }

// rig is a running balancer and a client of it.
type rig struct {
	*Balancer
	address string
	changed chan struct{} // capacity 1
	roots   string
	cancel  context.CancelFunc
	ended   chan error
}

func run(t *testing.T, ca *testca.CA, limit int) *rig {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{address: l.Addr().String(), changed: make(chan struct{}, 1), roots: ca.State().GetKubernetesCa(), ended: make(chan error, 1)}
	r.Balancer, err = New(Config{Listeners: []net.Listener{l}, Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("kubeletd"), MaxConnections: limit, Changed: func() {
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() { r.ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-r.ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
		r.ended <- err
	})
	return r
}

func (r *rig) set(t *testing.T, preferred netip.AddrPort, servers ...*server) {
	t.Helper()
	targets := Targets{Roots: r.roots, Preferred: preferred}
	for _, s := range servers {
		targets.Backends = append(targets.Backends, s.address)
	}
	if err := r.Set(targets); err != nil {
		t.Fatal(err)
	}
}

// await waits until as many backends as said are up.
func (r *rig) await(t *testing.T, up int) State {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		s := r.State()
		n := 0
		for _, b := range s.Backends {
			if b.Up {
				n++
			}
		}
		if n == up {
			return s
		}
		select {
		case <-r.changed:
		case <-late:
			t.Fatalf("never %d backends up: %+v", up, s)
		}
	}
}

// get asks over a connection of its own who answers.
func (r *rig) get(t *testing.T, path string) (*http.Response, error) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(r.roots))
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(tr.CloseIdleConnections)
	return (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("https://" + r.address + path)
}

func (r *rig) who(t *testing.T) string {
	t.Helper()
	resp, err := r.get(t, "/")
	if err != nil {
		t.Fatalf("%v; state: %+v", err, r.State())
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// watch opens a stream that says who answers and then waits; the channel gives how long until it ended, from when it is told.
func (r *rig) watch(t *testing.T) (who string, ended chan time.Time) {
	t.Helper()
	resp, err := r.get(t, "/watch")
	if err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(resp.Body)
	line, err := in.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	ended = make(chan time.Time, 1)
	go func() {
		_, _ = io.Copy(io.Discard, in) // however it ends
		ended <- time.Now()
		resp.Body.Close()
	}()
	return strings.TrimSpace(line), ended
}

// A dead API server, closed or silent, is out within 3 s: its streams have ended and new requests are answered by another. It comes
// back after one good probe.
func TestDropsTheDead(t *testing.T) {
	for name, kill := range map[string]func(*server){"closed": (*server).close, "silent": (*server).freeze} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca := testca.New(t)
			a, b := start(t, ca, "127.0.0.2"), start(t, ca, "127.0.0.3")
			r := run(t, ca, 0)
			r.set(t, a.address, b)
			r.await(t, 2)
			if who := r.who(t); who != a.name {
				t.Fatalf("%s answers, want the preferred one", who)
			}
			who, ended := r.watch(t)
			if who != a.name {
				t.Fatalf("%s streams, want the preferred one", who)
			}
			killed := time.Now()
			kill(a)
			at := <-ended
			if d := at.Sub(killed); d > 3*time.Second {
				t.Errorf("the stream ended %s after its server died, want 3 s at most", d)
			}
			for range 3 {
				if who := r.who(t); who != b.name {
					t.Errorf("%s answers, want the one that lives", who)
				}
			}
			s := r.await(t, 1)
			if s.Error != "" || s.Backends[0].Error == "" {
				t.Errorf("%+v: want no error but that of the dead one", s)
			}
			a.thaw()
			if name == "closed" {
				a.open(t)
			}
			r.await(t, 2)
			if who := r.who(t); who != a.name {
				t.Errorf("%s answers, want the preferred one again", who)
			}
		})
	}
}

// A probe takes the connection of the one before, and a new one without a pause when the server closed that: nobody is dropped for it.
func TestProbesKeepTheirConnection(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	a := start(t, ca, "127.0.0.2")
	r := run(t, ca, 0)
	r.set(t, netip.AddrPort{}, a)
	probes := func(n int) []string {
		late := time.After(20 * time.Second)
		for {
			a.mu.Lock()
			asked := slices.Clone(a.asked)
			a.mu.Unlock()
			if len(asked) >= n {
				return asked
			}
			select {
			case <-time.After(10 * time.Millisecond):
			case <-late:
				t.Fatalf("%d probes, want %d", len(asked), n)
			}
		}
	}
	if asked := probes(3); asked[0] != asked[2] {
		t.Errorf("three probes came from %v, want one connection", asked)
	}
	for len(r.changed) > 0 {
		<-r.changed
	}
	a.close()
	a.open(t)
	n := len(probes(0))
	if asked := probes(n + 2); asked[n] == asked[0] {
		t.Errorf("the probe after the server's restart came from %v", asked[n:])
	}
	if s := r.State(); !s.Backends[0].Up || len(r.changed) > 0 {
		t.Errorf("%+v: it was dropped meanwhile", s)
	}
}

// One that says that it is not ready gets nothing new, and may end what it has.
func TestUnreadyDrains(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	a, b := start(t, ca, "127.0.0.2"), start(t, ca, "127.0.0.3")
	r := run(t, ca, 0)
	r.set(t, a.address, a, b)
	r.await(t, 2)
	_, ended := r.watch(t)
	a.setReady(500)
	if s := r.await(t, 1); !strings.HasSuffix(s.Backends[0].Error, `GET /readyz: 500 Internal Server Error: "etcd" failed`) {
		t.Errorf("%+v: want what it answered, and the check that failed", s)
	}
	if who := r.who(t); who != b.name {
		t.Errorf("%s answers, want the one that is ready", who)
	}
	select {
	case <-ended:
		t.Error("the stream of a server that only drains was cut")
	default:
	}
	a.setReady(401) // lets in nobody unknown, as the balancer is here
	r.await(t, 2)
}

// With nobody up, the reason is told and connections are tried all the same; the first that lives again is used.
func TestAllDownThenBack(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	a, b := start(t, ca, "127.0.0.2"), start(t, ca, "127.0.0.3")
	r := run(t, ca, 0)
	if _, err := r.get(t, "/"); err == nil {
		t.Error("a request without any backend was answered")
	}
	if s := r.State(); s.Error != "no API server is known" {
		t.Errorf("error %q before there is a backend", s.Error)
	}
	r.set(t, netip.AddrPort{}, a, b)
	r.await(t, 2)
	a.close()
	b.close()
	s := r.await(t, 0)
	for _, want := range []string{"no API server answers", a.address.String(), b.address.String(), "refused"} {
		if !strings.Contains(s.Error, want) {
			t.Errorf("error %q, want %q in it", s.Error, want)
		}
	}
	if _, err := r.get(t, "/"); err == nil {
		t.Error("answered by nobody")
	}
	b.open(t)
	if who := r.who(t); who != b.name { // at once: who is down is tried when nobody is up
		t.Errorf("%s answers", who)
	}
	if s := r.await(t, 1); s.Error != "" {
		t.Errorf("error %q, though one is up", s.Error)
	}
}

// Who is no longer named is left; who has a certificate of others is never up; roots that are none are refused.
func TestFollowsTargets(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	a, b, stranger := start(t, ca, "127.0.0.2"), start(t, ca, "127.0.0.3"), start(t, testca.New(t), "127.0.0.4")
	r := run(t, ca, 0)
	r.set(t, netip.AddrPort{}, a)
	r.await(t, 1)
	_, ended := r.watch(t)
	r.set(t, netip.AddrPort{}, b, stranger)
	<-ended
	s := r.await(t, 1)
	if who := r.who(t); who != b.name {
		t.Errorf("%s answers, want the new one", who)
	}
	for s.Backends[1].Error == "" { // its first probe is on the way
		<-r.changed
		s = r.State()
	}
	if s.Backends[1].Up || !strings.Contains(s.Backends[1].Error, "certificate") {
		t.Errorf("%+v: want a stranger's certificate refused", s.Backends[1])
	}
	if err := r.Set(Targets{Roots: "nonsense"}); err == nil || len(r.State().Backends) != 2 {
		t.Errorf("%v, %+v: want roots that are none refused, and nothing changed", err, r.State())
	}
}

// raw accepts one connection after another and hands them out.
func raw(t *testing.T) (netip.AddrPort, chan *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out := make(chan *net.TCPConn, 8)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			out <- c.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() { l.Close() })
	return netip.MustParseAddrPort(l.Addr().String()), out
}

// Each side may end while the other still speaks; what waits on a slow side is bounded; more clients than the limit are closed; and Run
// ends with all of it. Without roots nobody is probed and all are taken.
func TestConnections(t *testing.T) {
	t.Parallel()
	address, accepted := raw(t)
	r := run(t, testca.New(t), 2)
	if err := r.Set(Targets{Backends: []netip.AddrPort{address}}); err != nil {
		t.Fatal(err)
	}
	dial := func() *net.TCPConn {
		c, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}
	take := func() *net.TCPConn { // and hold it: one that nobody knows any more is closed with the garbage
		c := <-accepted
		t.Cleanup(func() { c.Close() })
		return c
	}
	client := dial()
	far := take()
	if _, err := client.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if q, err := io.ReadAll(far); string(q) != "question" || err != nil { // it has seen the end
		t.Errorf("the backend read %q, %v", q, err)
	}
	if _, err := far.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	far.Close()
	if a, err := io.ReadAll(client); string(a) != "answer" || err != nil {
		t.Errorf("the client read %q, %v", a, err)
	}

	slow := dial()
	take() // and nobody reads
	if err := slow.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(slow, io.LimitReader(zeros{}, 256<<20))
	if !isTimeout(err) {
		t.Errorf("%d bytes went to a backend that reads none: %v", n, err)
	}
	dial()
	take()
	third := dial()
	if _, err := third.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a third connection of two: %v, want it closed", err)
	}
	if s := r.State(); !strings.Contains(s.Error, "at most 2") {
		t.Errorf("error %q, want the limit", s.Error)
	}
	r.cancel()
	select {
	case err := <-r.ended:
		r.ended <- err
	case <-time.After(5 * time.Second):
		t.Error("Run goes on with connections open")
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func TestUnready(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]string{
		"":                         "",
		"ok":                       "",
		"[+]ping ok\n[+]etcd ok\n": "",
		"[+]ping ok\n[-]etcd failed: reason withheld\n[-]poststarthook/rbac/bootstrap-roles failed: reason withheld\nreadyz check failed\n": `: "etcd", "poststarthook/rbac/bootstrap-roles" failed`,
		strings.Repeat("[-]a failed\n", 6): `: "a", "a", "a", "a" and 2 more failed`,
		"[-]\x1b[2J\n[-]":                  `: "\x1b[2J", "" failed`,
		"[-]" + strings.Repeat("x", 100):   `: "` + strings.Repeat("x", 64) + `" failed`,
	} {
		if got := Unready([]byte(body)); got != want {
			t.Errorf("%q: got %q, want %q", body, got, want)
		}
	}
}
