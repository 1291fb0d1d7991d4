// Package wired runs daemons as they are, in one process, over sockets in a temporary folder. All are one user here, so who may
// call whom is set by the test; the lists themselves are tested beside package peer.
package wired

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/apid"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/trustd"
)

// console keeps what trustd writes, for readers that wait for it. trustd alone writes.
type console struct{ text latest.Cell[string] }

func (c *console) Write(p []byte) (int, error) {
	was, _ := c.text.Get()
	c.text.Set(was + string(p))
	return len(p), nil
}

func (c *console) code(t *testing.T) string {
	t.Helper()
	for {
		text, changed := c.text.Get()
		if _, rest, ok := strings.Cut(text, "Claim code:"); ok {
			return strings.Fields(rest)[0]
		}
		select {
		case <-changed:
		case <-t.Context().Done():
			t.Fatal("no claim code on the console")
		}
	}
}

// node is trustd and apid as on a machine.
type node struct {
	t         *testing.T
	dir       string
	console   console
	trust     *net.UnixListener
	caller    atomic.Uint32 // user id of who connects to trustd
	tcp       *net.TCPListener
	local     *net.UnixListener // apid's
	address   string
	apidLog   *slog.Logger // nil: the test's output
	trustdLog *slog.Logger // the same
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) bind(name string) *net.UnixListener {
	n.t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(n.dir, name), Net: "unix"})
	n.must(err)
	l.SetUnlinkOnClose(false)
	n.t.Cleanup(func() { l.Close() })
	return l
}

// inherit is what a started daemon gets of a listener that PID 1 keeps.
func (n *node) inherit(l interface{ File() (*os.File, error) }) net.Listener {
	n.t.Helper()
	f, err := l.File()
	n.must(err)
	defer f.Close()
	dup, err := net.FileListener(f)
	n.must(err)
	if u, ok := dup.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return dup
}

func (n *node) env(name string, l net.Listener) daemon.Env {
	return daemon.Env{Name: name, Log: slog.New(slog.NewTextHandler(n.t.Output(), nil)), Metrics: metrics.New(name), Listen: l, Ready: func() {},
		Who: func(c net.Conn) (uid.ID, error) { return named(c, uid.ID(n.caller.Load())), nil }}
}

// named is the user in the name of the other end of a connection, as dialAs makes it; other if there is none.
func named(c net.Conn, other uid.ID) uid.ID {
	name, _, _ := strings.Cut(filepath.Base(c.RemoteAddr().String()), "-")
	if id, ok := uid.Lookup(name); ok {
		return id
	}
	return other
}

// run starts a daemon; stop is SIGTERM and waits for the end.
func (n *node) run(f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	return stop
}

func (n *node) startTrustd() (stop func()) {
	env := n.env("trustd", n.inherit(n.trust))
	if n.trustdLog != nil {
		env.Log = n.trustdLog
	}
	d, err := trustd.New(trustd.Config{
		Env: env, Runtime: filepath.Join(n.dir, "runtime"), StateDir: filepath.Join(n.dir, "state"),
		ClaimKey: filepath.Join(n.dir, "claim-key"), Blocks: filepath.Join(n.dir, "block"), Console: &n.console,
		Socket: func(name string) string { return filepath.Join(n.dir, name) },
	})
	n.must(err)
	return n.run(d.Run)
}

func newNode(t *testing.T) *node {
	dir, err := os.MkdirTemp("", "wired") // short: a socket's path has at most 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{t: t, dir: dir}
	n.caller.Store(uint32(uid.Apid))
	n.must(os.Mkdir(filepath.Join(dir, "runtime"), 0o700))
	n.trust = n.bind("trustd")
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	n.must(err)
	t.Cleanup(func() { tcp.Close() })
	n.tcp, n.local, n.address = tcp.(*net.TCPListener), n.bind("apid"), tcp.Addr().String()
	return n
}

func (n *node) startApid() (stop func()) {
	env := n.env("apid", n.inherit(n.local))
	env.TCP = n.inherit(n.tcp)
	if n.apidLog != nil {
		env.Log = n.apidLog
	}
	d, err := apid.New(apid.Config{Env: env, Socket: func(name string) string { return filepath.Join(n.dir, name) }})
	n.must(err)
	return n.run(d.Run)
}

// configure is machined handing trustd its sections.
func (n *node) configure(ctx context.Context, role string) {
	n.t.Helper()
	n.caller.Store(uint32(uid.Machined))
	defer n.caller.Store(uint32(uid.Apid))
	conn, err := peer.Dial(filepath.Join(n.dir, "trustd"))
	n.must(err)
	defer conn.Close()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		conn.WaitForStateChange(ctx, s)
	}
	_, err = controlv1.NewControlClient(conn).SetSpec(ctx, &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 1,
		Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\nrole: " + role + "\n")}})
	n.must(err)
}

