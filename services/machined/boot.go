package machined

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/version"
	"github.com/bulkhead-os/bulkhead/services/machined/boots"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// How often the journal is written to STATE: often while a boot is young, for that is when one fails; seldom later, to spare the disk.
const (
	young       = 10 * time.Minute
	youngPause  = 2 * time.Second
	seldomPause = time.Minute
)

// A past is what is left of the boot before this one, and where boots are kept.
type past interface {
	// ID is the kernel's id of the running boot.
	ID() string
	// Folder is machined's own on STATE.
	Folder() string
	// Evidence reads what this boot found of the one before it. What could be read is returned with an error too.
	Evidence() (boots.Evidence, error)
	// Forget deletes a panic's record: it is stored.
	Forget() error
	// Kernel calls f with the kernel's lines that are new since the last call; at is by the kernel's clock. One goroutine may call it.
	Kernel(boot time.Time, f func(level int, l logs.Line)) error
}

// linuxPast is Linux itself.
type linuxPast struct{ kmsg *logs.Kmsg }

const (
	pstore   = "/sys/fs/pstore"
	watchdog = "/sys/class/watchdog/watchdog0/bootstatus"
	// cardReset is WDIOF_CARDRESET of linux/watchdog.h: the watchdog reset the machine.
	cardReset = 0x20
)

func (*linuxPast) ID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

func (*linuxPast) Folder() string { return filepath.Join(unit.StateDir, "machined") }

func (*linuxPast) Evidence() (boots.Evidence, error) {
	text, _, err := boots.ReadPanic(pstore)
	status, rerr := os.ReadFile(watchdog) // a machine may have none
	why, perr := strconv.ParseUint(strings.TrimSpace(string(status)), 10, 32)
	return boots.Evidence{Panic: text, Watchdog: rerr == nil && perr == nil && why&cardReset != 0}, err
}

func (*linuxPast) Forget() error {
	_, names, err := boots.ReadPanic(pstore)
	for _, name := range names {
		err = errors.Join(err, os.Remove(filepath.Join(pstore, name)))
	}
	return err
}

func (l *linuxPast) Kernel(boot time.Time, f func(int, logs.Line)) error {
	if l.kmsg == nil {
		k, err := logs.OpenKmsg("/dev/kmsg")
		if err != nil {
			return err
		}
		l.kmsg = k
	}
	return l.kmsg.Read(boot, f)
}

// remember opens the history of boots, now that STATE is there. It is worth no more than a warning if that fails: the node does its job
// without. mu is held.
func (d *Daemon) remember() {
	found, err := d.cfg.past.Evidence()
	if err != nil {
		d.cfg.Log.Warn("record of the last panic not whole", "err", err.Error())
	}
	now := boots.Boot{ID: d.cfg.past.ID(), Version: version.Version, Started: d.cfg.host.Boot()}
	h, since, err := boots.Open(d.cfg.past.Folder(), now, found, &d.journal)
	if err != nil {
		d.cfg.Log.Warn("boots are not remembered", "err", err.Error())
		return
	}
	d.history = h
	if !since.IsZero() {
		d.since.Store(since.UnixNano())
	}
	if found.Panic != "" {
		if err := d.cfg.past.Forget(); err != nil {
			d.cfg.Log.Warn("record of the last panic not deleted", "err", err.Error())
		}
	}
	if last, err := h.Find(-1); err == nil && since.IsZero() && last.End != boots.Clean {
		d.events.say("machined", typePower, "the boot before this one did not end as ordered: "+last.Detail)
	}
}

// noteOrder stores who ordered the end of this boot, and what; "" takes it back.
func (d *Daemon) noteOrder(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.history == nil {
		return
	}
	if err := d.history.Order(text); err != nil {
		d.cfg.Log.Warn("end of this boot not stored", "err", err.Error())
	}
}

