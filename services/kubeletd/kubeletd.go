// Package kubeletd is the Kubernetes side of the node: it renders the configuration of containerd, the kubelet, kube-proxy and the
// control plane, orders these units from PID 1, watches their health, and keeps in the cluster what the node needs there.
//
// It is not root: it may write its runtime folder, start and stop the units that name it as owner, ask trustd for certificates, and
// talk to the API server. It must not touch containers: that is the kubelet's business.
package kubeletd

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/nodeaddr"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/services/kubeletd/balance"
)

// supervisor is what PID 1 does for kubeletd; *initctl.Client is one.
type supervisor interface {
	Start(unit string) error
	Stop(unit string) error
	Restart(unit string) error
	Status() ([]initctl.Status, error)
	Watch(ctx context.Context, f func(initctl.Status)) error
}

// Config is fixed for the life of the process. The zero values of optional fields are what a node uses.
type Config struct {
	Env    daemon.Env           // required; its TCP listener is the balancer's, on loopback
	Signer trustv1.SignerClient // required: trustd
	Pods   networkv1.PodsClient // required: networkd
	Init   supervisor           // required: PID 1
	// Store is etcdd's, and Virtual networkd's; without either the node never has the cluster's virtual addresses, and without Store it does not wait for other control planes that start anew.
	Store   storev1.StoreClient
	Virtual networkv1.VirtualClient

	Dir         string // runtime folder; default /run/bulkhead/kubeletd
	Program     string // the kubelet: an image without it has no Kubernetes, and there is nothing to do; default /usr/bin/kubelet
	VolumeMark  string // file that exists on the real VAR only; default /var/.mounted
	Audit       string // folder of the API server's audit log; default /var/log/kubernetes/audit
	Resolv      string // default /etc/resolv.conf
	Routes      string // default /proc/net/route
	Containerd  string // containerd's socket; default /run/containerd/containerd.sock
	EtcdAddress string // default 127.0.0.1:2379
	APIServer   string // this node's own, on a control plane; default https://127.0.0.1:6443
	Kubelet     string // where it serves TLS; default 127.0.0.1:10250
	// Links reads the node's interfaces; default nodeaddr.Links.
	Links func() ([]nodeaddr.Link, error)
	// Hostname reads the kernel's host name; default os.Hostname.
	Hostname func() (string, error)
	// Group maps a user to the group of files; default: the user's own number.
	Group func(uid.ID) int
	// Resync is the longest time between two looks; 0 means one minute.
	Resync time.Duration
}

// Daemon is one node's supervisor of Kubernetes. Make it with New.
type Daemon struct {
	cfg     Config
	kernel  *system
	loop    *reconcile.Loop[spec, State, Step]
	status  latest.Cell[*kubernetesv1.Status]
	figures figures
}

