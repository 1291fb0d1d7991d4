// Package storaged is the daemon for disks: it sees them all, makes STATE and VAR on one of them, encrypted if that is wanted, opens and grows
// them, and is the only daemon that mounts.
//
// It may write to any disk, so everything that decides is pure (plan.go) and everything that acts looks once more (kernel.go,
// volume.go). Two rules stand above what a user asks for: what holds data is never formatted unless Storage.wipe allows it, and
// a volume of ours that was ever formatted never is again. It keeps no file open on a volume, so that PID 1 can unmount it, and
// it unmounts nothing itself. A reset is the exception to all of this: it ends the volumes (reset.go, destroy.go, disposal.go).
package storaged

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// Config is fixed for the life of the process.
type Config struct {
	Env daemon.Env // Listen, Log and Metrics are required
	// Resync is the longest time between two looks; 0 means one minute.
	Resync time.Duration
	// Relay reaches key services; nil: they cannot be reached.
	Relay vault.Relay
}

// A kernel is the part of Linux that storaged reads and changes.
type kernel interface {
	Read(context.Context) (State, error)
	Do(context.Context, Step) error
	Watch(ctx context.Context, wake func()) error
}

// Daemon is storaged. Make it with New; Run must be called once.
type Daemon struct {
	env    daemon.Env
	log    *slog.Logger
	kernel kernel
	loop   *reconcile.Loop[config.Storage, State, Step]
	status latest.Cell[*storagev1.Status]
	meters meters
	vault  *vault.Vault
	folder folderOf
	slow   chan struct{} // slots for answers to wrong keys
	slots  *slots.Server // nil with a model of the kernel
}

// Run is storaged as cmd/bulkheadd calls it.
func Run(ctx context.Context, env daemon.Env) error {
	updated, err := peer.Dial(peer.Socket("updated"))
	if err != nil {
		return err
	}
	defer updated.Close()
	d, err := New(Config{Env: env, Relay: relay{keysv1.NewRelayClient(updated)}})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// New returns a daemon that has touched nothing yet.
func New(cfg Config) (*Daemon, error) {
	if cfg.Env.Listen == nil || cfg.Env.Log == nil || cfg.Env.Metrics == nil {
		return nil, errors.New("storaged: Env.Listen, Env.Log and Env.Metrics are required")
	}
	v := nodeVault(cfg.Relay)
	l := newLinux(cfg.Env.Log, v)
	d := newDaemon(cfg, l, v, l.folder)
	d.slots = newSlots(l, cfg.Env.Log)
	l.news = d.progress
	return d, nil
}

func newDaemon(cfg Config, k kernel, v *vault.Vault, folder folderOf) *Daemon {
	d := &Daemon{
		env: cfg.Env, log: cfg.Env.Log, kernel: k, meters: newMeters(cfg.Env.Metrics), vault: v, folder: folder, slow: make(chan struct{}, wrongProofs),
	}
	d.status.Set(&storagev1.Status{})
	d.loop = reconcile.New(reconcile.System[config.Storage, State, Step]{
		Parse: parse, Observe: k.Read, Plan: plan, Bare: planBare, Apply: k.Do, Conditions: conditions, Restart: restart, Report: d.report,
	}, cfg.Env.Log, cfg.Resync)
	return d
}

// parse takes the section that is ours out of the documents.
func parse(documents []byte) (config.Storage, error) {
	set, err := config.Parse("", documents)
	if err != nil {
		return config.Storage{}, err
	}
	return *set.Storage, nil
}

// Run serves until ctx is done and every goroutine it started has returned. Ready is said once the socket is served; volumes that
// are there already are mounted meanwhile, without waiting for a spec.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.loop.Run(ctx) })
	g.Go(func() error { return d.kernel.Watch(ctx, d.loop.Wake) })
	g.Go(func() error { return d.serve(ctx) })
	return g.Wait()
}

func (d *Daemon) serve(ctx context.Context) error {
	return daemon.Serve(ctx, d.env, callers, func(s *grpc.Server) {
		storagev1.RegisterStorageServer(s, &server{d: d})
		storagev1.RegisterUnlockServer(s, unlockServer{d: d})
		storagev1.RegisterKeysServer(s, keyServer{d: d})
		storagev1.RegisterDisposalServer(s, disposalServer{d: d})
		storagev1.RegisterAttestationServer(s, attestationServer{d: d})
		if d.slots != nil {
			slotv1.RegisterSlotsServer(s, d.slots)
			storagev1.RegisterSecureBootServer(s, secureBootServer{d: d, fw: newFirmware(d.slots.Linux)})
		}
		controlv1.RegisterControlServer(s, &reconcile.Control[config.Storage, State, Step]{Loop: d.loop, Metrics: d.env.Metrics})
	})
}
