package machined

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

const (
	// resetFile is there from the moment that a reset stops units, until the machine restarts: a machined that was started anew goes on with it.
	resetFile = "reset"
	// memberTime bounds the question whether the node is one of several.
	memberTime = 10 * time.Second
	// leaveTime is what leaving etcd takes at most: asking all members, handing leadership over, the removal, and the member's end.
	leaveTime = time.Minute
	// departTime bounds the last word to the cluster: this node's own trustd is asked first, and cannot answer any more.
	departTime = 20 * time.Second
	// lockTime is how long the end of an apply is waited for.
	lockTime = 5 * time.Second
	// drainTime is longer than any unit may take to stop; PID 1 kills it before.
	drainTime = 45 * time.Second
	// destroyTries is how often storaged is asked again if it is started anew meanwhile.
	destroyTries = 5
)

// others are the daemons that a reset needs.
type others interface {
	// Members returns how many members the node's etcd cluster has, 0 if the node is in none; gone says that it was in one, and left or was removed.
	Members(context.Context) (n int, gone bool, err error)
	// LeaveEtcd removes the node's member and its data, or says why that must not be.
	LeaveEtcd(context.Context) error
	// LeaveCluster ends the node's membership at whichever other control plane answers.
	LeaveCluster(context.Context) error
	// Destroy lets storaged destroy the volumes. say is told each step, and from when on there is no way back.
	Destroy(ctx context.Context, removeOS, force bool, say func(step string, begun bool)) (facts []string, err error)
}

// resetOrder is what was asked for, also as it lies in resetFile.
type resetOrder struct {
	By       string `json:"by"`
	RemoveOS bool   `json:"remove_os"`
	PowerOff bool   `json:"power_off"`
	Force    bool   `json:"force"`
	// Depart says that a cluster has the node on its list.
	Depart bool `json:"depart,omitempty"`
}

func (o resetOrder) String() string {
	what := "reset"
	if o.RemoveOS {
		what += ", removing the system,"
	}
	return what + " ordered by " + o.By
}

// A resetRun is one reset, on its way.
type resetRun struct {
	d       *Daemon
	order   resetOrder
	say     func(step string)
	begun   bool     // there is no way back
	left    bool     // it was taken out of etcd
	stopped []string // units that run no more because of it
}

// Reset answers until the machine is to go down.
func (s *machineServer) Reset(r *machinev1.ResetRequest, stream grpc.ServerStreamingServer[machinev1.ResetProgress]) error {
	d := s.d
	if now, _ := d.running.Get(); now.Number != 0 && r.GetNode() != now.set.Machine.Hostname || now.Number == 0 && r.GetNode() != "" {
		return errs.New(errs.Invalid, "node: %.64q is not the name of this node, and nothing was changed: its name is %q", r.GetNode(), nameOf(now))
	}
	ctx, cancel := context.WithTimeout(stream.Context(), lockTime)
	defer cancel()
	unlock, err := d.lock(ctx)
	if err != nil {
		return errs.New(errs.Unavailable, "an apply or a reset runs already; try again")
	}
	d.ending.Set(true)
	start := time.Now()
	run := &resetRun{d: d, order: resetOrder{By: caller(stream.Context()), RemoveOS: r.GetRemoveOs(), PowerOff: r.GetPowerOff(), Force: r.GetForce()}}
	send := func(p *machinev1.ResetProgress) {
		p.ElapsedMs, p.Begun = uint64(time.Since(start).Milliseconds()), run.begun
		_ = stream.Send(p) // who has left is told nothing; the reset goes on
	}
	run.say = func(step string) { send(&machinev1.ResetProgress{Step: step}) }
	facts, err := run.all(context.WithoutCancel(stream.Context()))
	if err != nil && !run.begun {
		d.ending.Set(false)
		unlock()
		return err
	}
	if err == nil {
		send(&machinev1.ResetProgress{Facts: facts})
		if fact := run.depart(context.WithoutCancel(stream.Context())); fact != "" {
			send(&machinev1.ResetProgress{Facts: []string{fact}})
		}
	}
	return errors.Join(err, run.goDown(err)) // the right to change the configuration is kept: there is none any more
}

func nameOf(r running) string {
	if r.Number == 0 {
		return ""
	}
	return r.set.Machine.Hostname
}

