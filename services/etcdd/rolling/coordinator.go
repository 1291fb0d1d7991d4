package rolling

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/latest"
)

// A Drainer empties nodes of Kubernetes' pods. Both methods may be repeated, by another control plane too.
type Drainer interface {
	// Drain lets no more pods come to a node, has those that are there go as far as their disruption budgets allow, and names those that are left. id says for which change. In
	// a cluster without Kubernetes it does nothing.
	Drain(ctx context.Context, node, id string) (left []string, err error)
	// Release takes it back, if it was done for this change.
	Release(ctx context.Context, node, id string) error
}

// Config is fixed for the life of the process. All fields but Witness, Tell and Now are required.
type Config struct {
	Log *slog.Logger
	// Name returns what this node is called; "" while it has no name.
	Name func() string
	// Get reads what begins with a text, linearizably.
	Get func(ctx context.Context, prefix string) (*clientv3.GetResponse, error)
	// Txn does ops under conditions, once, and reports whether they held. With an error that is not known.
	Txn func(ctx context.Context, conditions []clientv3.Cmp, ops []clientv3.Op) (bool, error)
	// Follow calls back with all keys below a prefix, and then with each change, until something fails.
	Follow func(ctx context.Context, prefix string, f func(*storev1.WatchResponse) error) error
	// Nodes returns the registry. What it returns is not changed.
	Nodes func() ([]*clusterv1.Node, error)
	// Voters returns why no member of etcd can be spared now, nil if one can; and the leader's name.
	Voters func(ctx context.Context) (leader string, err error)
	// Kubernetes drains.
	Kubernetes Drainer
	// Witness makes a call to a node's API, which a version on trial there has to see: whoever ordered the change may be away. nil: nothing.
	Witness func(ctx context.Context, node string) error
	// Tell hears where the last change is, "" if there never was one, and how many nodes are not done; for metrics. nil: nobody.
	Tell func(phase string, left int)
	// Now is the clock; only how it goes on counts. nil means time.Now.
	Now func() time.Time
}

// Times of a coordinator.
const (
	look      = time.Second      // between two rounds of one that has the lease, or wants it
	least     = look / 5         // the same, when something changed
	turnTime  = 30 * time.Second // of one round
	renewal   = 5 * time.Second  // between two signs of life
	leaseTime = 30 * time.Second // without one, measured by who waits: nobody's clock is compared with another's. Longer than what one round asks others
	callTime  = 5 * time.Second  // of one access to etcd
)

// lease is who carries the change out, as JSON. It only keeps control planes out of each other's way; the record's revision is what fences.
type lease struct {
	Holder  string `json:"holder"`  // the node's name
	Process string `json:"process"` // a random text: the node may restart
	Beat    uint64 `json:"beat"`    // so that each renewal differs
}

// Coordinator is one control plane's part. Make it with New; Run may be called once, the rest is safe for concurrent use.
type Coordinator struct {
	cfg     Config
	process string
	cell    latest.Cell[seen]

	// Of the goroutine that takes turns.
	renewed time.Time // when the lease was last written; zero: this one has not got it
	other   mark      // of the lease while somebody else has it
	step    mark      // of the current step
	said    string    // the last error in the log
}

// mark is since when something is as it is.
type mark struct {
	what string
	at   time.Time
}

// since returns for how long what is so.
func (m *mark) since(what string, now time.Time) time.Duration {
	if m.what != what || m.at.IsZero() {
		*m = mark{what, now}
	}
	return now.Sub(m.at)
}

// seen is what was followed.
type seen struct {
	record   record
	revision uint64
	holder   string
	err      error // nothing is known
}

// New returns a coordinator that does nothing yet.
func New(cfg Config) *Coordinator {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Coordinator{cfg: cfg, process: rand.Text()}
	c.cell.Set(seen{err: errs.New(errs.Unavailable, "rolling change: the etcd member does not answer yet")})
	return c
}

// Run carries changes out until ctx is done.
func (c *Coordinator) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.follow(ctx) })
	g.Go(func() error { return c.work(ctx) })
	return g.Wait()
}

