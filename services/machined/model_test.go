package machined

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sort"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/hardening"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/services/machined/boots"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
	"github.com/bulkhead-os/bulkhead/services/machined/security"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// node is everything around machined, in memory.
type node struct {
	t       testing.TB
	links   map[string]*modelLink
	init    *modelInit
	host    *modelHost
	past    *modelPast
	facts   security.Facts // guarded by cluster.mu once the daemon runs
	runtime string
	others  *modelOthers
	cluster *modelCluster
}

func newNode(t testing.TB) *node {
	n := &node{t: t, links: map[string]*modelLink{}, init: &modelInit{watch: make(chan initctl.Status, 64)}, host: &modelHost{files: map[string][]byte{}}, runtime: t.TempDir(),
		past: &modelPast{id: "boot-a", folder: t.TempDir()}, facts: hardened(), others: &modelOthers{}, cluster: newModelCluster()}
	for _, r := range recipients {
		n.links[r.daemon] = newModelLink()
		n.init.units = append(n.init.units, initctl.Status{Name: r.daemon, State: "up", PID: 10, Since: time.Now()})
	}
	n.init.units = append(n.init.units, initctl.Status{Name: "kubelet", State: "down"})
	return n
}

func (n *node) hardening() security.Facts {
	n.cluster.mu.Lock()
	defer n.cluster.mu.Unlock()
	return n.facts
}

// start runs machined until the returned function is called.
func (n *node) start() (*Daemon, func()) {
	n.t.Helper()
	cfg := Config{
		Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("machined"), Runtime: n.runtime,
		host: n.host, past: n.past, init: n.init, links: map[string]link{}, facts: n.hardening, others: n.others, cluster: n.cluster,
	}
	for name, l := range n.links {
		cfg.links[name] = l
	}
	d, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g, ctx := errgroup.WithContext(ctx)
	d.work(ctx, g)
	return d, func() {
		cancel()
		if err := g.Wait(); !errors.Is(err, context.Canceled) {
			n.t.Errorf("machined ended with %v", err)
		}
		if err := d.close(); err != nil {
			n.t.Error(err)
		}
	}
}

// hardened is a kernel that is as it should be, in a machine that brings nothing.
func hardened() security.Facts {
	f := security.Facts{
		Cmdline: hardening.CommandLine(), Params: map[string]string{}, Lockdown: "none [integrity] confidentiality", SigEnforce: "Y",
		LSM: "lockdown,capability,landlock,yama", Filesystems: "ext4", Root: "CRYPT-VERITY-1-bulkhead-root",
	}
	for _, p := range hardening.Params {
		f.Params[p.Name] = p.Value
	}
	return f
}

// modelPast is what is left of the boot before.
type modelPast struct {
	id, folder string
	mu         sync.Mutex
	found      boots.Evidence // guarded by mu
}

func (m *modelPast) ID() string     { return m.id }
func (m *modelPast) Folder() string { return m.folder }
func (m *modelPast) Evidence() (boots.Evidence, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.found, nil
}
func (m *modelPast) Kernel(boot time.Time, f func(int, logs.Line)) error {
	f(7, logs.Line{Time: boot, Text: "init: bulkhead: hello"})
	f(6, logs.Line{Time: boot, Text: "of no interest"})
	return nil
}
func (m *modelPast) Forget() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.found.Panic = ""
	return nil
}

func apply(d *Daemon, documents string) (*configv1.ApplyResponse, error) {
	return (&configServer{d: d}).Apply(context.Background(), &configv1.ApplyRequest{Documents: documents, Name: "node.yaml"})
}