// all does everything but the restart. If it fails before the reset has begun, the node is again as it was.
func (r *resetRun) all(ctx context.Context) ([]string, error) {
	if err := r.leave(ctx); err != nil {
		return nil, err
	}
	r.d.cfg.Log.Info("reset", "step", r.order.String())
	r.d.events.say("machined", typePower, r.order.String())
	if err := r.d.noteReset(r.order); err != nil {
		return nil, err
	}
	facts, err := r.end(ctx)
	if err != nil && !r.begun {
		if err = errors.Join(err, r.back()); r.left {
			return nil, errs.New(errs.Of(err), "%w; this node has left etcd, and comes back with: bhctl etcd rejoin", err)
		}
		return nil, err
	}
	return facts, err
}

// leave takes the node out of etcd if others are in it, or refuses: then nothing was changed.
func (r *resetRun) leave(ctx context.Context) error {
	if r.order.Force {
		return nil
	}
	n, gone, err := r.members(ctx)
	if err != nil {
		return errs.New(errs.Precondition, "whether this node is one of several is not known, since etcdd does not say: %s; nothing was changed. By force it is reset all the same", errs.Text(err))
	}
	now, _ := r.d.running.Get()
	r.order.Depart = n > 1 || gone || now.Number != 0 && now.set.Machine.Role == config.Worker
	if n <= 1 {
		return nil
	}
	r.say(fmt.Sprintf("leave etcd, which has %d members", n))
	ctx, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	if err := r.d.cfg.others.LeaveEtcd(ctx); err != nil {
		return errs.New(errs.Precondition, "this node is one of %d members of etcd and cannot leave now: %s; nothing was destroyed. By force it is reset all the same, and "+
			"the others have lost a vote until its member is removed at one of them", n, errs.Text(err))
	}
	r.left = true
	return nil
}

func (r *resetRun) members(ctx context.Context) (int, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, memberTime)
	defer cancel()
	return r.d.cfg.others.Members(ctx)
}

// depart tells the cluster that the node is no more, which it can do for itself alone. It is the last thing, since nobody of the cluster speaks with the node
// afterwards. A failure is a fact for the operator.
func (r *resetRun) depart(ctx context.Context) (fact string) {
	if !r.order.Depart {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, departTime)
	defer cancel()
	err := r.d.cfg.others.LeaveCluster(ctx)
	if err == nil {
		return ""
	}
	now, _ := r.d.running.Get()
	fact = fmt.Sprintf("The cluster may have this node on its list still; at another node, run: bhctl node remove %s (%s)", nameOf(now), errs.Text(err))
	r.d.cfg.Log.Warn("membership not ended", "err", errs.Text(err))
	return fact
}

// end stops what uses the volumes and lets storaged destroy them.
func (r *resetRun) end(ctx context.Context) ([]string, error) {
	if err := r.stopUnits(ctx); err != nil {
		return nil, err
	}
	if err := r.d.leaveState(); err != nil {
		r.d.cfg.Log.Warn("last lines not stored", "err", err.Error())
	}
	var facts []string
	var err error
	for range destroyTries {
		facts, err = r.d.cfg.others.Destroy(ctx, r.order.RemoveOS, r.order.Force, func(step string, begun bool) {
			r.begun = r.begun || begun
			r.say(step)
		})
		if !errs.Is(err, errs.Unavailable) {
			break
		}
	}
	if err != nil {
		return nil, errs.New(errs.Of(err), "storaged: %s", errs.Text(err))
	}
	return facts, nil
}

// stopOrder returns the units that are stopped before the volumes are destroyed, in groups that follow one another: those who order others first,
// then what uses others. What stays is the way that the answer takes, and who ends the rest.
func stopOrder(units []string) (groups [4][]string) {
	for _, u := range units {
		switch {
		case slices.Contains([]string{"machined", "storaged", "apid", "gateway", "networkd", "trustd"}, u):
		case u == "kubeletd" || u == "updated":
			groups[0] = append(groups[0], u)
		case u == "kubelet" || strings.HasPrefix(u, "kube-"):
			groups[1] = append(groups[1], u)
		case u == "containerd":
			groups[2] = append(groups[2], u)
		default:
			groups[3] = append(groups[3], u)
		}
	}
	return groups
}