// follow keeps the cell.
func (c *Coordinator) follow(ctx context.Context) error {
	var now seen
	for {
		err := c.cfg.Follow(ctx, prefix, func(m *storev1.WatchResponse) error {
			if m.GetComplete() {
				now = seen{}
			}
			for _, e := range m.GetEntries() {
				now.take(e.GetKey(), e.GetValue(), e.GetRevision())
			}
			for _, k := range m.GetDeleted() {
				now.take(k, nil, m.GetRevision())
			}
			if c.cfg.Tell != nil {
				c.cfg.Tell(string(now.record.Phase), now.record.left())
			}
			c.cell.Set(now)
			return nil
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		c.cell.Set(seen{err: errs.New(errs.Unavailable, "rolling change: %s", errs.Text(err))})
		if err := pause(ctx, look); err != nil {
			return err
		}
	}
}

func (s *seen) take(key string, value []byte, revision uint64) {
	switch key {
	case Current:
		if s.record, s.err = decode(value); s.err != nil {
			s.record = record{}
		}
		s.revision = revision
	case leaseKey:
		var l lease
		_ = json.Unmarshal(value, &l) // nobody has it then
		s.holder = l.Holder
	}
}

// work takes turns while there is something to do.
func (c *Coordinator) work(ctx context.Context) error {
	for {
		now, changed := c.cell.Get()
		if now.err != nil || !now.record.active() && now.holder == "" {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
				continue
			}
		}
		call, cancel := context.WithTimeout(ctx, turnTime)
		err := c.turn(call)
		cancel()
		if ctx.Err() != nil {
			c.leave(context.WithoutCancel(ctx))
			return ctx.Err()
		}
		if text := errs.Text(err); text != c.said {
			if err != nil && !errs.Is(err, errs.Conflict) {
				c.cfg.Log.Warn("no turn of the rolling change", "err", text)
			}
			c.said = text
		}
		if err := rest(ctx, changed); err != nil {
			c.leave(context.WithoutCancel(ctx))
			return err
		}
	}
}

// rest waits until something changed, and at most until the next look.
func rest(ctx context.Context, changed <-chan struct{}) error {
	if err := pause(ctx, least); err != nil {
		return err
	}
	t := time.NewTimer(look - least)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-changed:
	case <-t.C:
	}
	return nil
}

// leave gives the lease back at the end of the process.
func (c *Coordinator) leave(ctx context.Context) {
	if c.renewed.IsZero() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, look)
	defer cancel()
	if st, err := c.read(ctx); err == nil && c.mine(st) {
		_ = c.drop(ctx, st) // it runs out by itself
	}
}

// state is the keys as they were at one moment.
type state struct {
	value    []byte // of the record
	record   record
	revision int64 // of the record; 0: there is none
	lease    lease
	fence    int64 // revision of the lease; 0: there is none
}

// read is linearizable.
func (c *Coordinator) read(ctx context.Context) (state, error) {
	var st state
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	resp, err := c.cfg.Get(ctx, prefix)
	if err != nil {
		return st, errs.New(errs.Unavailable, "read the rolling change: %w", err)
	}
	for _, kv := range resp.Kvs {
		switch string(kv.GetKey()) {
		case Current:
			st.value, st.revision = kv.GetValue(), kv.GetModRevision()
			if st.record, err = decode(st.value); err != nil {
				return st, err
			}
		case leaseKey:
			st.fence = kv.GetModRevision()
			_ = json.Unmarshal(kv.GetValue(), &st.lease) // nobody's then, until it is taken
		}
	}
	return st, nil
}

// commit changes keys if both are as they were read, or the record alone if fenced is not set.
func (c *Coordinator) commit(ctx context.Context, st state, fenced bool, ops ...clientv3.Op) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	conditions := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(Current), "=", st.revision)}
	if fenced {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(leaseKey), "=", st.fence))
	}
	held, err := c.cfg.Txn(ctx, conditions, ops)
	if err != nil {
		return errs.New(errs.Unavailable, "write the rolling change: %w", err)
	}
	if !held {
		return errs.New(errs.Conflict, "the rolling change was changed by another one meanwhile; look again")
	}
	return nil
}

// turn looks once, and changes the record at most once.
func (c *Coordinator) turn(ctx context.Context) error {
	st, err := c.read(ctx)
	if err != nil {
		return err
	}
	if !st.record.active() {
		c.step = mark{}
		if st.fence != 0 { // whoever had it
			return c.drop(ctx, st)
		}
		return nil
	}
	s := sight{now: c.cfg.Now()}
	if s.nodes, err = c.cfg.Nodes(); err != nil {
		return err
	}
	if held, err := c.hold(ctx, st, s.nodes); err != nil || !held {
		c.step = mark{}
		return err
	}
	if st, err = c.read(ctx); err != nil || !c.mine(st) || !st.record.active() {
		return err
	}
	if _, err := c.cfg.Voters(ctx); err != nil {
		s.trouble = errs.Text(err)
	}
	next := c.decide(ctx, st.record, s)
	value, err := json.Marshal(next)
	if err != nil || bytes.Equal(value, st.value) {
		return err
	}
	if err := c.commit(ctx, st, true, clientv3.OpPut(Current, string(value))); err != nil {
		return err
	}
	c.tell(st.record, next)
	return nil
}

