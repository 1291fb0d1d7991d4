// Package vip decides which control plane has the cluster's virtual addresses.
//
// One key in etcd says who; only a write on condition of its revision changes it, so that two never win at once. The holder writes it
// anew all the time; who sees it unchanged for long enough, by the own clock, may take it. The addresses go away by themselves before that:
// networkd gives them a time that counts from before the holder's last write, and no clock is compared with another machine's.
//
// It knows nothing of networks and of Kubernetes: what an address needs networkd does, and whether the API server is well it is told.
package vip

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
)

// Key is where the holder stands in etcd.
const Key = "/bulkhead/kubernetes/virtual-ip"

// Times are how fast a Keeper is. The zero value is what a node uses.
type Times struct {
	// Look is between two looks at the key, and two of the holder's writes; 0 means 1 s.
	Look time.Duration
	// Call is the longest time that one call may take; 0 means 1 s.
	Call time.Duration
	// Hold is how long the addresses stay without a new write, from before the last one, to a second; 0 means 4 s.
	Hold time.Duration
	// Take is how long the key must be unchanged before another takes it; 0 means 5.5 s. It must be longer than Hold by 1.25 s: the kernel
	// takes an address away that much late at worst.
	Take time.Duration
}

// Config is fixed for the life of a Keeper; all but Times and Boottime is required.
type Config struct {
	Store   storev1.StoreClient     // etcdd
	Network networkv1.VirtualClient // networkd
	// Healthy asks whether this node's API server is ready; nil if it is. It returns soon after its context's end.
	Healthy func(context.Context) error
	Log     *slog.Logger
	Metrics *metrics.Set
	Times   Times
	// Boottime reads CLOCK_BOOTTIME, which networkd reads too; nil means the kernel's.
	Boottime func() time.Duration
}

// Want is what the document says. The zero value: this node has no part in it.
type Want struct {
	Node      string       // this node's name, which no other node of the cluster has
	Addresses []netip.Addr // none: the cluster has no virtual addresses
}

// Keeper takes, keeps and gives up the addresses. Make it with New; only one goroutine may use it.
type Keeper struct {
	cfg  Config
	held *metrics.Vec

	revision uint64    // of the key when it was seen last; 0: there is none
	holder   string    // in it
	since    time.Time // when this revision was seen first
	mine     bool      // the addresses may be on this node
	until    time.Time // when they leave it if nothing is said any more; zero if they are not here
	rest     time.Time // not before this it is taken again: another node shall have its turn
	failures int       // writes in a row that were not answered while the addresses were not here
	trouble  string    // what the last round said, so that repeats are not
}

// New returns a keeper that holds nothing. What an earlier process held runs out in the kernel, unless this one takes it up in time.
func New(cfg Config) (*Keeper, error) {
	if cfg.Store == nil || cfg.Network == nil || cfg.Healthy == nil || cfg.Log == nil || cfg.Metrics == nil {
		return nil, errors.New("vip: Config needs Store, Network, Healthy, Log and Metrics")
	}
	t := &cfg.Times
	for _, d := range []struct {
		at       *time.Duration
		standard time.Duration
	}{{&t.Look, time.Second}, {&t.Call, time.Second}, {&t.Hold, 4 * time.Second}, {&t.Take, 5500 * time.Millisecond}} {
		if *d.at == 0 {
			*d.at = d.standard
		}
	}
	if cfg.Boottime == nil {
		cfg.Boottime = boottime
	}
	k := &Keeper{cfg: cfg, held: cfg.Metrics.Gauge("bulkhead_kubeletd_virtual_ip_held", "1 if this node has the cluster's virtual addresses.")}
	k.held.Set(0)
	return k, nil
}