// Run builds the daemon as on a node and runs it.
func Run(ctx context.Context, env daemon.Env) error {
	conn, err := peer.Dial(peer.Socket("trustd"))
	if err != nil {
		return err
	}
	defer conn.Close()
	network, err := peer.Dial(peer.Socket("networkd"))
	if err != nil {
		return err
	}
	defer network.Close()
	store, err := peer.Dial(peer.Socket("etcdd"))
	if err != nil {
		return err
	}
	defer store.Close()
	pid1, err := initctl.Dial("")
	if err != nil {
		return err
	}
	defer pid1.Close()
	d, err := New(Config{
		Env: env, Signer: trustv1.NewSignerClient(conn), Pods: networkv1.NewPodsClient(network), Init: pid1,
		Store: storev1.NewStoreClient(store), Virtual: networkv1.NewVirtualClient(network),
	})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New returns a daemon that has done nothing yet.
func New(cfg Config) (*Daemon, error) {
	if cfg.Signer == nil || cfg.Pods == nil || cfg.Init == nil || cfg.Env.Log == nil || cfg.Env.Listen == nil || cfg.Env.TCP == nil {
		return nil, errors.New("kubeletd: Config needs Signer, Pods, Init, Env.Log, Env.Listen and Env.TCP")
	}
	orDefault(&cfg.Dir, unit.RunDir+"/kubeletd")
	orDefault(&cfg.Program, "/usr/bin/kubelet")
	orDefault(&cfg.VolumeMark, "/var/.mounted")
	orDefault(&cfg.Audit, "/var/log/kubernetes/audit")
	orDefault(&cfg.Resolv, "/etc/resolv.conf")
	orDefault(&cfg.Routes, nodeaddr.Routes)
	orDefault(&cfg.Containerd, "/run/containerd/containerd.sock")
	orDefault(&cfg.EtcdAddress, "127.0.0.1:2379")
	orDefault(&cfg.APIServer, "https://127.0.0.1:6443")
	orDefault(&cfg.Kubelet, "127.0.0.1:10250")
	if cfg.Links == nil {
		cfg.Links = nodeaddr.Links
	}
	if cfg.Hostname == nil {
		cfg.Hostname = os.Hostname
	}
	if cfg.Group == nil {
		cfg.Group = func(id uid.ID) int { return int(id) }
	}
	// Before there is anything to write: the workload side is shown these folders and no others, from its start on.
	for _, e := range entries {
		if !e.worker {
			continue
		}
		if err := (disk{cfg.Dir, cfg.Group}).folder(File{Path: e.file, Group: e.group, Public: e.public}); err != nil {
			return nil, err
		}
	}
	d := &Daemon{cfg: cfg, figures: newFigures(cfg.Env.Metrics)}
	d.kernel = newSystem(cfg, func() spec { s, _ := d.loop.Spec(); return s })
	var err error
	d.kernel.balancer, err = balance.New(balance.Config{Listeners: []net.Listener{cfg.Env.TCP}, Log: cfg.Env.Log, Metrics: cfg.Env.Metrics})
	if err != nil {
		return nil, err
	}
	d.loop = reconcile.New(reconcile.System[spec, State, Step]{
		Parse: parse, Observe: d.kernel.Read, Plan: plan, Apply: d.kernel.Do, Report: d.report,
		Conditions: func(have State) []*controlv1.Condition {
			if want, generation := d.loop.Spec(); generation > 0 {
				return conditions(want, have)
			}
			return nil
		},
	}, cfg.Env.Log, cfg.Resync)
	d.status.Set(&kubernetesv1.Status{})
	return d, nil
}

// Run serves until ctx is done. Units that run go on running.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	env, served := d.cfg.Env, make(chan struct{})
	env.Ready = sync.OnceFunc(func() {
		d.cfg.Env.Ready()
		close(served)
	})
	// The first look at Kubernetes takes longer than anything else at a start: whoever calls is answered before.
	then := func(f func(context.Context) error) {
		g.Go(func() error {
			select {
			case <-served:
				return f(ctx)
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	then(d.loop.Run)
	then(func(ctx context.Context) error { return d.kernel.Watch(ctx, d.loop.Wake) })
	if d.cfg.Store != nil && d.cfg.Virtual != nil {
		then(d.keepVirtual)
	}
	g.Go(func() error {
		return daemon.Serve(ctx, env, callers, func(s *grpc.Server) {
			kubernetesv1.RegisterKubernetesServer(s, &server{d: d})
			kubernetesv1.RegisterDrainServer(s, newDrainServer(d))
			controlv1.RegisterControlServer(s, &reconcile.Control[spec, State, Step]{Loop: d.loop, Metrics: d.cfg.Env.Metrics})
		})
	})
	return g.Wait()
}

// parse reads the sections Machine, Cluster and Kubernetes.
func parse(documents []byte) (spec, error) {
	set, err := config.Parse("spec", documents)
	if err != nil {
		return spec{}, err
	}
	k := set.Kubernetes
	return spec{
		Node: set.Machine.Hostname, Role: set.Machine.Role, Cluster: set.Cluster.Name, Endpoint: set.Cluster.Endpoint, Domain: k.Domain,
		VirtualIPs: set.Cluster.VirtualIPs, PodSubnet: k.PodSubnet, ServiceSubnet: k.ServiceSubnet, CNI: k.CNI, PodSecurity: k.PodSecurity, Schedulable: k.Schedulable == nil || *k.Schedulable,
	}, nil
}

func orDefault(s *string, v string) {
	if *s == "" {
		*s = v
	}
}
