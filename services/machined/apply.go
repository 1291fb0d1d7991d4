package machined

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"syscall"
	"time"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// firstGeneration is the number of a node's first configuration.
const firstGeneration = 1

// lookPause is between two looks at what storaged says while STATE is waited for.
const lookPause = 2 * time.Second

// lock takes the right to change the configuration. The caller calls the function it gets. While the node is being reset nobody gets it, and nobody waits for it.
func (d *Daemon) lock(ctx context.Context) (func(), error) {
	for {
		ends, changed := d.ending.Get()
		if ends { // nothing comes after it, unless it fails
			return nil, errs.New(errs.Unavailable, "the node is being reset, and takes no configuration now")
		}
		select {
		case d.apply <- struct{}{}:
			return func() { <-d.apply }, nil
		case <-changed:
		case <-ctx.Done():
			return nil, errs.New(errs.Unavailable, "another apply runs: %w", ctx.Err())
		}
	}
}

// load waits for STATE and hands out what it holds. It returns ctx's error.
func (d *Daemon) load(ctx context.Context) error {
	if d.resetting.Load() {
		close(d.looked)
		if _, err := d.lock(ctx); err != nil {
			return ctx.Err()
		}
		d.ending.Set(true)
		return d.resumeReset(ctx)
	}
	said, look := "", sync.OnceFunc(func() { close(d.looked) })
	for {
		unlock, err := d.lock(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil { // a reset, which may fail
			if err := pause(ctx, statePause); err != nil {
				return err
			}
			continue
		}
		ready, err := d.open()
		look()
		unlock()
		if err != nil && err.Error() != said {
			said = err.Error()
			d.cfg.Log.Error("generations cannot be read", "err", said)
			d.events.say("machined", typeConfig, said)
		}
		if ready {
			<-ctx.Done()
			return ctx.Err()
		}
		if err := pause(ctx, statePause); err != nil {
			return err
		}
	}
}

// lookedUp waits until it is known whether there is a configuration: a machined that was just started knows of none yet, and must not say that there is none.
func (d *Daemon) lookedUp(ctx context.Context) error {
	select {
	case <-d.looked:
		return nil
	case <-ctx.Done():
		return errs.New(errs.Unavailable, "it is not known yet whether STATE has a configuration: %w", ctx.Err())
	}
}

// open opens the store if STATE is there, and hands out its newest generation. It reports whether the store is open. lock is held.
func (d *Daemon) open() (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store != nil {
		return true, nil
	}
	if d.resetting.Load() {
		return false, errs.New(errs.Unavailable, "the node is being reset")
	}
	folder, err := d.cfg.host.State()
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s, err := store.Open(folder)
	if err != nil {
		return false, err
	}
	d.store = s
	d.remember()
	d.openAudit()
	g, damaged := s.Newest()
	for _, err := range damaged {
		d.cfg.Log.Error("generation not readable", "err", err.Error())
		d.events.say("machined", typeConfig, "on STATE: "+err.Error())
	}
	if g.Number == 0 {
		return true, nil
	}
	if len(damaged) > 0 {
		// A daemon may have seen the damaged one's number already and refuses lower ones.
		g.Caller = fmt.Sprintf("machined, as generation %d, because later ones are damaged", g.Number)
		g.Applied = time.Now()
		d.events.say("machined", typeConfig, fmt.Sprintf("the node falls back to generation %d, because later ones are damaged", g.Number))
		if again, err := s.Add(g); err == nil {
			g = again
		} else {
			d.cfg.Log.Error("generation not stored", "generation", g.Number, "err", err.Error())
		}
	}
	if err := d.resume(g); err != nil { // what is there is for an Apply to replace
		d.events.say("machined", typeConfig, err.Error())
	}
	return true, nil
}

// resume hands out a stored generation, or, if this version cannot read it, the newest one that it can. mu is held.
func (d *Daemon) resume(g store.Generation) error {
	err := d.handOut(g)
	if err == nil {
		return nil
	}
	for _, older := range d.store.List() {
		if older.Number >= g.Number {
			continue
		}
		if o, e := d.store.Load(older.Number); e == nil && d.handOut(o) == nil {
			d.events.say("machined", typeConfig, fmt.Sprintf("the node falls back to generation %d: %s", o.Number, err))
			return nil
		}
	}
	return err
}

// handOut makes a stored generation the running one.
func (d *Daemon) handOut(g store.Generation) error {
	set, err := config.Parse(g.Name, g.Documents)
	if err != nil {
		err = fmt.Errorf("generation %d is not valid for this version: %w", g.Number, err)
		d.cfg.Log.Error("generation not valid", "generation", g.Number, "err", err.Error())
		return err
	}
	d.running.Set(running{g, named(set, g.Hostname)})
	d.cfg.Log.Info("configuration loaded", "generation", g.Number)
	return nil
}

// change is an Apply's work, after validation.
type change struct {
	parsed config.Set       // as the document says
	fresh  string           // a name, in case that the node needs one
	set    config.Set       // parsed, with the node's name in it; set by follow
	next   store.Generation // all but its number
	dryRun bool
}

// named fills in the name that the node gave itself if the document has none: the one default that no text can hold.
func named(set config.Set, hostname string) config.Set {
	if set.Machine.Hostname == "" {
		m := *set.Machine
		m.Hostname = hostname
		set.Machine = &m
	}
	return set
}

// follow makes the change one that comes after now: it keeps the node's own name, or makes one.
func (c *change) follow(now running) {
	if c.next.Hostname = now.Hostname; c.next.Hostname == "" {
		c.next.Hostname = c.fresh
	}
	c.set = named(c.parsed, c.next.Hostname)
}

// freshName is a name for a node that has none.
func freshName() string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // never fails
	return fmt.Sprintf("bulkhead-%x", b)
}

