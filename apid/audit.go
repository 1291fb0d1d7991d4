package apid

import (
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// Refused calls come from strangers at any rate: so many lines a second, and so many at once. Few, for they share the log with
// the calls that were let in, and must not push those out of it.
const (
	refusedRate  = 0.1
	refusedBurst = 20
)

// auditor writes one line for each call that changes something or gives out a secret.
type auditor struct {
	log   *slog.Logger
	now   func() time.Time
	count figures

	mu     sync.Mutex
	tokens float64   // guarded by mu; lines about refused calls that may be written
	at     time.Time // guarded by mu
}

func newAuditor(log *slog.Logger, now func() time.Time, count figures) *auditor {
	return &auditor{log: log, now: now, count: count, tokens: refusedBurst, at: now()}
}

// write is called before the client has the answer. machined keeps the lines as a chain, each with the hash of the one before: it is not this process that could
// change one later. refused says that the call was not let in.
func (a *auditor) write(c *call, node string, err error, refused bool) {
	if refused && !a.take() {
		a.count.auditDropped.Add(1)
		return
	}
	line := []any{"who", c.who.name, "roles", strings.Join(c.who.roles, ","), "method", c.method, "peer", c.peer, "node", node,
		"code", codeOf(err).String(), "dur", a.now().Sub(c.start).String(),
		"change", c.route != nil && !c.route.reads}
	if c.via != "" {
		line = append(line, "via", c.via) // the node that passed it on; its log has the same call with this node as target
	}
	if c.aim.node != nil {
		line = append(line, "target", c.aim.node.GetName())
	}
	if c.aim.any {
		line = append(line, "target", peer.ControlPlanes)
	}
	a.log.Info("audit", line...)
}

func (a *auditor) take() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	a.tokens = min(refusedBurst, a.tokens+now.Sub(a.at).Seconds()*refusedRate)
	a.at = now
	if a.tokens < 1 {
		return false
	}
	a.tokens--
	return true
}
