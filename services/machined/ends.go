package machined

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

// lately is how long ago a unit ended without anybody's wish for why to mention it although it is up again.
const lately = 5 * time.Minute

// An ending is how a unit ended last without anybody's wish.
type ending struct {
	Restarts uint32 // of the unit, by which one is told from the next
	Exit     string
	At       time.Time
}

// next is the ending after news of the unit. It is pure.
func (e ending) next(u initctl.Status) ending {
	if u.Restarts == e.Restarts {
		return e
	}
	at := u.Since
	if u.Restarts < e.Restarts { // another boot; its folder is another one, too
		at = time.Time{}
	}
	return ending{Restarts: u.Restarts, Exit: u.LastExit, At: at}
}

func mebibytes(n uint64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// endsFile keeps the endings over machined's own.
func (d *Daemon) endsFile() string { return filepath.Join(d.cfg.Runtime, "ends") }

// loadEnds reads what an earlier process knew. It is worth a warning, and no more: the next end is known again.
func (d *Daemon) loadEnds() {
	d.ends = map[string]ending{}
	text, err := os.ReadFile(d.endsFile())
	if err == nil {
		err = json.Unmarshal(text, &d.ends)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.cfg.Log.Warn("ends of units not read", "err", err.Error())
		d.ends = map[string]ending{}
	}
}

// noteEnd takes note of how a unit ended, and returns its last exit with the reason. mu is held.
func (d *Daemon) noteEnd(u initctl.Status) string {
	was := d.ends[u.Name]
	e := was.next(u)
	if e == was {
		return d.exitOf(u.Name, u.LastExit)
	}
	d.ends[u.Name] = e
	text, err := json.Marshal(d.ends)
	if err == nil {
		err = os.WriteFile(d.endsFile(), text, 0o600)
	}
	if err != nil {
		d.cfg.Log.Warn("end of a unit not kept", "service", u.Name, "err", err.Error())
	}
	return d.exitOf(u.Name, u.LastExit)
}

// exitOf is how a unit ended last, and why: what the kernel says of it, or its limit. mu is held.
func (d *Daemon) exitOf(name, exit string) string {
	if n := d.denied[name]; n.call != "" && strings.HasPrefix(exit, deniedSignal) {
		return deniedSignal + ": it tried the system call " + n.call + ", which its unit does not allow"
	}
	if limit := d.cfg.host.MemoryLimit(name); exit == initctl.MemoryLimit && limit > 0 {
		return exit + " of " + mebibytes(limit)
	}
	return exit
}

// units asks PID 1 for its units; last exits have their reasons.
func (d *Daemon) units() ([]initctl.Status, error) {
	units, err := d.cfg.init.Status()
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, u := range units {
		units[i].LastExit = d.noteEnd(u)
	}
	return units, err
}

// endedLately says how a unit ended that is up again; "" if that is long ago, or never was. mu is held.
func (d *Daemon) endedLately(u initctl.Status, now time.Time) string {
	e := d.ends[u.Name]
	if u.State != "up" || e.At.IsZero() || now.Sub(e.At) > lately || e.Exit == "" {
		return ""
	}
	return "it ended (" + d.exitOf(u.Name, e.Exit) + ") and was started again"
}