// applyChange carries a change out. lock is held.
func (d *Daemon) applyChange(ctx context.Context, c change) (*configv1.ApplyResponse, error) {
	if _, err := d.open(); err != nil {
		return nil, err
	}
	now, _ := d.running.Get()
	c.follow(now)
	changed := now.Number == 0 || !config.Equal(now.set, c.set)
	number := now.Number
	if changed {
		number = d.nextNumber()
	}
	resp := &configv1.ApplyResponse{Generation: number, Changed: changed}
	if !changed && !c.dryRun {
		return resp, nil
	}
	var err error
	if resp.Plans, err = d.plans(ctx, number, c.set); c.dryRun || err != nil {
		return resp, err
	}
	if err := d.ensureState(ctx, number, c.set); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, errs.New(errs.Unavailable, "the caller left; nothing was changed")
	}
	// From here on the caller's patience does not matter: it takes no more than one write.
	now, _ = d.running.Get() // STATE may have brought one
	c.follow(now)
	if now.Number != 0 && config.Equal(now.set, c.set) {
		resp.Generation, resp.Changed = now.Number, false
		return resp, nil
	}
	d.mu.Lock()
	stored, err := d.store.Add(c.next)
	d.mu.Unlock()
	if err != nil {
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
			return nil, errs.New(errs.Exhausted, "STATE is full: %w; nothing was changed, generation %d runs on", err, now.Number)
		}
		return nil, fmt.Errorf("%w; nothing was changed, generation %d runs on", err, now.Number)
	}
	resp.Generation = stored.Number
	d.running.Set(running{stored, c.set})
	d.cfg.Log.Info("configuration applied", "generation", stored.Number)
	d.events.say("machined", typeConfig, fmt.Sprintf("generation %d was applied by %s", stored.Number, stored.Caller))
	return resp, nil
}

func (d *Daemon) nextNumber() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.store == nil {
		return firstGeneration
	}
	return d.store.Next()
}

