// Package etcdd is the node's etcd member: it waits until there is an authority and a volume, runs etcd's own server in this
// process, and keeps the users and roles in it as the table in plan.go says.
//
// It may write /var/lib/etcd and its runtime folder, and listen on the loopback address. It knows nothing of what Kubernetes
// or Bulkhead keep in etcd but the prefixes of their keys.
package etcdd

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// Config is fixed for the life of the process. The zero values of optional fields are what a node uses.
type Config struct {
	Env    daemon.Env           // required
	Signer trustv1.SignerClient // required: trustd
	// DataDir is etcd's folder on VAR; it is waited for, not made. Default /var/lib/etcd.
	DataDir string
	// RunDir is where certificates go; etcd reads them anew at each handshake. Default /run/bulkhead/etcdd.
	RunDir string
	// Client, Peer and HTTP are host and port to listen on: for gRPC, for other members, and for /metrics and /health.
	// Defaults 127.0.0.1:2379, :2380 and :2381.
	Client, Peer, HTTP string
	// Resync is the longest time between two looks; 0 means one minute.
	Resync time.Duration
}

// Daemon runs one member. Make it with New.
type Daemon struct {
	env    daemon.Env
	kernel *member
	loop   *reconcile.Loop[spec, State, Step]
	status status
	// snapshots has one slot: a second snapshot at the same time would only slow the first one down.
	snapshots chan struct{}
}

// Run builds the daemon as on a node and runs it.
func Run(ctx context.Context, env daemon.Env) error {
	conn, err := peer.Dial(peer.Socket("trustd"))
	if err != nil {
		return err
	}
	defer conn.Close()
	d, err := New(Config{Env: env, Signer: trustv1.NewSignerClient(conn)})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New returns a daemon that has done nothing yet. It fails if a required field is missing or an address is none.
func New(cfg Config) (*Daemon, error) {
	if cfg.Signer == nil || cfg.Env.Log == nil || cfg.Env.Listen == nil {
		return nil, errors.New("etcdd: Config needs Signer, Env.Log and Env.Listen")
	}
	orDefault(&cfg.DataDir, "/var/lib/etcd")
	orDefault(&cfg.RunDir, unit.RunDir+"/etcdd")
	orDefault(&cfg.Client, "127.0.0.1:2379")
	orDefault(&cfg.Peer, "127.0.0.1:2380")
	orDefault(&cfg.HTTP, "127.0.0.1:2381")
	for _, a := range []string{cfg.Client, cfg.Peer, cfg.HTTP} {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, err
		}
	}
	d := &Daemon{env: cfg.Env, kernel: newMember(cfg), status: newStatus(cfg.Env.Metrics), snapshots: make(chan struct{}, 1)}
	d.loop = reconcile.New(reconcile.System[spec, State, Step]{
		Parse: parse, Observe: d.kernel.Read, Plan: plan, Apply: d.kernel.Do, Report: d.report,
	}, cfg.Env.Log, cfg.Resync)
	return d, nil
}

// Run serves until ctx is done or the member fails, and stops the member cleanly.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.kernel.Stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.loop.Run(ctx) })
	g.Go(func() error { return d.kernel.Watch(ctx, d.loop.Wake) })
	g.Go(func() error {
		return daemon.Serve(ctx, d.env, callers, func(s *grpc.Server) {
			etcdv1.RegisterEtcdServer(s, &server{d: d})
			controlv1.RegisterControlServer(s, &reconcile.Control[spec, State, Step]{Loop: d.loop, Metrics: d.env.Metrics})
		})
	})
	return g.Wait()
}

// callers are those besides apid: machined asks whether the node is one of several before it resets it.
var callers = peer.List{etcdv1.Etcd_GetStatus_FullMethodName: {uid.Apid, uid.Machined}}

// parse reads the sections Machine and Cluster.
func parse(documents []byte) (spec, error) {
	set, err := config.Parse("spec", documents)
	if err != nil {
		return spec{}, err
	}
	return spec{Name: set.Machine.Hostname, Role: set.Machine.Role}, nil
}

func orDefault(s *string, v string) {
	if *s == "" {
		*s = v
	}
}