// keepJournal moves what is said on the node to STATE, until ctx is done.
func (d *Daemon) keepJournal(ctx context.Context) error {
	told, err := d.events.last(ctx)
	if err != nil {
		return err
	}
	if !told.IsZero() {
		d.told.Store(told.UnixNano())
	}
	start := time.Now()
	said := false
	for {
		wait := seldomPause
		if time.Since(start) < young {
			wait = youngPause
		}
		err := d.wait(ctx, wait)
		ferr := errors.Join(d.readKernel(), d.journal.Flush())
		if ferr != nil && !said {
			said = true // once: it may fail for as long as STATE is full
			d.cfg.Log.Warn("last lines not stored", "err", ferr.Error())
		} else if ferr == nil {
			said = false
		}
		if err != nil {
			return err
		}
	}
}

// wait is a pause that ends when the kernel's log is to be looked at.
func (d *Daemon) wait(ctx context.Context, most time.Duration) error {
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-d.look:
	case <-t.C:
	}
	return nil
}

// readKernel adds to the journal what is new in the kernel's log.
func (d *Daemon) readKernel() error {
	return d.cfg.past.Kernel(d.cfg.host.Boot(), func(level int, l logs.Line) {
		if l.Time.UnixNano() > d.told.Load() {
			d.noteDenial(l)
		}
		if boots.Notable(level, l.Text) && l.Time.UnixNano() > d.since.Load() {
			d.journal.Add(l.Time, "kernel", l.Text)
		}
	})
}

// pastBoots returns the history, or why there is none. mu is held.
func (d *Daemon) pastBoots() (*boots.History, error) {
	if d.history == nil {
		return nil, errs.New(errs.Precondition, "boots are kept on STATE, which is not open: nothing is known of earlier ones; machined's log says more")
	}
	return d.history, nil
}

var ends = map[boots.End]machinev1.Boot_End{
	boots.Running: machinev1.Boot_RUNNING, boots.Clean: machinev1.Boot_CLEAN, boots.Panic: machinev1.Boot_PANIC, boots.Reset: machinev1.Boot_RESET, boots.Unknown: machinev1.Boot_UNKNOWN,
}

func (s *machineServer) ListBoots(context.Context, *machinev1.ListBootsRequest) (*machinev1.ListBootsResponse, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	h, err := s.d.pastBoots()
	if err != nil {
		return nil, err
	}
	stamp := func(t time.Time) *timestamppb.Timestamp {
		if t.IsZero() {
			return nil
		}
		return timestamppb.New(t)
	}
	out := &machinev1.ListBootsResponse{}
	for _, b := range h.List() {
		out.Boots = append(out.Boots, &machinev1.Boot{
			Number: b.Number, Id: b.ID, Version: b.Version, Started: stamp(b.Started), End: ends[b.End], Detail: b.Detail, LastSeen: stamp(b.Seen),
		})
	}
	return out, nil
}

func (s *machineServer) StreamBootLog(r *machinev1.StreamBootLogRequest, stream grpc.ServerStreamingServer[machinev1.BootLogLine]) error {
	free, err := s.d.slot()
	if err != nil {
		return err
	}
	defer free()
	s.d.mu.Lock()
	h, err := s.d.pastBoots()
	var b boots.Boot
	if err == nil {
		b, err = h.Find(r.GetBoot())
	}
	s.d.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.NotFound, "boot %d is not kept; ListBoots shows those that are", r.GetBoot())
	}
	if err != nil {
		return err
	}
	if b.End == boots.Running {
		if err := s.d.journal.Flush(); err != nil {
			return err
		}
	}
	lines, err := h.Lines(b, r.GetSource(), r.GetTail())
	if err != nil {
		return err
	}
	for _, l := range lines {
		if err := stream.Send(&machinev1.BootLogLine{Time: timestamppb.New(l.Time), Source: l.Source, Text: l.Text}); err != nil {
			return err
		}
	}
	return nil
}
