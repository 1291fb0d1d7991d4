package dhcp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Entry is one interface that has a client or a lease.
type Entry struct {
	Link string
	// Running is false for a lease that an earlier process left, until Start is called for its link.
	Running bool
	// Lease is nil if there is none. It must not be changed.
	Lease *Lease
	Phase Phase
}

// Pool runs one client for each link it is told to, and keeps their leases in files over restarts of the process.
// Its methods may be called from any goroutine; the clients work while Run runs.
type Pool struct {
	log    *slog.Logger
	dir    string
	notify func()
	start  chan struct{} // capacity 1; wakes Run

	mu      sync.Mutex
	entries map[string]*entry // guarded by mu
}

type entry struct {
	Entry
	id      Identity
	cancel  context.CancelFunc // nil: no goroutine yet
	kick    chan struct{}      // capacity 1
	carrier bool
}

// Now is CLOCK_BOOTTIME.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(fmt.Sprintf("clock_gettime CLOCK_BOOTTIME: %v", err))
	}
	return time.Duration(ts.Nano())
}

// NewPool reads the leases that an earlier process kept in dir, which must be emptied by a boot. notify is called after each
// change of a lease, from any goroutine; it must not block.
func NewPool(log *slog.Logger, dir string, notify func()) (*Pool, error) {
	p := &Pool{log: log, dir: dir, notify: notify, start: make(chan struct{}, 1), entries: map[string]*entry{}}
	files, err := filepath.Glob(filepath.Join(dir, "lease-*.json"))
	if err != nil {
		return nil, err
	}
	now := Now()
	for _, f := range files {
		link := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), "lease-"), ".json")
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read lease: %w", err)
		}
		l := &Lease{}
		if err := json.Unmarshal(data, l); err != nil || !l.Address.IsValid() {
			log.Warn("lease file ignored", "link", link, "err", fmt.Sprint(err)) // ours, so a defect; a new lease cures it
			continue
		}
		if now < l.Expire {
			p.entries[link] = &entry{Entry: Entry{Link: link, Lease: l, Phase: Rebooting}}
		}
	}
	return p, nil
}

// Entries returns all clients and leases, sorted by link.
func (p *Pool) Entries() []Entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]Entry, 0, len(p.entries))
	for _, e := range p.entries {
		out = append(out, e.Entry)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Link < out[j].Link })
	return out
}

// Start begins a client for a link; a lease that is there already is checked with the server. Twice is once.
func (p *Pool) Start(link string, id Identity) error {
	if len(id.Hardware) != 6 {
		return fmt.Errorf("link %s has the hardware address %q; DHCP is done on Ethernet only", link, id.Hardware)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.entries[link]
	if e == nil {
		e = &entry{Entry: Entry{Link: link}}
		p.entries[link] = e
	}
	if !e.Running {
		e.Running, e.id, e.kick = true, id, make(chan struct{}, 1)
		select {
		case p.start <- struct{}{}:
		default:
		}
	}
	return nil
}

// Stop ends a link's client and forgets its lease. The server is not told: the address stays the link's until the lease ends.
func (p *Pool) Stop(link string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.entries[link]; e != nil && e.cancel != nil {
		e.cancel()
	}
	delete(p.entries, link)
	err := os.Remove(p.file(link))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Carrier tells what a link's carrier is now. When it comes back, the client looks whether its lease holds on this network.
func (p *Pool) Carrier(link string, up bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.entries[link]
	if e == nil || !e.Running {
		return
	}
	if up && !e.carrier {
		select {
		case e.kick <- struct{}{}:
		default:
		}
	}
	e.carrier = up
}

// Run runs the clients until ctx is done; it returns ctx's error after all of them have ended.
func (p *Pool) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for {
			p.mu.Lock()
			for _, e := range p.entries {
				if e.Running && e.cancel == nil {
					var c context.Context
					c, e.cancel = context.WithCancel(ctx)
					cl := &client{pool: p, entry: e, link: e.Link, id: e.id, lease: e.Lease, kick: e.kick}
					g.Go(func() error { cl.run(c); return nil })
				}
			}
			p.mu.Unlock()
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-p.start:
			}
		}
	})
	return g.Wait()
}

func (p *Pool) file(link string) string { return filepath.Join(p.dir, "lease-"+link+".json") }

// set publishes what a client knows, unless it was stopped meanwhile.
func (p *Pool) set(e *entry, phase Phase, l *Lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.entries[e.Link] != e {
		return
	}
	e.Phase = phase
	if e.Lease == l {
		return
	}
	changed := !e.Lease.Same(l)
	if changed && l != nil {
		p.log.Info("lease", "link", e.Link, "address", l.Address.String(), "server", l.Server.String())
	} else if changed {
		p.log.Warn("lease lost", "link", e.Link)
	}
	e.Lease = l
	if err := p.keep(e.Link, l); err != nil {
		p.log.Error("keep lease", "link", e.Link, "err", err.Error())
	}
	p.notify()
}

func (p *Pool) keep(link string, l *Lease) error {
	if l == nil {
		if err := os.Remove(p.file(link)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	tmp := p.file(link) + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, p.file(link))
}

func newRand() *rand.Rand { return rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())) }
