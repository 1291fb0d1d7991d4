package trustd

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/join"
	"github.com/bulkhead-os/bulkhead/trustd/roster"
)

// Pauses between two tries to hear of the cluster.
const (
	firstPause = 250 * time.Millisecond
	maxPause   = 10 * time.Second
	// localPause is the longest of a control plane, which asks its own etcd: as long as that does not run, this node knows no node that came meanwhile.
	localPause = time.Second
	// rewatch is how long a worker listens to one control plane before it asks anew: a connection that died unnoticed says nothing.
	rewatch = 10 * time.Minute
)

// followCluster keeps up with the cluster until ctx is done: a control plane with its etcd, a worker with a control plane. While nobody answers, what was known last counts.
func (d *Daemon) followCluster(ctx context.Context) error {
	pause, said := firstPause, ""
	for {
		k, changed := d.keys.Get()
		heard, err, most := false, error(nil), maxPause
		switch {
		case k.cluster != nil:
			most = localPause
			heard, err = d.until(ctx, changed, d.followStore)
		case k.node != nil:
			heard, err = d.until(ctx, changed, func(ctx context.Context) (bool, error) { return d.followFar(ctx, k) })
		default:
			heard = true
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if heard {
			pause, said = firstPause, ""
		}
		if err != nil {
			if text := errs.Text(err); text != said {
				said = text
				d.log.Warn("the cluster's state is not heard; what was known last counts", "err", text)
			}
			d.refusedBy(k, err)
		}
		timer := time.NewTimer(min(pause, most))
		select {
		case <-ctx.Done():
		case <-timer.C:
			pause = min(2*pause, maxPause)
		case <-changed:
		}
		timer.Stop()
	}
}

// until runs f until it ends or changed is closed.
func (d *Daemon) until(ctx context.Context, changed <-chan struct{}, f func(context.Context) (bool, error)) (bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		heard bool
		err   error
	}
	done := make(chan result, 1)
	go func() {
		heard, err := f(ctx)
		done <- result{heard, err}
	}()
	select {
	case r := <-done:
		return r.heard, r.err
	case <-changed:
		cancel()
		return (<-done).heard, nil // it ends since it was told to
	}
}

// refusedBy notes that the cluster does not take this worker for its own any more; it goes on asking, seldom, since that may be an error of people.
func (d *Daemon) refusedBy(k *keyring, err error) {
	if k.worker() && (errs.Is(err, errs.Unauthenticated) || errs.Is(err, errs.Denied)) {
		d.setMembership(err)
	}
}

func (d *Daemon) setMembership(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if (err == nil) == (d.membership == nil) && errs.Text(err) == errs.Text(d.membership) {
		return
	}
	if d.membership = err; err != nil {
		d.log.Error("this node is no member of its cluster", "err", errs.Text(err))
	}
	d.report()
}

// followStore hears of the cluster from this node's etcd.
func (d *Daemon) followStore(ctx context.Context) (heard bool, err error) {
	list, k, err := d.roster()
	if err != nil {
		return false, err
	}
	strange := 0
	err = list.Watch(ctx, func(s *roster.State) {
		heard = true
		if len(s.Strange) > strange {
			d.log.Error("records in etcd that cannot be read", "err", fmt.Sprint(s.Strange))
		}
		strange = len(s.Strange)
		word := k.heard(s)
		d.word.Set(word)
		before, _ := d.list.Get()
		d.list.Set(s)
		d.learn(word)
		if before == nil { // learn reports nothing if all is as it was before this process
			d.mu.Lock()
			d.report()
			d.mu.Unlock()
		}
	})
	return heard, err
}

// followFar hears of the cluster from a control plane.
func (d *Daemon) followFar(ctx context.Context, k *keyring) (heard bool, err error) {
	err = d.far(ctx, k, func(endpoint string) error {
		ctx, cancel := context.WithTimeout(ctx, rewatch)
		defer cancel()
		first := time.AfterFunc(farPatience, cancel) // who says nothing is away
		defer first.Stop()
		e, err := d.dial(ctx, trustv1.Nodes_WatchCluster_FullMethodName, endpoint, d.osRoots(k), join.NodeLabel)
		if err != nil {
			return err
		}
		proof, err := d.prove(k.node, e.binding, join.WatchPayload(d.instance))
		if err != nil {
			return err
		}
		if err := e.send(&trustv1.WatchClusterRequest{Proof: proof}); err != nil {
			return err
		}
		for got := false; ; got = true {
			t := &trustv1.TrustState{}
			if err := e.recv(t); err != nil {
				if got && (errors.Is(err, io.EOF) || errs.Is(err, errs.Unavailable)) {
					return nil // it was a good one; begin anew with it
				}
				return err
			}
			first.Stop()
			if err := checkHeard(k, t); err != nil {
				return errs.New(errs.Internal, "%s: %w", endpoint, err)
			}
			heard = true
			d.setMembership(nil)
			d.learn(t)
		}
	})
	return heard, err
}

