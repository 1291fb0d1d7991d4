// Package machined owns the node's configuration document, and tells what goes on in the node.
//
// It validates what an administrator applies, stores it as the next generation, and hands each daemon its sections. It keeps
// logs and events, and passes orders (restart, reboot) on to PID 1. It has no network and may do nothing but that and read the
// kernel's log. It must not know what a daemon makes of its section.
package machined

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/services/machined/audit"
	"github.com/bulkhead-os/bulkhead/services/machined/boots"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// Config is fixed for the life of the process. All fields but StateWait are required.
type Config struct {
	Log     *slog.Logger
	Metrics *metrics.Set
	// Runtime is the folder for logs and events; it outlives the process, not the boot.
	Runtime string
	// StateWait is how long the first Apply waits for storaged to make STATE; 0 means two minutes.
	StateWait time.Duration

	host  host
	past  past
	init  initd
	facts func() security.Facts // how the kernel and the machine are hardened
	links map[string]link       // to every daemon of recipients

	others  others // that a reset needs
	cluster cluster
}

// Daemon is machined.
type Daemon struct {
	cfg        Config
	running    latest.Cell[running]
	hands      []*handout // in the order of recipients
	events     *events
	kernel     *logs.Kernel
	figures    figures
	power      chan func() error // orders to carry out once they are answered
	streams    chan struct{}     // slots for streams of logs and events
	apply      chan struct{}     // held by the one Apply or load that runs
	journal    boots.Journal
	audit      *audit.Log
	protection protection
	since      atomic.Int64 // when the kernel's lines begin that the journal does not have yet, in nanoseconds as time.Time.UnixNano has them

	ending    latest.Cell[bool] // a reset has the right to change the configuration
	resetting atomic.Bool       // STATE is not to be used any more
	following atomic.Bool       // PID 1 was told to restart by an order of the cluster
	skew      atomic.Int64      // how far the control plane's clock was ahead at the last report, in nanoseconds
	answered  atomic.Bool       // a call with credentials has come through apid since the start of this process

	look chan struct{} // holds one word: the kernel's log has something new
	told atomic.Int64  // when the last event of an earlier process was, in nanoseconds: what the kernel said before is not told again

	mu      sync.Mutex
	store   *store.Store         // guarded by mu; nil until STATE is there
	history *boots.History       // guarded by mu; the same, and nil if it cannot be opened
	logs    map[string]*logs.Log // guarded by mu; by unit
	state   map[string]string    // guarded by mu; each unit's last state, for events
	falls   map[string]fall      // guarded by mu; when each unit's trouble began
	ends    map[string]ending    // guarded by mu; how each unit ended last without anybody's wish
	lives   map[string][]int     // guarded by mu; the last processes of each unit, the newest last
	denied  map[string]denied    // guarded by mu; what each unit was ended for last

	looked chan struct{} // closed when it is known whether there is a configuration on STATE, or that there is no STATE yet
}

// running is the configuration that is handed out. It is never changed, only replaced.
type running struct {
	store.Generation // Number 0: there is none
	set              config.Set
}

// Limits.
const (
	maxStreams  = 64 // of logs, kernel log and events at once
	statePause  = 200 * time.Millisecond
	powerPause  = 300 * time.Millisecond // so that the answer is out before its way is cut
	kernelPause = 500 * time.Millisecond
)

// Run is machined, started by PID 1.
func Run(ctx context.Context, env daemon.Env) error {
	pid1, err := initctl.Dial("")
	if err != nil {
		return err
	}
	defer pid1.Close()
	cfg := Config{
		Log: env.Log, Metrics: env.Metrics, Runtime: unit.RunDir + "/machined",
		host: linux{}, past: &linuxPast{}, init: pid1, links: map[string]link{},
		facts: func() security.Facts { return security.Read("/") },
	}
	elsewhere := &distant{}
	cfg.others = elsewhere
	conns := map[string]*grpc.ClientConn{}
	for _, r := range recipients {
		l, err := dial(r.daemon)
		if err != nil {
			return err
		}
		defer l.conn.Close()
		cfg.links[r.daemon], conns[r.daemon] = l, l.conn
		switch r.daemon {
		case storaged:
			elsewhere.storage = storagev1.NewDisposalClient(l.conn)
		case "etcdd":
			elsewhere.etcd = etcdv1.NewEtcdClient(l.conn)
		}
	}
	elsewhere.departure = trustv1.NewDepartureClient(conns["apid"])
	cfg.cluster = newFar(conns["networkd"], conns["updated"], conns["apid"])
	d, err := New(cfg)
	if err != nil {
		return err
	}
	return d.Run(ctx, env)
}

