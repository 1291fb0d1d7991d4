// Package etcdd is the node's etcd member: it waits until there is an authority and a volume, runs etcd's own server in this
// process, and keeps the users and roles in it as the table in plan.go says.
//
// It joins the cluster that other control planes have, and leaves it in order. On its socket it lends a part of etcd to daemons that have no network (store.v1), and
// keeps the register of nodes (cluster.v1), by which it has them restart one after the other.
//
// It may write /var/lib/etcd and its runtime folder, and listen for clients on the loopback address and for members on all. It knows nothing of what Kubernetes
// or Bulkhead keep in etcd but the prefixes of their keys, and the register.
package etcdd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/services/etcdd/rolling"
)

// Config is fixed for the life of the process. The zero values of optional fields are what a node uses.
type Config struct {
	Env    daemon.Env           // required
	Signer trustv1.SignerClient // required: trustd
	// Peers are the other control planes, through apid. It is needed to join them.
	Peers etcdv1.PeersClient
	// Kubernetes empties nodes of pods before they restart; nil: there is none.
	Kubernetes rolling.Drainer
	// Witness shows a node whose version is on trial that its API can be called; nil: nothing does.
	Witness func(ctx context.Context, node string) error
	// DataDir is etcd's folder on VAR; it is waited for, not made. Default /var/lib/etcd.
	DataDir string
	// RunDir is where certificates go; etcd reads them anew at each handshake. Default /run/bulkhead/etcdd.
	RunDir string
	// Client, Peer and HTTP are host and port to listen on: for gRPC, for other members, and for /metrics and /health.
	// Defaults 127.0.0.1:2379, all addresses' 2380, and 127.0.0.1:2381.
	Client, Peer, HTTP string
	// Addresses returns the node's own, at which others could reach it; nil means those of its interfaces.
	Addresses func() ([]netip.Prefix, error)
	// Now is the clock by which nodes are lost and snapshots are due; nil means time.Now.
	Now func() time.Time
	// Resync is the longest time between two looks; 0 means one minute.
	Resync time.Duration
}

// Daemon runs one member. Make it with New.
type Daemon struct {
	env    daemon.Env
	kernel *member
	loop   *reconcile.Loop[spec, State, Step]
	status status

	registry *registry
	keeper   *keeper
	rolling  *rolling.Coordinator
}

// Run builds the daemon as on a node and runs it.
func Run(ctx context.Context, env daemon.Env) error {
	conn, err := peer.Dial(peer.Socket("trustd"))
	if err != nil {
		return err
	}
	defer conn.Close()
	others, err := peer.Dial(peer.Socket("apid"))
	if err != nil {
		return err
	}
	defer others.Close()
	kubeletd, err := peer.Dial(peer.Socket("kubeletd"))
	if err != nil {
		return err
	}
	defer kubeletd.Close()
	d, err := New(Config{Env: env, Signer: trustv1.NewSignerClient(conn), Peers: etcdv1.NewPeersClient(others),
		Kubernetes: pods{kubernetesv1.NewDrainClient(kubeletd)}, Witness: witness(machinev1.NewTrialClient(others))})
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
	orDefault(&cfg.Peer, peerListen())
	orDefault(&cfg.HTTP, "127.0.0.1:2381")
	for _, a := range []string{cfg.Client, cfg.Peer, cfg.HTTP} {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return nil, err
		}
	}
	if cfg.Addresses == nil {
		cfg.Addresses = nodeaddr.Own
	}
	d := &Daemon{env: cfg.Env, kernel: newMember(cfg), status: newStatus(cfg.Env.Metrics)}
	d.registry = newRegistry(d.kernel, cfg.Now)
	d.rolling = d.newRolling(cfg.Kubernetes, cfg.Witness)
	d.loop = reconcile.New(reconcile.System[spec, State, Step]{
		Parse: parse, Observe: d.observe, Plan: plan, Apply: d.kernel.Do, Conditions: d.conditions, Report: d.report,
	}, cfg.Env.Log, cfg.Resync)
	d.keeper = newKeeper(d.kernel, cfg, func() schedule { s, _ := d.loop.Spec(); return s.Snapshots }, d.loop.Wake)
	return d, nil
}

// Run serves until ctx is done or the member fails, and stops the member cleanly.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.kernel.Stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.loop.Run(ctx) })
	g.Go(func() error { return d.kernel.Watch(ctx, d.loop.Wake) })
	g.Go(func() error { return d.registry.run(ctx) })
	g.Go(func() error { return d.keeper.run(ctx) })
	g.Go(func() error { return d.registry.publish(ctx) })
	g.Go(func() error { return d.rolling.Run(ctx) })
	g.Go(func() error {
		return daemon.Serve(ctx, d.env, callers, func(s *grpc.Server) {
			etcdv1.RegisterEtcdServer(s, &server{d: d})
			etcdv1.RegisterPeersServer(s, &peersServer{d: d})
			clusterv1.RegisterRegistryServer(s, &registryServer{d: d})
			clusterv1.RegisterRollingServer(s, &rolling.Server{C: d.rolling})
			storev1.RegisterStoreServer(s, &storeServer{d: d})
			controlv1.RegisterControlServer(s, &reconcile.Control[spec, State, Step]{Loop: d.loop, Metrics: d.env.Metrics})
		})
	})
	return g.Wait()
}

// callers are those besides apid. A method's own entry goes before its service's, so that apid stands there too.
var callers = peer.List{
	// machined asks whether the node is one of several before it is reset, trustd whether one is a member still before it ends its membership.
	etcdv1.Etcd_GetStatus_FullMethodName:     {uid.Apid, uid.Machined, uid.Trustd},
	etcdv1.Etcd_Leave_FullMethodName:         {uid.Apid, uid.Machined},                 // before a reset
	clusterv1.Registry_Report_FullMethodName: {uid.Apid, uid.Machined},                 // of this node
	storev1.Store_ServiceDesc.ServiceName:    {uid.Trustd, uid.Machined, uid.Kubeletd}, // see prefixes
}

// Callers is who may call what, besides apid and machined's Control: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers }

// observe is all of it that the plan and health are made from.
func (d *Daemon) observe(ctx context.Context) (State, error) {
	s, err := d.kernel.Read(ctx)
	s.Snapshots = d.keeper.trouble()
	return s, err
}

// conditions are for the node's health, and say what the member waits for.
func (d *Daemon) conditions(have State) []*controlv1.Condition {
	want, _ := d.loop.Spec()
	return conditions(want, have)
}

// parse reads the sections Machine and Cluster.
func parse(documents []byte) (spec, error) {
	set, err := config.Parse("spec", documents)
	if err != nil {
		return spec{}, err
	}
	sn := set.Cluster.Etcd.Snapshots
	return spec{Name: set.Machine.Hostname, Role: set.Machine.Role, Endpoint: nodeaddr.InURL(set.Cluster.Endpoint),
		Snapshots: schedule{every: time.Duration(*sn.Every) * time.Hour, keep: sn.Keep}}, nil
}

func orDefault(s *string, v string) {
	if *s == "" {
		*s = v
	}
}