// checkHeard refuses what cannot be the word of this node's cluster.
func checkHeard(k *keyring, t *trustv1.TrustState) error {
	if !t.GetBootstrapped() || len(t.GetTokenKeys()) == 0 {
		return errors.New("it says nothing of whom to trust")
	}
	if ca := t.GetOsCa(); ca == "" || !strings.Contains(ca, k.osPEM()) {
		return errors.New("it trusts another authority than the one that let this node in")
	}
	return nil
}

// keepRecord keeps a control plane on the cluster's list, under its name and with its addresses.
func (d *Daemon) keepRecord(ctx context.Context) error {
	pause := firstPause
	for {
		list, c1 := d.list.Get()
		sp, c2 := d.spec.Get()
		k, c3 := d.keys.Get()
		own, c4 := d.own.Get()
		var timer <-chan time.Time
		if list != nil && k.cluster != nil {
			if err := d.keepOnce(ctx, list, sp, k, own); err != nil && ctx.Err() == nil {
				d.log.Warn("own record in the cluster not kept", "err", errs.Text(err))
				timer, pause = time.After(pause), min(2*pause, maxPause)
			} else {
				pause = firstPause
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c1:
		case <-c2:
		case <-c3:
		case <-c4:
		case <-timer:
		}
	}
}

func (d *Daemon) keepOnce(ctx context.Context, list *roster.State, sp *spec, k *keyring, own []string) error {
	if k.node == nil || k.node.first && sp.hostname != "" && sp.hostname != k.node.name {
		return d.nameFirst(list, sp, k)
	}
	me := roster.Node{Name: k.node.name, Role: k.node.role, Key: k.node.digest(), PublicKey: k.node.public, Joined: d.cfg.Now()}
	instance := hex.EncodeToString(d.instance)
	write, _, err := roster.Own(list, me, instance, own)
	if err != nil {
		d.setMembership(errs.New(errs.Precondition, "%w", err))
		return nil // said; it is looked at again when the list changes
	}
	d.setMembership(nil)
	if write.Name == "" {
		return nil
	}
	r, _, err := d.roster()
	if err != nil {
		return err
	}
	return r.Keep(ctx, me, instance, own)
}

// nameFirst gives the node on which the cluster was made its place in it, and its name: again when the document calls it otherwise, as long as nobody else knows it.
func (d *Daemon) nameFirst(list *roster.State, sp *spec, k *keyring) error {
	if sp.hostname == "" || sp.role != config.ControlPlane {
		return nil // there is no document yet
	}
	n := &member{name: sp.hostname, role: roster.ControlPlane, first: true}
	if k.node != nil {
		for _, o := range list.Nodes {
			if o.Key != k.node.digest() {
				return nil // report says what is wrong
			}
		}
		n.key, n.public = k.node.key, k.node.public
	} else {
		var err error
		if n.key, n.public, err = newNodeKey(d.cfg.Random); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now, _ := d.keys.Get()
	if d.where != durable || now.node != k.node {
		return nil // it is tried again when the keys are where they belong
	}
	next := *now
	next.node = n
	data, err := next.file(nil)
	if err != nil {
		return err
	}
	if err := writeFile(d.cfg.StateDir, nodeFile, data); err != nil {
		return err
	}
	d.keys.Set(&next)
	d.publish()
	d.report()
	d.log.Info("node has its place in the cluster", "name", n.name)
	return nil
}

// ownAddresses are those that lead to this node from others.
func ownAddresses(ips []net.IP) []string {
	var out []string
	for _, ip := range ips {
		if a, err := roster.Address(ip.String()); err == nil && a != "" {
			out = append(out, a)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
