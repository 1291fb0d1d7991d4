package issuer

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/apid"
	"github.com/bulkhead-os/bulkhead/gateway"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/leaf"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/trustd"
)

// node is a node's doors, and trustd behind them, with an owner.
type node struct {
	t      *testing.T
	dir    string
	caller sync.Map // *atomic.Uint32 by daemon: user id of who connects to its Unix socket
	api    string   // apid's address
	rest   string   // gateway's
	owner  client.Credentials
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// console keeps what trustd writes.
type console struct{ text latest.Cell[string] }

func (c *console) Write(p []byte) (int, error) {
	was, _ := c.text.Get()
	c.text.Set(was + string(p))
	return len(p), nil
}

// who is apid until something else is said.
func (n *node) who(daemon string) *atomic.Uint32 {
	id := &atomic.Uint32{}
	id.Store(uint32(uid.Apid))
	kept, _ := n.caller.LoadOrStore(daemon, id)
	return kept.(*atomic.Uint32)
}

func (n *node) env(name string, tcp net.Listener) daemon.Env {
	l, err := net.Listen("unix", filepath.Join(n.dir, name))
	n.must(err)
	caller := n.who(name)
	return daemon.Env{Name: name, Log: slog.New(slog.DiscardHandler), Metrics: metrics.New(name), Listen: l, TCP: tcp, Ready: func() {},
		Who: func(net.Conn) (uid.ID, error) { return uid.ID(caller.Load()), nil }}
}

func (n *node) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	n.t.Cleanup(func() { cancel(); <-done })
}

func (n *node) tcp() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	n.must(err)
	return l
}

// as connects to a daemon's socket as a user of the node.
func (n *node) as(id uid.ID, name string) *grpc.ClientConn {
	n.t.Helper()
	caller := n.who(name)
	before := caller.Swap(uint32(id))
	defer caller.Store(before)
	conn, err := peer.Dial(filepath.Join(n.dir, name))
	n.must(err)
	n.t.Cleanup(func() { conn.Close() })
	conn.Connect() // the user is read when the connection is made
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if !conn.WaitForStateChange(n.t.Context(), s) {
			n.t.Fatal("no connection to " + name)
		}
	}
	return conn
}

// newNode starts the daemons, tells them a document, and makes the test the owner.
func newNode(t *testing.T, document string) *node {
	dir, err := os.MkdirTemp("", "issuer") // short: a socket's path has at most 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{t: t, dir: dir}
	for _, d := range []string{"runtime", "state"} {
		n.must(os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	c := &console{}
	socket := func(name string) string { return filepath.Join(dir, name) }
	trust, err := trustd.New(trustd.Config{Env: n.env("trustd", nil), Runtime: filepath.Join(dir, "runtime"), StateDir: filepath.Join(dir, "state"),
		ClaimKey: filepath.Join(dir, "claim-key"), Blocks: filepath.Join(dir, "block"), Console: c, Socket: socket})
	n.must(err)
	n.run(trust.Run)
	tell := func(name string) {
		_, err := controlv1.NewControlClient(n.as(uid.Machined, name)).SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: &controlv1.Spec{Generation: 1, Documents: []byte(document)}})
		n.must(err)
	}
	tell("trustd")
	signer := trustv1.NewSignerClient(n.as(uid.Gateway, "trustd"))

	door := n.tcp()
	n.api = door.Addr().String()
	d, err := apid.New(apid.Config{Env: n.env("apid", door), Socket: socket})
	n.must(err)
	n.run(d.Run)
	tell("apid")
	code := ""
	for code == "" {
		text, changed := c.text.Get()
		if _, rest, ok := strings.Cut(text, "Claim code:"); ok {
			code = strings.Fields(rest)[0]
			break
		}
		<-changed
	}
	n.owner, err = client.Claim(t.Context(), n.api, code, "owner")
	n.must(err)

	roots := leaf.NewTrust(signer, slog.New(slog.DiscardHandler))
	l := leaf.New(leaf.Config{Signer: signer, Profile: "gateway-server", Trust: roots, Log: slog.New(slog.DiscardHandler)})
	n.run(roots.Run)
	n.run(l.Run)
	web := n.tcp()
	n.rest = web.Addr().String()
	g, err := gateway.New(gateway.Config{Env: n.env("gateway", web), Apid: n.as(uid.Gateway, "apid"), Leaf: l})
	n.must(err)
	n.run(g.Run)
	return n
}
