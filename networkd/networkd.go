// Package networkd brings the network to what the document says: links, addresses, routes, DHCP leases, the resolver's files
// and the ingress firewall.
//
// It is the only daemon that changes the network and the only one that parses what DHCP servers send. It knows of pods
// what kubeletd tells it, the ways to other nodes' and with which address they leave this one, and leaves their links and chains alone. Until machined sends a spec it makes the node reachable: DHCP on
// every physical interface, and a firewall that lets in what the node's own doors need.
package networkd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/networkd/dhcp"
)

// Config is fixed for the life of the process.
type Config struct {
	Env daemon.Env
	// Dir is networkd's runtime folder: leases, the last spec, and the files that /etc links to. It must exist; a boot empties it.
	Dir string
	// Hostname is the name of a node whose document gives it none.
	Hostname string
	// Resync is the longest time between two looks; 0 means one minute.
	Resync time.Duration
	// Grace is how long after its start a node without a spec only raises its links and asks for leases: a node that was configured
	// before has its spec by then, and does not build two firewalls in a row while everybody waits for it.
	Grace time.Duration
}

// grace is more than storaged, machined and networkd need together until there is a spec, under emulation too.
const grace = 3 * time.Second

// Daemon is networkd. Make it with New.
type Daemon struct {
	cfg    Config
	log    *slog.Logger
	kernel kernel
	loop   *reconcile.Loop[Spec, State, Step]
	status latest.Cell[*networkv1.Status]
	gauges gauges
	pods   atomic.Pointer[Pods] // what kubeletd asked for; nil: nothing yet

	holding sync.Mutex // held while virtual addresses come or go
}

// Run is networkd as PID 1 starts it.
func Run(ctx context.Context, env daemon.Env) error {
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		env.Log.Warn("no machine id: the node's default name is not its own", "err", err.Error())
	}
	d, err := New(Config{Env: env, Dir: filepath.Join(unit.RunDir, env.Name), Grace: grace, Hostname: defaultHostname(strings.TrimSpace(string(id)))})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New reads what an earlier process left in the runtime folder and opens what is needed for good. It changes nothing yet.
func New(cfg Config) (*Daemon, error) {
	var d *Daemon
	pool, err := dhcp.NewPool(cfg.Env.Log, cfg.Dir, func() { d.loop.Wake() })
	if err != nil {
		return nil, err
	}
	k, err := newLinux(cfg.Dir, pool)
	if err != nil {
		return nil, err
	}
	d = newDaemon(cfg, k)
	return d, d.recall()
}

func newDaemon(cfg Config, k kernel) *Daemon {
	d := &Daemon{cfg: cfg, log: cfg.Env.Log, kernel: k, gauges: newGauges(cfg.Env.Metrics)}
	settled := time.Now().Add(cfg.Grace)
	d.loop = reconcile.New(reconcile.System[Spec, State, Step]{
		Parse: func(documents []byte) (Spec, error) { return parse(documents, cfg.Hostname) },
		Observe: func(ctx context.Context) (State, error) {
			have, err := k.Read(ctx)
			have.Pods = d.pods.Load()
			have.Young = time.Now().Before(settled)
			return have, err
		},
		Plan:       func(want Spec, have State) ([]Step, error) { return plan(want, have), nil },
		Bare:       func(have State) ([]Step, error) { return planBare(cfg.Hostname, have), nil },
		Apply:      k.Do,
		Conditions: conditions,
		Report:     d.report,
	}, d.log, cfg.Resync)
	d.status.Set(&networkv1.Status{})
	return d
}

// Run serves until ctx is done and every goroutine it started has returned.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.loop.Run(ctx) })
	g.Go(func() error { return d.kernel.Run(ctx, d.loop.Wake) })
	defer time.AfterFunc(d.cfg.Grace, d.loop.Wake).Stop()
	g.Go(func() error {
		return daemon.Serve(ctx, d.cfg.Env, callers, func(s *grpc.Server) {
			networkv1.RegisterNetworkServer(s, &server{d: d})
			networkv1.RegisterPodsServer(s, &pods{d: d})
			networkv1.RegisterVirtualServer(s, &virtual{d: d})
			controlv1.RegisterControlServer(s, &control{Control: reconcile.Control[Spec, State, Step]{Loop: d.loop, Metrics: d.metrics()}, d: d})
		})
	})
	return g.Wait()
}

// callers are those besides apid and, for control, machined.
var callers = peer.List{
	networkv1.Network_ServiceDesc.ServiceName: {uid.Kubeletd, uid.Trustd, uid.Machined}, // they watch the node's addresses
	networkv1.Pods_ServiceDesc.ServiceName:    {uid.Kubeletd},
	networkv1.Virtual_ServiceDesc.ServiceName: {uid.Kubeletd},
}

// Callers lists who may call what, besides apid (public services) and machined (control).
func Callers() peer.List { return callers }

func (d *Daemon) metrics() *metrics.Set { return d.cfg.Env.Metrics }

// defaultHostname is "bulkhead-" and six digits that follow from the machine's id.
func defaultHostname(machineID string) string {
	if len(machineID) >= 6 {
		return "bulkhead-" + strings.ToLower(machineID[:6])
	}
	sum := sha256.Sum256([]byte(machineID))
	return "bulkhead-" + hex.EncodeToString(sum[:3])
}
