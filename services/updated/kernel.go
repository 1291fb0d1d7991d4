package updated

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// observe asks storaged what is in the slots, and machined how the node is if that matters. Slots do not change by themselves: they are looked
// at again after an order of ours, and once in a while.
func (d *Daemon) observe(ctx context.Context) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	was, _ := d.state.Get()
	s := State{Slots: was.Slots, NoSlots: was.NoSlots, Uptime: d.cfg.Uptime()}
	if d.changed.Swap(false) || s.Slots == nil && s.NoSlots == "" || s.Uptime-was.looked > resyncTime {
		slots, err := d.cfg.Slots.Get(ctx, &slotv1.GetRequest{})
		switch {
		case errs.Is(err, errs.Precondition):
			s.Slots, s.NoSlots = nil, errs.Text(err)
		case err != nil:
			d.changed.Store(true)
			return s, fmt.Errorf("ask storaged for the slots: %w", err)
		default:
			s.Slots, s.NoSlots = slots, ""
		}
		s.looked = s.Uptime
	} else {
		s.looked = was.looked
	}
	if s.onTrial() {
		s.Late = d.book.get().Trial.late(s.running())
		h, err := d.cfg.Machine.GetHealth(ctx, &machinev1.GetHealthRequest{})
		if s.Checks = h.GetChecks(); err != nil {
			s.Checks, s.Unhealthy = nil, "machined does not say how the node is: "+errs.Text(err)
		}
		// From here on it is judged, as it is.
		if err := os.WriteFile(d.cfg.JudgedFile, []byte(s.Uptime.String()), 0o600); err != nil {
			return s, fmt.Errorf("tell PID 1 that this version is judged: %w", err)
		}
	}
	return s, nil
}

// plan is plan, but for a version that a person has given up.
func (d *Daemon) plan(want config.Update, s State) ([]Step, error) {
	if d.quit.Load() {
		return nil, nil
	}
	return plan(want, s)
}

func (d *Daemon) planBare(s State) ([]Step, error) {
	if d.quit.Load() {
		return nil, nil
	}
	return planBare(s)
}

// apply does one step.
func (d *Daemon) apply(ctx context.Context, s Step) error {
	switch s.Op {
	case opProve:
		return errors.New("not yet")
	case opGood, opRaise:
		return d.markGood(ctx, false, "health")
	case opRestart:
		d.tell(ctx, "restart: "+s.What)
		d.book.end(s.What)
		return d.cfg.Restart()
	}
	return fmt.Errorf("unknown step %q", s.Op)
}

// markGood ends the trial in somebody's name.
func (d *Daemon) markGood(ctx context.Context, override bool, by string) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	was, _ := d.state.Get()
	d.changed.Store(true)
	slots, err := d.cfg.Slots.MarkGood(ctx, &slotv1.MarkGoodRequest{Override: override})
	if err != nil {
		return err
	}
	d.quit.Store(false)
	version := State{Slots: slots}.running().GetVersion()
	if was.running().GetStatus() != "good" {
		d.log.Info("version found good", "step", version)
		d.book.add(event{Time: time.Now(), What: "good", Version: version, By: by}, func(j *journal) { j.Trial = nil })
		d.tell(ctx, fmt.Sprintf("%s was found good by %s", version, by))
	}
	return nil
}

// tell makes an event. Nothing depends on it.
func (d *Daemon) tell(ctx context.Context, text string) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if _, err := d.cfg.Machine.TellEvent(ctx, &machinev1.TellEventRequest{Type: "update", Text: cut(oneLine(text))}); err != nil {
		d.log.Warn("event not told", "err", errs.Text(err))
	}
}

// kernelLog returns the last lines of the kernel's log, PID 1's among them.
func (d *Daemon) kernelLog(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	stream, err := d.cfg.Machine.StreamKernelLog(ctx, &machinev1.StreamKernelLogRequest{Tail: maxLines})
	if err != nil {
		return nil, err
	}
	var out []string
	return out, receive(stream.Recv, func(l *machinev1.LogLine) { out = append(out, l.GetText()) })
}