// stopUnits returns when they are down, or have had their time: storaged manages with what is left.
func (r *resetRun) stopUnits(ctx context.Context) error {
	units, err := r.d.cfg.init.Status()
	if err != nil {
		return errs.New(errs.Unavailable, "ask PID 1 for its units: %w", err)
	}
	var names []string
	for _, u := range units {
		if u.State != "down" {
			names = append(names, u.Name)
		}
	}
	for _, group := range stopOrder(names) {
		if len(group) == 0 {
			continue
		}
		r.say("stop " + strings.Join(group, ", "))
		for _, name := range group {
			if err := r.d.cfg.init.Stop(name); err != nil {
				return orderError("stop "+name, err)
			}
			r.stopped = append(r.stopped, name)
		}
		if err := r.awaitDown(ctx, group); err != nil {
			return err
		}
	}
	return nil
}

func (r *resetRun) awaitDown(ctx context.Context, group []string) error {
	for end := time.Now().Add(drainTime); time.Now().Before(end); {
		units, err := r.d.cfg.init.Status()
		if err != nil {
			return errs.New(errs.Unavailable, "ask PID 1 for its units: %w", err)
		}
		if !slices.ContainsFunc(units, func(u initctl.Status) bool { return u.State != "down" && slices.Contains(group, u.Name) }) {
			return nil
		}
		if err := pause(ctx, statePause); err != nil {
			return err
		}
	}
	r.d.cfg.Log.Warn("going on without waiting", "step", "stop "+strings.Join(group, ", "))
	return nil
}

// back makes the node again what it was: nothing was destroyed.
func (r *resetRun) back() error {
	err := os.Remove(filepath.Join(r.d.cfg.Runtime, resetFile))
	r.d.resetting.Store(false)
	if _, oerr := r.d.open(); oerr != nil {
		err = errors.Join(err, oerr)
	}
	for _, name := range r.stopped {
		if serr := r.d.cfg.init.Start(name); serr != nil {
			err = errors.Join(err, orderError("start "+name, serr))
		}
	}
	return err
}

// goDown restarts the machine or turns it off. After an error it restarts: the next start goes on with what was begun.
func (r *resetRun) goDown(err error) error {
	do := r.d.cfg.init.Reboot
	if r.order.PowerOff && err == nil {
		do = r.d.cfg.init.PowerOff
	}
	return r.d.order(do)
}

// noteReset remembers over a restart of this process that the node is being reset.
func (d *Daemon) noteReset(o resetOrder) error {
	data, err := json.Marshal(o)
	if err != nil {
		return err
	}
	path := filepath.Join(d.cfg.Runtime, resetFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	d.resetting.Store(true)
	return os.Rename(path+".new", path)
}

// resumeReset goes on with a reset that an earlier process of this boot has begun. The caller has the right to change the configuration, and
// keeps it.
func (d *Daemon) resumeReset(ctx context.Context) error {
	data, err := os.ReadFile(filepath.Join(d.cfg.Runtime, resetFile))
	if err != nil {
		return err
	}
	run := &resetRun{d: d, say: func(string) {}}
	if err := json.Unmarshal(data, &run.order); err != nil {
		return fmt.Errorf("%s: %w", resetFile, err)
	}
	d.events.say("machined", typePower, run.order.String()+" goes on")
	if _, err = run.end(ctx); err != nil {
		d.cfg.Log.Error("reset not whole", "err", errs.Text(err))
		d.events.say("machined", typePower, "the reset is not whole: "+errs.Text(err))
	} else {
		run.depart(ctx) // its failure is in the log
	}
	if err := run.goDown(err); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

// leaveState lets go of everything on STATE, so that it can be unmounted. Nothing is written there any more.
func (d *Daemon) leaveState() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := errors.Join(d.journal.Close(), d.audit.Close())
	d.history = nil
	if d.store != nil {
		err = errors.Join(err, d.store.Close())
		d.store = nil
	}
	return err
}

// inReset reports whether an earlier process of this boot was resetting the node.
func (d *Daemon) inReset() bool {
	_, err := os.Lstat(filepath.Join(d.cfg.Runtime, resetFile))
	return !errors.Is(err, fs.ErrNotExist)
}