func TestFromNothingToBootstrapped(t *testing.T) {
	n := newNode(t)
	n.startTrustd()
	n.startApid()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code := n.console.code(t)

	start := time.Now()
	_, err := client.Claim(ctx, n.address, "AAAAA-AAAAA-AAAAA-AAAAA", "")
	if status.Code(err) != codes.Unauthenticated || time.Since(start) < time.Second {
		t.Errorf("wrong code: %v after %s, want Unauthenticated after a second", err, time.Since(start))
	}
	creds, err := client.Claim(ctx, n.address, strings.ToLower(code), "ann")
	n.must(err)
	if s := fmt.Sprintf("%v %+v %#v", creds, creds, creds); s != "[secret] [secret] [secret]" {
		t.Errorf("credentials print as %s", s)
	}
	_, err = client.Claim(ctx, n.address, code, "")
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("second claim: %v", err)
	}
	conn, err := client.Dial(n.address, creds)
	n.must(err)
	defer conn.Close()
	trust := trustv1.NewTrustClient(conn)
	refused := func(want string) {
		t.Helper()
		if _, err := trust.Bootstrap(ctx, &trustv1.BootstrapRequest{}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(status.Convert(err).Message(), want) {
			t.Errorf("bootstrap: %v, want FailedPrecondition with %q", err, want)
		}
	}
	refused("no configuration")
	n.configure(ctx, "controlplane")
	refused("STATE")
	n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700)) // storaged
	for {
		resp, err := trust.Bootstrap(ctx, &trustv1.BootstrapRequest{})
		if status.Code(err) == codes.FailedPrecondition { // until trustd has looked
			continue
		}
		n.must(err)
		if resp.GetAlready() {
			t.Error("already")
		}
		break
	}
	list, err := trust.ListCertificates(ctx, &trustv1.ListCertificatesRequest{})
	n.must(err)
	var got []string
	for _, c := range list.GetCertificates() {
		got = append(got, c.GetProfile()+" "+c.GetSubject())
	}
	for _, want := range []string{"os-ca ", "etcd-ca ", "kubernetes-ca ", "front-proxy-ca ", "owner CN=ann,O=bulkhead:admin", "apid-server CN=apid"} {
		if !strings.Contains(strings.Join(got, "\n"), want) {
			t.Errorf("no certificate %q in\n%s", want, strings.Join(got, "\n"))
		}
	}

	// Credentials for others, and what they may do with them.
	minted, err := trust.MintToken(ctx, &trustv1.MintTokenRequest{Name: "prometheus", Roles: []string{"reader"}})
	n.must(err)
	reader, err := client.Dial(n.address, client.Credentials{CA: creds.CA, Token: minted.GetToken()})
	n.must(err)
	defer reader.Close()
	if _, err := trustv1.NewTrustClient(reader).ListCertificates(ctx, &trustv1.ListCertificatesRequest{}); err != nil {
		t.Error(err)
	}
	_, err = trustv1.NewTrustClient(reader).MintToken(ctx, &trustv1.MintTokenRequest{Name: "me", Roles: []string{"admin"}})
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(status.Convert(err).Message(), "needs role admin") {
		t.Errorf("a reader mints: %v", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	n.must(err)
	issued, err := trust.IssueCertificate(ctx, &trustv1.IssueCertificateRequest{Csr: csr, Name: "bob", Roles: []string{"operator"}})
	n.must(err)
	if cert, err := x509.ParseCertificate(issued.GetCertificate()); err != nil || cert.Subject.CommonName != "bob" {
		t.Errorf("%v, %v", cert, err)
	}
}

// Daemons restart again and again; no call fails, and the node stays its owner's.
func TestNoCallFailsDuringRestarts(t *testing.T) {
	for name, pick := range map[string]func(*node) func() func(){
		"trustd": func(n *node) func() func() { return n.startTrustd },
		"apid":   func(n *node) func() func() { return n.startApid },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.must(os.Mkdir(filepath.Join(n.dir, "state"), 0o700))
			start := pick(n)
			stops := map[string]func(){"trustd": n.startTrustd(), "apid": n.startApid()}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			creds, err := client.Claim(ctx, n.address, n.console.code(t), "")
			n.must(err)
			conn, err := client.Dial(n.address, creds)
			n.must(err)
			defer conn.Close()
			enough := make(chan struct{})
			calls := make(chan int, 1)
			go func() {
				i := 0
				defer func() { calls <- i }()
				for ; ; i++ {
					if _, err := trustv1.NewTrustClient(conn).ListCertificates(ctx, &trustv1.ListCertificatesRequest{}); err != nil {
						t.Errorf("call %d: %v", i, err)
						return
					}
					select {
					case <-enough:
						return
					default:
					}
				}
			}()
			stop := stops[name]
			for range 10 {
				stop()
				stop = start()
			}
			close(enough)
			t.Logf("%d calls", <-calls)
		})
	}
}
