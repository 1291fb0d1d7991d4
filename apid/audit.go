package apid

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"google.golang.org/grpc/codes"

	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Refused calls come from strangers at any rate: so many lines a second, and so many at once. Few, for they share the log with
// the calls that were let in, and must not push those out of it.
const (
	refusedRate  = 0.1
	refusedBurst = 20
)

// maxWhy bounds why a call was refused, in bytes.
const maxWhy = 300

// tellStrange makes an event of credentials that are not good here: of another cluster, expired, revoked, or of a node that was removed. Callers who show none are
// too many, and are told of in figures only. It is for calls that have an audit line: strangers must not fill the log.
func (d *Daemon) tellStrange(c *call, err error) {
	what, about, text := "certificate", errs.Text(err), errs.Text(err)
	if c.byToken {
		what = "token"
	}
	switch {
	case err == errStranger:
		about, text = "foreign "+what, "it is of another cluster, or was made up"
	case c.byToken && c.who.name == "": // what it says is not proved
		about = "bad token"
	}
	by := ""
	if c.who.name != "" {
		by = fmt.Sprintf(" of %.100q", c.who.name)
	}
	daemon.Tell(d.log, daemon.EventAccess, about, fmt.Sprintf("a %s%s was shown at %.60s and refused: %s", what, by, c.peer, text))
}

// auditor writes one line for each call that changes something or gives out a secret.
type auditor struct {
	log   *slog.Logger
	now   func() time.Time
	count figures

	mu     sync.Mutex
	tokens float64         // guarded by mu; lines about refused calls that may be written
	at     time.Time       // guarded by mu
	runs   map[source]*run // guarded by mu; at most maxRuns
}

// Nodes call what is routine again and again, and while something is wrong, as during a boot, they fail alike: of such a run the first is written, and how many there were
// with the next line about that caller, in ten minutes at the latest if it goes on.
const (
	runTime = 10 * time.Minute
	maxRuns = 256 // of more callers at once every line is written
)

// source is whose routine calls are one run.
type source struct{ who, address, target, via string }

// run are failures with one code.
type run struct {
	code codes.Code
	at   time.Time // of its last line
	more int       // since then
}

// news reports whether the outcome of a routine call is to be written, and how many failures like the one before were not.
func (a *auditor) news(c *call, target string, code codes.Code) (more int, is bool) {
	who, now := source{c.who.name, cmp.Or(addressOf(c.peer), c.peer), target, c.via}, a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.runs[who]
	if r != nil {
		if code != codes.OK && code == r.code && now.Sub(r.at).Abs() < runTime {
			r.more++
			return 0, false
		}
		more = r.more
	}
	delete(a.runs, who)
	if code == codes.OK {
		return more, more > 0
	}
	if len(a.runs) >= maxRuns {
		maps.DeleteFunc(a.runs, func(_ source, r *run) bool { return now.Sub(r.at).Abs() >= runTime })
	}
	if len(a.runs) < maxRuns {
		a.runs[who] = &run{code: code, at: now}
	}
	return more, true
}

func newAuditor(log *slog.Logger, now func() time.Time, count figures) *auditor {
	return &auditor{log: log, now: now, count: count, tokens: refusedBurst, at: now(), runs: map[source]*run{}}
}

// write is called before the client has the answer. machined keeps the lines as a chain, each with the hash of the one before: it is not this process that could
// change one later. refused says that the call was not let in, or that what it was to prove was wrong.
// It reports whether it wrote the line.
func (a *auditor) write(c *call, node string, err error, refused bool) bool {
	code, more, target := codeOf(err), 0, ""
	if c.aim.node != nil {
		target = c.aim.node.GetName()
	}
	if c.aim.any {
		target = peer.ControlPlanes
	}
	if c.route != nil && c.route.routine() {
		var is bool
		if more, is = a.news(c, target, code); !is {
			return false
		}
	}
	if refused && !a.take() {
		a.count.auditDropped.Add(1)
		return false
	}
	line := []any{"who", c.who.name, "roles", strings.Join(c.who.roles, ","), "method", c.method, "peer", c.peer, "node", node,
		"code", code.String(), "dur", a.now().Sub(c.start).String(),
		"change", c.route != nil && !c.route.reads}
	if c.via != "" {
		line = append(line, "via", c.via) // the node that passed it on; its log has the same call with this node as target
	}
	if target != "" {
		line = append(line, "target", target)
	}
	if more > 0 {
		line = append(line, "repeated", more)
	}
	if why := errs.Text(err); refused && err != nil { // of calls that were let in it is not told: an answer may quote what was sent
		line = append(line, "why", why[:min(len(why), maxWhy)])
	}
	a.log.Info("audit", line...)
	return true
}

func (a *auditor) take() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	a.tokens = min(refusedBurst, a.tokens+max(0, now.Sub(a.at).Seconds())*refusedRate) // a clock that is set back must not take what there is
	a.at = now
	if a.tokens < 1 {
		return false
	}
	a.tokens--
	return true
}
