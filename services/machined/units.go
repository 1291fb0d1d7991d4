package machined

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// initd is PID 1, as *initctl.Client has it.
type initd interface {
	Status() ([]initctl.Status, error)
	Watch(context.Context, func(initctl.Status)) error
	Logs(unit string) (*os.File, error)
	Start(unit string) error
	Stop(unit string) error
	Restart(unit string) error
	Reboot() error
	PowerOff() error
}

// logPause is the pause before a unit's log pipe is asked for again.
const logPause = time.Second

// watchUnits follows every unit: its log is read from the moment it is known, and its changes become events.
func (d *Daemon) watchUnits(ctx context.Context) error {
	var readers sync.WaitGroup
	defer readers.Wait()
	told, err := d.events.last(ctx)
	if err != nil {
		return err
	}
	wait := firstPause
	for {
		err := d.cfg.init.Watch(ctx, func(u initctl.Status) {
			wait = firstPause
			d.noteUnit(u, told)
			if l := d.newLog(u.Name); l != nil {
				readers.Go(func() { d.readLog(ctx, u.Name, l) })
			}
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.cfg.Log.Warn("watch of PID 1 ended", "err", fmt.Sprint(err))
		if err := pause(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, maxPause)
	}
}

// noteUnit makes an event of a unit's change. told is when the events of an earlier process end: what was before is not told twice.
func (d *Daemon) noteUnit(u initctl.Status, told time.Time) {
	d.mu.Lock()
	was, seen := d.state[u.Name]
	d.state[u.Name] = u.State
	d.falls[u.Name] = d.falls[u.Name].next(u, seen)
	d.live(u)
	u.LastExit = d.noteEnd(u)
	d.mu.Unlock()
	if was != u.State && strings.HasPrefix(u.LastExit, deniedSignal) {
		select {
		case d.look <- struct{}{}:
		default:
		}
	}
	if was == u.State || !seen && (u.State == "down" && u.LastExit == "" || !u.Since.After(told)) {
		return
	}
	text := u.State
	switch u.State {
	case "up":
		text = fmt.Sprintf("up, process %d", u.PID)
	case "waiting":
		text = "ended (" + u.LastExit + "), will be started again"
	case "down":
		text = "down"
		if u.LastExit != "" {
			text += " (" + u.LastExit + ")"
		}
	}
	d.events.say(u.Name, typeService, text)
}

// newLog opens the log of a unit that has none yet; else it returns nil.
func (d *Daemon) newLog(name string) *logs.Log {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.logs[name] != nil || name == "" || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") {
		return nil
	}
	l, err := logs.Open(filepath.Join(d.cfg.Runtime, "logs", name))
	if err != nil {
		d.cfg.Log.Error("log not opened", "service", name, "err", err.Error())
		return nil
	}
	l.Tap = d.tap(name)
	d.logs[name] = l
	return l
}

// readLog moves a unit's lines from its pipe, which PID 1 keeps, to its log until ctx is done.
func (d *Daemon) readLog(ctx context.Context, name string, l *logs.Log) {
	for ctx.Err() == nil {
		pipe, err := d.cfg.init.Logs(name)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { pipe.Close() })
			err = l.Copy(pipe, time.Now)
			stop()
			pipe.Close()
		}
		if ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
			d.cfg.Log.Warn("log reader ended", "service", name, "err", err.Error())
		}
		_ = pause(ctx, logPause) // the loop looks at ctx
	}
}