// eventTexts returns all events as "source type: text".
func eventTexts(t *testing.T, d *Daemon) []string {
	t.Helper()
	var out []string
	err := d.events.stream(t.Context(), 0, false, func(e *machinev1.Event) error {
		out = append(out, e.GetSource()+" "+e.GetType()+": "+e.GetText())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// modelLink is a daemon that converges at once.
type modelLink struct {
	state latest.Cell[*controlv1.State]
	gone  chan struct{} // closed and replaced by restart; guarded by mu

	mu    sync.Mutex
	specs []*controlv1.Spec // guarded by mu; all that were set
	dead  bool              // guarded by mu; it neither answers nor refuses
	steps []string          // guarded by mu; of every plan
	plan  error             // guarded by mu
	set   error             // guarded by mu
	onSet func(*controlv1.Spec) *controlv1.State
}

func newModelLink() *modelLink {
	l := &modelLink{gone: make(chan struct{}), onSet: func(s *controlv1.Spec) *controlv1.State {
		return &controlv1.State{Generation: s.GetGeneration(), Converged: true}
	}}
	l.state.Set(&controlv1.State{})
	return l
}

func (l *modelLink) setPlan(err error) { defer l.lock()(); l.plan = err }
func (l *modelLink) lock() func()      { l.mu.Lock(); return l.mu.Unlock }

// restart kills the daemon: it forgets its spec, and its streams end.
func (l *modelLink) restart() {
	defer l.lock()()
	l.state.Set(&controlv1.State{})
	close(l.gone)
	l.gone = make(chan struct{})
}

func (l *modelLink) Watch(ctx context.Context, f func(*controlv1.State)) error {
	l.mu.Lock()
	gone, dead := l.gone, l.dead
	l.mu.Unlock()
	if dead {
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	return l.state.Watch(ctx, func(s *controlv1.State) error { f(s); return nil })
}

func (l *modelLink) Set(ctx context.Context, s *controlv1.Spec) error {
	defer l.lock()()
	if l.set != nil {
		return l.set
	}
	l.specs = append(l.specs, s)
	l.state.Set(l.onSet(s))
	return nil
}

func (l *modelLink) Plan(ctx context.Context, s *controlv1.Spec) ([]string, error) {
	l.mu.Lock()
	dead := l.dead
	l.mu.Unlock()
	if dead {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	defer l.lock()()
	return l.steps, l.plan
}

func (l *modelLink) Metrics(ctx context.Context) ([]*controlv1.Family, error) {
	l.mu.Lock()
	dead := l.dead
	l.mu.Unlock()
	if dead {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return []*controlv1.Family{{Name: "x"}}, nil
}

// generations returns the numbers of all specs that were set.
func (l *modelLink) generations() []uint64 {
	defer l.lock()()
	var out []uint64
	for _, s := range l.specs {
		out = append(out, s.GetGeneration())
	}
	return out
}

// modelInit is PID 1.
type modelInit struct {
	watch chan initctl.Status // what Watch tells after the units

	mu     sync.Mutex
	units  []initctl.Status // guarded by mu
	orders []string         // guarded by mu
	pipe   func(string) (*os.File, error)
}

func (m *modelInit) Status() ([]initctl.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.units), nil
}

func (m *modelInit) Watch(ctx context.Context, f func(initctl.Status)) error {
	units, err := m.Status()
	if err != nil {
		return err
	}
	for _, u := range units {
		f(u)
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case u := <-m.watch:
			f(u)
		}
	}
}

func (m *modelInit) Logs(unit string) (*os.File, error) {
	if m.pipe != nil {
		return m.pipe(unit)
	}
	return nil, errors.New("no pipe in the model")
}

func (m *modelInit) order(o string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.orders = append(m.orders, o)
	return nil
}

func (m *modelInit) did() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.orders)
}

func (m *modelInit) Start(unit string) error {
	m.set(unit, "up")
	return m.order("start " + unit)
}

func (m *modelInit) Stop(unit string) error {
	m.set(unit, "down")
	return m.order("stop " + unit)
}

func (m *modelInit) set(unit, state string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.units {
		if m.units[i].Name == unit {
			m.units[i].State = state
		}
	}
}

func (m *modelInit) Restart(unit string) error { return m.order("restart " + unit) }
func (m *modelInit) Reboot() error             { return m.order("reboot") }
func (m *modelInit) PowerOff() error           { return m.order("power off") }

// modelHost has STATE in a map, once mounted.
type modelHost struct {
	mu      sync.Mutex
	mounted bool              // guarded by mu
	full    bool              // guarded by mu
	files   map[string][]byte // guarded by mu
}

func (m *modelHost) lock() func() { m.mu.Lock(); return m.mu.Unlock }

func (m *modelHost) mount()            { m.setMounted(true) }
func (m *modelHost) setMounted(b bool) { defer m.lock()(); m.mounted = b }

func (m *modelHost) State() (store.FS, error) {
	defer m.lock()()
	if !m.mounted {
		return nil, &fs.PathError{Op: "open", Path: "/state/machined", Err: fs.ErrNotExist}
	}
	return m, nil
}
func (m *modelHost) Release() string                 { return "6.12" }
func (m *modelHost) Boot() time.Time                 { return time.Now().Add(-time.Hour) }
func (m *modelHost) KernelLogSize() (int, error)     { return 4096, nil }
func (m *modelHost) KernelLog(b []byte) (int, error) { return copy(b, "<6>[ 1.0] hello\n"), nil }
func (m *modelHost) Usage(string) (uint64, float64)  { return 4096, 1.5 }

func (m *modelHost) MemoryLimit(string) uint64 { return 64 << 20 }

func (m *modelHost) Names() ([]string, error) {
	defer m.lock()()
	return slices.Collect(maps.Keys(m.files)), nil
}

func (m *modelHost) Read(name string, _ int64) ([]byte, error) {
	defer m.lock()()
	if data, ok := m.files[name]; ok {
		return data, nil
	}
	return nil, fs.ErrNotExist
}

func (m *modelHost) Write(name string, data []byte) error {
	defer m.lock()()
	if m.full {
		return &fs.PathError{Op: "write", Path: name, Err: syscall.ENOSPC}
	}
	m.files[name] = data
	return nil
}

func (m *modelHost) Rename(from, to string) error {
	defer m.lock()()
	m.files[to] = m.files[from]
	delete(m.files, from)
	return nil
}

func (m *modelHost) Remove(name string) error {
	defer m.lock()()
	if _, ok := m.files[name]; !ok {
		return fs.ErrNotExist
	}
	delete(m.files, name)
	return nil
}

func (m *modelHost) Sync() error { return nil }

// newest returns the name of the newest generation's file.
func (m *modelHost) newest() string {
	names, _ := m.Names() // of a map: cannot fail
	sort.Strings(names)
	return names[len(names)-1]
}

// stream is the server's side of a stream of T.
type stream[T any] struct {
	grpc.ServerStream
	ctx  context.Context
	send func(*T) error
}

func (s stream[T]) Context() context.Context { return s.ctx }
func (s stream[T]) Send(m *T) error          { return s.send(m) }

// dup returns a second descriptor of a pipe, as PID 1's answer carries.
func dup(f *os.File) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pipe"), nil
}
