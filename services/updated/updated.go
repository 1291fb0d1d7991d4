// Package updated is the daemon that installs versions of the system: it fetches an image, verifies its signature and hands it to
// storaged, chunk by chunk; after the restart it finds out whether the new version is good, and afterwards says what became of it.
//
// It talks to servers that nobody vouches for, and so may do nothing: it has a network, but no capability, no device, and no file but its
// journal. storaged believes none of its words. It must not know what a slot or a boot loader is.
package updated

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	keysv1 "github.com/bulkhead-os/bulkhead/api/keys/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/reconcile"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// releaseKeys is where the image has the keys whose bundles it takes.
const releaseKeys = "/usr/share/bulkhead/release.pub"

// Times between two looks.
const (
	trialTime  = 5 * time.Second // while a version is on trial
	bookTime   = time.Second     // until the journal is open and a version that was left is explained
	resyncTime = 10 * time.Minute
	callTime   = 10 * time.Second // that a call to another daemon may take
)

// Config is fixed for the life of the process. All fields are required.
type Config struct {
	Env     daemon.Env // Listen, Log and Metrics are required
	Slots   slotv1.SlotsClient
	Machine machinev1.MachineClient
	// Keys returns the release keys that this image trusts.
	Keys func() (bundle.Keys, error)
	// Restart has the machine restarted. It is called again and again until that happens.
	Restart func() error
	// Uptime is the time since the kernel was started.
	Uptime func() time.Duration
	// Folder is the daemon's on STATE. It may appear later.
	Folder string
	// GoodFile is made when the running version is good, and JudgedFile written anew whenever one on trial was looked at; both for PID 1.
	GoodFile, JudgedFile string

	limits limits // with sources; the zero value means patient
}

// Daemon is updated. Make it with New; Run must be called once.
type Daemon struct {
	cfg    Config
	log    *slog.Logger
	loop   *reconcile.Loop[config.Update, State, Step]
	book   *book
	meters meters

	state    latest.Cell[State] // of the last round
	status   latest.Cell[*updatev1.Status]
	progress latest.Cell[*updatev1.UpgradeProgress] // nil: no upgrade runs
	busy     chan struct{}                          // held by the one upgrade that runs
	changed  atomic.Bool                            // the slots are to be looked at again
	quit     atomic.Bool                            // the running version was rolled back: it is not to be found good any more
}

// Run is updated as cmd/bulkheadd calls it.
func Run(ctx context.Context, env daemon.Env) error {
	storaged, err := peer.Dial(peer.Socket("storaged"))
	if err != nil {
		return err
	}
	defer storaged.Close()
	machined, err := peer.Dial(peer.Socket("machined"))
	if err != nil {
		return err
	}
	defer machined.Close()
	d, err := New(Config{
		Env: env, Slots: slotv1.NewSlotsClient(storaged), Machine: machinev1.NewMachineClient(machined), Folder: unit.StateDir + "/updated", GoodFile: unit.GoodFile, JudgedFile: unit.JudgedFile,
		Keys: func() (bundle.Keys, error) {
			text, err := os.ReadFile(releaseKeys)
			if err != nil {
				return nil, err
			}
			return bundle.ParseKeys(text)
		},
		Restart: restarter(machinev1.NewMachineClient(machined), func() error {
			pid1, err := initctl.Dial("")
			if err != nil {
				return err
			}
			return errors.Join(pid1.Reboot(), pid1.Close())
		}, time.Now),
		Uptime: func() time.Duration {
			var t unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
				return 0
			}
			return time.Duration(t.Nano())
		},
	})
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// obeyTime is what machined has to carry out an order to restart.
const obeyTime = 5 * time.Second

// restarter returns what restarts the machine: by machined, which notes who ordered it, and if that does not do it, for it may be what does not work, by
// PID 1. It is called again until the machine is down; one goroutine may call it.
func restarter(machined machinev1.MachineClient, pid1 func() error, now func() time.Time) func() error {
	var until time.Time
	return func() error {
		if until.IsZero() {
			until = now().Add(obeyTime)
			ctx, cancel := context.WithTimeout(context.Background(), obeyTime)
			defer cancel()
			if _, err := machined.Reboot(ctx, &machinev1.RebootRequest{}); err != nil {
				until = now()
			}
		}
		if now().Before(until) {
			return nil
		}
		return pid1()
	}
}

// New returns a daemon that has done nothing yet.
func New(cfg Config) (*Daemon, error) {
	if cfg.Env.Listen == nil || cfg.Env.Log == nil || cfg.Env.Metrics == nil || cfg.Slots == nil || cfg.Machine == nil ||
		cfg.Keys == nil || cfg.Restart == nil || cfg.Uptime == nil || cfg.Folder == "" || cfg.GoodFile == "" || cfg.JudgedFile == "" {
		return nil, errors.New("updated: every field of Config is required")
	}
	if cfg.limits == (limits{}) {
		cfg.limits = patient
	}
	d := &Daemon{cfg: cfg, log: cfg.Env.Log, book: &book{dir: cfg.Folder}, meters: newMeters(cfg.Env.Metrics), busy: make(chan struct{}, 1)}
	d.status.Set(&updatev1.Status{})
	d.loop = reconcile.New(reconcile.System[config.Update, State, Step]{
		Parse: parse, Observe: d.observe, Plan: d.plan, Bare: d.planBare, Apply: d.apply, Report: d.report,
		Conditions: func(State) []*controlv1.Condition { return conditions(d.book.get()) },
	}, cfg.Env.Log, 0)
	return d, nil
}

// parse takes the section that is ours out of the documents.
func parse(documents []byte) (config.Update, error) {
	set, err := config.Parse("", documents)
	if err != nil {
		return config.Update{}, err
	}
	return *set.Update, nil
}

// Run serves until ctx is done and every goroutine it started has returned.
func (d *Daemon) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.loop.Run(ctx) })
	g.Go(func() error { return d.keepBook(ctx) })
	g.Go(func() error {
		return daemon.Serve(ctx, d.cfg.Env, callers, func(s *grpc.Server) {
			updatev1.RegisterUpdateServer(s, &server{d: d})
			keysv1.RegisterRelayServer(s, relayServer{})
			controlv1.RegisterControlServer(s, &reconcile.Control[config.Update, State, Step]{Loop: d.loop, Metrics: d.cfg.Env.Metrics})
		})
	})
	return g.Wait()
}

// architecture is this program's, and so the node's.
const architecture = runtime.GOARCH