// New makes the daemon; Run must be called once.
func New(cfg Config) (*Daemon, error) {
	if cfg.StateWait == 0 {
		cfg.StateWait = 2 * time.Minute
	}
	if err := os.MkdirAll(cfg.Runtime+"/logs", 0o700); err != nil {
		return nil, err
	}
	ev, err := openEvents(cfg.Runtime + "/events")
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		cfg: cfg, events: ev, figures: newFigures(cfg.Metrics),
		kernel:  &logs.Kernel{Size: cfg.host.KernelLogSize, Read: cfg.host.KernelLog, Boot: cfg.host.Boot},
		power:   make(chan func() error, 1),
		streams: make(chan struct{}, maxStreams),
		apply:   make(chan struct{}, 1),
		logs:    map[string]*logs.Log{}, state: map[string]string{}, falls: map[string]fall{}, lives: map[string][]int{}, denied: map[string]denied{},
		look:  make(chan struct{}, 1),
		audit: audit.New(cfg.past.ID()), protection: protection{facts: cfg.facts}, looked: make(chan struct{}),
	}
	d.loadEnds()
	ev.log.Tap = func(at time.Time, text string) { d.journal.Add(at, "events", strings.ReplaceAll(text, "\t", " ")) }
	d.resetting.Store(d.inReset())
	for _, r := range recipients {
		l := cfg.links[r.daemon]
		if l == nil {
			return nil, fmt.Errorf("machined: no link to %s", r.daemon)
		}
		d.hands = append(d.hands, &handout{recipient: r, link: l, running: &d.running, say: d.events.say, log: cfg.Log})
	}
	return d, nil
}

// Run serves until ctx is done and every goroutine it started has returned.
func (d *Daemon) Run(ctx context.Context, env daemon.Env) error {
	g, ctx := errgroup.WithContext(ctx)
	d.work(ctx, g)
	g.Go(func() error { return daemon.Serve(ctx, env, callers, d.Register) })
	return errors.Join(g.Wait(), d.close())
}

// work starts all that runs beside the socket.
func (d *Daemon) work(ctx context.Context, g *errgroup.Group) {
	for _, h := range d.hands {
		g.Go(func() error { return h.run(ctx) })
	}
	g.Go(func() error { return d.load(ctx) })
	g.Go(func() error { return d.watchUnits(ctx) })
	g.Go(func() error { return d.obey(ctx) })
	g.Go(func() error { return d.heed(ctx) })
	g.Go(func() error { return d.keepJournal(ctx) })
	g.Go(func() error { return d.keepAudit(ctx) })
	g.Go(func() error { return d.reportSelf(ctx) })
}

// callers are those besides apid. A method's own entry goes before its service's, so that apid stands there too.
var callers = peer.List{
	machinev1.Machine_GetHealth_FullMethodName:       {uid.Apid, uid.Updated}, // what a version on trial has proved
	machinev1.Machine_StreamKernelLog_FullMethodName: {uid.Apid, uid.Updated}, // what is to be read if it fails
	machinev1.Machine_TellEvent_FullMethodName:       {uid.Updated},
	machinev1.Machine_ListBoots_FullMethodName:       {uid.Apid, uid.Updated}, // why one failed
	machinev1.Machine_StreamBootLog_FullMethodName:   {uid.Apid, uid.Updated},
	machinev1.Machine_Reboot_FullMethodName:          {uid.Apid, uid.Updated}, // a version on trial that proved nothing
}

// Callers is who may call what, besides apid and machined's Control: for the test that asks every daemon everything (test/twin).
func Callers() peer.List { return callers }

// Register adds machined's services to a server.
func (d *Daemon) Register(s *grpc.Server) {
	machinev1.RegisterMachineServer(s, &machineServer{d: d})
	machinev1.RegisterTrialServer(s, &trialServer{d: d})
	configv1.RegisterConfigServer(s, &configServer{d: d})
}

func (d *Daemon) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := errors.Join(d.events.log.Close(), d.journal.Close(), d.audit.Close())
	for _, l := range d.logs {
		err = errors.Join(err, l.Close())
	}
	return err
}

// obey carries out orders to PID 1, a moment after they were answered.
func (d *Daemon) obey(ctx context.Context) error {
	for {
		var order func() error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case order = <-d.power:
		}
		if err := pause(ctx, powerPause); err != nil {
			return err
		}
		if err := order(); err != nil {
			d.cfg.Log.Error("order refused by PID 1", "err", err.Error())
			d.events.say("machined", typePower, "the order was refused: "+err.Error())
			d.noteOrder("")
		}
	}
}

// pause waits, unless ctx is done first: then it returns ctx's error.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