// decide asks plan, and tries what it wants tried.
func (c *Coordinator) decide(ctx context.Context, r record, s sight) record {
	i := r.current()
	var t turn
	if i >= 0 {
		t = r.Nodes[i]
	}
	if n := s.node(t.Name); t.Step == settling && n.GetTrial() && c.cfg.Witness != nil {
		if err := c.cfg.Witness(ctx, t.Name); err != nil { // the node's own proof tells what is missing
			c.cfg.Log.Debug("no witness", "step", t.Name, "err", errs.Text(err))
		}
	}
	s.held = c.step.since(strings.Join([]string{r.ID, t.Name, string(t.Step), string(r.Phase), strconv.Itoa(r.Resumed)}, " "), s.now)
	next, what := plan(r, s)
	switch what {
	case nothing:
		return next
	case drain:
		left, err := c.cfg.Kubernetes.Drain(ctx, t.Name, r.ID)
		s.drained = &drained{left: left, err: errs.Text(err)}
		if next, what = plan(r, s); what != release {
			return next
		}
	}
	s.released = &drained{err: errs.Text(c.cfg.Kubernetes.Release(ctx, t.Name, r.ID))}
	next, _ = plan(r, s)
	return next
}

// tell says in the log what went on.
func (c *Coordinator) tell(old, now record) {
	if i := old.current(); i >= 0 && old.Nodes[i].Step != now.Nodes[i].Step {
		c.cfg.Log.Info("rolling change", "step", now.Nodes[i].Name+" "+string(now.Nodes[i].Step), "detail", now.Nodes[i].Why)
	}
	switch {
	case old.Phase == now.Phase:
	case now.Phase == halted:
		c.cfg.Log.Error("rolling change halted", "step", now.String(), "err", now.Why)
	default:
		c.cfg.Log.Info("rolling change "+string(now.Phase), "step", now.String())
	}
}

func (c *Coordinator) mine(st state) bool { return st.fence != 0 && st.lease.Process == c.process }

// yields reports whether this node had better leave the lease to another control plane: it is its own turn to restart.
func (c *Coordinator) yields(r record, nodes []*clusterv1.Node) bool {
	i := r.current()
	if i < 0 || r.Nodes[i].Name != c.cfg.Name() || r.Nodes[i].Step == settling {
		return false
	}
	for _, n := range nodes {
		if n.GetRole() == "controlplane" && n.GetName() != c.cfg.Name() && n.GetState() == "ready" {
			return true
		}
	}
	return false
}

// hold reports whether this control plane carries the change out. It takes the lease if nobody has it, or if who had it gave no sign of life for leaseTime.
func (c *Coordinator) hold(ctx context.Context, st state, nodes []*clusterv1.Node) (bool, error) {
	now, yields := c.cfg.Now(), c.yields(st.record, nodes)
	if c.mine(st) {
		switch {
		case yields:
			return false, c.drop(ctx, st)
		case now.Sub(c.renewed) < renewal:
			return true, nil
		}
		return true, c.take(ctx, st)
	}
	patience := leaseTime
	if st.fence == 0 || st.lease.Holder == c.cfg.Name() { // this node's, of a process that is over
		patience = 0
	}
	if yields { // unless nobody else does it, though others are said to be ready
		patience = 2 * leaseTime
	}
	if c.other.since(strconv.FormatInt(st.fence, 10), now) < patience || c.cfg.Name() == "" {
		return false, nil
	}
	if err := c.take(ctx, st); err != nil {
		return false, err
	}
	c.cfg.Log.Info("carries the rolling change out", "step", st.record.String())
	return true, nil
}

func (c *Coordinator) take(ctx context.Context, st state) error {
	l := lease{Holder: c.cfg.Name(), Process: c.process, Beat: st.lease.Beat + 1}
	value, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if err := c.commit(ctx, st, true, clientv3.OpPut(leaseKey, string(value))); err != nil {
		return err
	}
	c.renewed, c.other = c.cfg.Now(), mark{}
	return nil
}

func (c *Coordinator) drop(ctx context.Context, st state) error {
	c.renewed = time.Time{}
	return c.commit(ctx, st, true, clientv3.OpDelete(leaseKey))
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
