package machined

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/syscalls"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/services/machined/logs"
)

// A unit that makes a system call that it may not make is ended by the kernel, which writes a line of its audit to its log. PID 1 sees no more than the signal,
// so that both are brought together here.
const (
	deniedPrefix = "audit: type=1326 "
	deniedSignal = "killed by SIGSYS"
	x8664        = "c000003e" // AUDIT_ARCH_X86_64
	livesKept    = 4          // processes of a unit that are known
)

// denial is such a line.
type denial struct {
	pid     int
	user    uint32
	program string // as the kernel has it, short; whoever it was may have chosen it
	call    string // name and number
	ended   bool   // else it was only written down
}

// readDenial reads a line of the kernel's log; ok is false if it is another one. It is pure.
func readDenial(text string) (d denial, ok bool) {
	rest, ok := strings.CutPrefix(text, deniedPrefix)
	if !ok {
		return d, false
	}
	field := map[string]string{}
	for _, word := range strings.Fields(rest) {
		if key, value, ok := strings.Cut(word, "="); ok && field[key] == "" { // the first counts: a program's name comes late, and could hold blanks and fields
			field[key] = value
		}
	}
	pid, err := strconv.ParseUint(field["pid"], 10, 31)
	user, uerr := strconv.ParseUint(field["uid"], 10, 32)
	// What follows the program's name is looked for from the end.
	number, nerr := strconv.Atoi(after(rest, " syscall="))
	if err != nil || uerr != nil || nerr != nil {
		return d, false
	}
	d = denial{int(pid), uint32(user), strings.Trim(field["comm"], `"`), syscalls.Name(number), after(rest, " sig=") != "0"}
	if after(rest, " arch=") != x8664 {
		d.call = strconv.Itoa(number) + " of 32-bit programs"
	}
	return d, true
}

// after is the word behind the last key.
func after(text, key string) string {
	i := strings.LastIndex(text, key)
	if i < 0 {
		return ""
	}
	word, _, _ := strings.Cut(text[i+len(key):], " ")
	return word
}

// noteDenial tells what a unit was ended for. The process is known by its number; else, it may be one that the unit has started, or machined
// itself, the unit is that of its user. Those of pods are no event.
func (d *Daemon) noteDenial(l logs.Line) {
	n, ok := readDenial(l.Text)
	if !ok {
		return
	}
	d.mu.Lock()
	name := ""
	for u, pids := range d.lives {
		if slices.Contains(pids, n.pid) {
			name = u
		}
	}
	_, known := d.state[uid.ID(n.user).Name()]
	if name == "" && n.user != 0 && known {
		name = uid.ID(n.user).Name()
	}
	if name != "" && n.ended {
		d.denied[name] = denied{l.Time, n.call}
	}
	d.mu.Unlock()
	if name == "" {
		return
	}
	what := "and was ended"
	if !n.ended {
		what = "which was let pass"
	}
	d.events.say(name, typeService, "process "+strconv.Itoa(n.pid)+" ("+n.program+") tried the system call "+n.call+", which its unit does not allow, "+what)
}

// denied is what a unit was ended for last.
type denied struct {
	at   time.Time
	call string
}

// live notes the processes of a unit. mu is held.
func (d *Daemon) live(u initctl.Status) {
	if pids := d.lives[u.Name]; u.PID != 0 && !slices.Contains(pids, u.PID) {
		d.lives[u.Name] = append(pids[max(0, len(pids)+1-livesKept):], u.PID)
	}
}