// Run keeps the addresses as want says, which it asks before every round, until ctx is done; then it gives them up.
func (k *Keeper) Run(ctx context.Context, want func() Want) error {
	tick := time.NewTicker(k.cfg.Times.Look)
	defer tick.Stop()
	for {
		k.round(ctx, want())
		select {
		case <-ctx.Done():
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*k.cfg.Times.Call)
			k.resign(end, "this process ends")
			cancel()
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Holding reports whether the addresses are on this node, as far as the keeper knows.
func (k *Keeper) Holding() bool { return k.mine }

// record is the key's value.
type record struct {
	Holder string `json:"holder"`
}

// round looks once and acts on it.
func (k *Keeper) round(ctx context.Context, want Want) {
	if len(want.Addresses) == 0 || want.Node == "" {
		k.resign(ctx, "the document has no virtual addresses for this node")
		return
	}
	healthy := k.call(ctx, k.cfg.Healthy)
	if k.mine && healthy != nil {
		if healthy = k.call(ctx, k.cfg.Healthy); healthy != nil { // one slow answer is none yet
			k.resign(ctx, "the API server is not ready: "+errs.Text(healthy))
			return
		}
	}
	var err error
	if !k.mine { // the holder need not look: its write fails if another has it
		err = k.call(ctx, k.look)
	}
	switch {
	case err != nil || healthy != nil || time.Now().Before(k.rest):
	case k.holder == want.Node || k.revision == 0 || time.Since(k.since) >= k.cfg.Times.Take:
		err = k.take(ctx, want)
	}
	if k.mine && !time.Now().Before(k.until) {
		k.drop(ctx, "etcd did not confirm it in time: "+errs.Text(err))
		k.yield()
	}
	k.tell(err)
}

// look reads the key.
func (k *Keeper) look(ctx context.Context) error {
	r, err := k.cfg.Store.Read(ctx, &storev1.ReadRequest{Prefix: Key})
	if err != nil {
		return fmt.Errorf("read who has the virtual addresses: %w", err)
	}
	var revision uint64
	var rec record
	for _, e := range r.GetEntries() {
		if e.GetKey() == Key {
			revision = e.GetRevision()
			_ = json.Unmarshal(e.GetValue(), &rec) // what cannot be read names nobody, and runs out like any other
		}
	}
	if revision != k.revision || k.since.IsZero() {
		k.revision, k.holder, k.since = revision, rec.Holder, time.Now()
	}
	return nil
}

// take writes the key, on condition that it is the one that was seen, and then has the addresses here for as long as that is worth.
func (k *Keeper) take(ctx context.Context, want Want) error {
	start := time.Now()
	value, err := json.Marshal(record{want.Node})
	if err != nil {
		return err
	}
	err = k.call(ctx, func(ctx context.Context) error {
		r, err := k.cfg.Store.Write(ctx, &storev1.WriteRequest{
			Conditions: []*storev1.Condition{{Key: Key, Revision: k.revision}},
			Changes:    []*storev1.Change{{Key: Key, Value: value}},
		})
		if err == nil {
			k.revision, k.holder, k.since = r.GetRevision(), want.Node, start
		}
		return err
	})
	switch {
	case err == nil:
		k.failures = 0
		return k.hold(ctx, want, start.Add(k.cfg.Times.Hold))
	case !errs.Is(err, errs.Conflict):
		// What is not answered may be done all the same: who goes on writing and never has an answer keeps all others from it.
		if k.failures++; !k.mine && k.failures > 1 {
			k.yield()
		}
		return fmt.Errorf("take the virtual addresses: %w", err)
	}
	// Another was first, or an own write had been done though it looked as if not.
	if err := k.call(ctx, k.look); err != nil {
		return err
	}
	if k.mine && k.holder != want.Node {
		k.drop(ctx, fmt.Sprintf("%q has them", k.holder))
	}
	return nil
}

// hold has the addresses here until a moment. If that cannot be, another node gets its turn.
func (k *Keeper) hold(ctx context.Context, want Want, until time.Time) error {
	r := &networkv1.HoldRequest{UntilMilliseconds: uint64((k.cfg.Boottime() + time.Until(until)) / time.Millisecond)}
	for _, a := range want.Addresses {
		r.Addresses = append(r.Addresses, a.String())
	}
	was := k.mine
	k.mine, k.until = true, until // also if the call fails: it may have been done
	var waiting []string
	err := k.call(ctx, func(ctx context.Context) error {
		out, err := k.cfg.Network.Hold(ctx, r)
		waiting = out.GetUnreachable()
		return err
	})
	if err != nil {
		k.resign(ctx, "networkd could not hold them: "+errs.Text(err))
		k.yield()
		return fmt.Errorf("hold the virtual addresses: %w", err)
	}
	if !was {
		k.held.Set(1)
		k.cfg.Log.Info("virtual addresses taken", "addresses", r.GetAddresses(), "revision", k.revision)
	}
	if len(waiting) > 0 {
		return errors.New(strings.Join(waiting, "; "))
	}
	return nil
}

// yield lets another node have its turn: it sees the key unchanged for long enough meanwhile.
func (k *Keeper) yield() {
	k.rest, k.failures = time.Now().Add(k.cfg.Times.Take+2*k.cfg.Times.Look), 0
}

// drop takes the addresses off this node; the key stays as it is.
func (k *Keeper) drop(ctx context.Context, why string) {
	if !k.mine {
		return
	}
	err := k.call(ctx, func(ctx context.Context) error {
		_, err := k.cfg.Network.Hold(ctx, &networkv1.HoldRequest{})
		return err
	})
	k.mine, k.until = false, time.Time{} // if networkd did not do it, the kernel does
	k.held.Set(0)
	k.cfg.Log.Warn("virtual addresses given up", "why", why, "err", errs.Text(err))
}

// resign gives up the addresses, and then the key, so that another node need not wait.
func (k *Keeper) resign(ctx context.Context, why string) {
	if !k.mine {
		return
	}
	k.drop(ctx, why)
	own := k.holder
	err := k.call(ctx, k.free)
	if errs.Is(err, errs.Conflict) { // an own write may have been done whose answer nobody waited for
		if err = k.call(ctx, k.look); err == nil && k.holder == own && k.revision != 0 {
			err = k.call(ctx, k.free)
		}
	}
	k.revision, k.holder, k.since = 0, "", time.Time{} // seen anew in the next round
	k.tell(err)
}

// free removes the key, on condition that it is the one that was seen.
func (k *Keeper) free(ctx context.Context) error {
	_, err := k.cfg.Store.Write(ctx, &storev1.WriteRequest{
		Conditions: []*storev1.Condition{{Key: Key, Revision: k.revision}},
		Changes:    []*storev1.Change{{Key: Key, Delete: true}},
	})
	return err
}

func boottime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic("vip: CLOCK_BOOTTIME: " + err.Error()) // every Linux has it
	}
	return time.Duration(t.Nano())
}

// call bounds one call.
func (k *Keeper) call(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, k.cfg.Times.Call)
	defer cancel()
	return f(ctx)
}

// tell logs what is wrong, once.
func (k *Keeper) tell(err error) {
	text := ""
	if err != nil && !errors.Is(err, context.Canceled) {
		text = errs.Text(err)
	}
	if text != "" && text != k.trouble {
		k.cfg.Log.Warn("virtual addresses", "err", text)
	}
	k.trouble = text
}