// plans asks every daemon what it would do. An error of a daemon that calls its section invalid is returned: then nothing may be changed.
func (d *Daemon) plans(ctx context.Context, number uint64, set config.Set) ([]*configv1.DaemonPlan, error) {
	ctx, cancel := context.WithTimeout(ctx, planTime)
	defer cancel()
	all := make([]*configv1.DaemonPlan, len(d.hands))
	invalid := make([]error, len(d.hands))
	var wait sync.WaitGroup
	for i, h := range d.hands {
		wait.Go(func() {
			steps, err := h.link.Plan(ctx, h.spec(number, set))
			if errs.Is(err, errs.Invalid) {
				invalid[i] = fmt.Errorf("%s: %s", h.daemon, errs.Text(err))
			}
			if err != nil && ctx.Err() != nil {
				err = fmt.Errorf("did not answer within %s", planTime)
			}
			all[i] = &configv1.DaemonPlan{Daemon: h.daemon, Steps: steps, Error: errs.Text(err)}
		})
	}
	wait.Wait()
	var out []*configv1.DaemonPlan
	for _, p := range all {
		if len(p.Steps) > 0 || p.Error != "" {
			out = append(out, p)
		}
	}
	if err := errors.Join(invalid...); err != nil {
		return nil, errs.New(errs.Invalid, "%w", err)
	}
	return out, nil
}

// ensureState makes sure that STATE is there and the store open: on a new disk, storaged first gets its section and makes it.
func (d *Daemon) ensureState(ctx context.Context, number uint64, set config.Set) error {
	if ready, err := d.open(); ready || err != nil {
		return err
	}
	h := d.hand(storaged)
	spec := h.spec(number, set)
	if err := hopeless(ctx, h.link, spec); err != nil {
		return err
	}
	if err := timed(ctx, setTime, func(ctx context.Context) error { return h.link.Set(ctx, spec) }); err != nil {
		return fmt.Errorf("hand Storage to storaged: %w", err)
	}
	d.events.say("machined", typeConfig, "waiting for storaged to make STATE")
	end := time.Now().Add(d.cfg.StateWait)
	look := time.Now().Add(lookPause) // its word on the new section needs a moment
	for {
		if ready, err := d.open(); ready || err != nil {
			return err
		}
		s, _ := h.status.Get()
		switch {
		case time.Now().After(end):
			return errs.New(errs.Unavailable, "STATE was not there after %s; nothing was changed; storaged says: %s", d.cfg.StateWait, says(s))
		case !s.here || time.Now().Before(look):
		case s.state.GetGeneration() < number:
			// It was started anew and forgot. An error will show in the next rounds.
			_ = timed(ctx, setTime, func(ctx context.Context) error { return h.link.Set(ctx, spec) })
			look = time.Now().Add(lookPause)
		case s.state.GetError() != "":
			if err := hopeless(ctx, h.link, spec); err != nil {
				return err
			}
			look = time.Now().Add(lookPause)
		}
		if err := pause(ctx, statePause); err != nil {
			return errs.New(errs.Unavailable, "the caller left before STATE was there; nothing was changed; storaged says: %s", says(s))
		}
	}
}

// hopeless returns storaged's word if it is one that waiting does not change, as with foreign data on the disk.
func hopeless(ctx context.Context, l link, spec *controlv1.Spec) error {
	err := timed(ctx, planTime, func(ctx context.Context) error {
		_, err := l.Plan(ctx, spec)
		return err
	})
	if errs.Is(err, errs.Precondition) || errs.Is(err, errs.Invalid) {
		return errs.New(errs.Of(err), "storaged: %s; nothing was changed", errs.Text(err))
	}
	return nil
}

// says puts a daemon's state into a sentence.
func says(s status) string {
	switch {
	case !s.here:
		return "it does not answer"
	case s.state.GetError() != "":
		return s.state.GetError()
	case len(s.state.GetPending()) > 0:
		return "left to do: " + s.state.GetPending()[0]
	}
	return "nothing"
}

func timed(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return f(ctx)
}

// hand returns the handout of one of the recipients.
func (d *Daemon) hand(name string) *handout {
	for _, h := range d.hands {
		if h.daemon == name {
			return h
		}
	}
	panic("machined: no recipient " + name) // the table is in the code
}
