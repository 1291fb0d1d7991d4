package machined

import (
	"sync"
	"time"

	"github.com/bulkhead-os/bulkhead/services/machined/security"
)

// protectionAge is how long a good answer about the node's own protection counts. It is in dozens of files, each a way through Landlock's rules, which hardly ever
// change, while every question for the health wants to know. A bad answer does not count for later: a machine closes the last doors late in its boot.
const protectionAge = 10 * time.Second

// protection knows what is wrong with the node's own protection.
type protection struct {
	facts func() security.Facts

	mu   sync.Mutex
	good time.Time // guarded by mu; when nothing was wrong
}

// trouble is what is wrong, in words for people; "" if nothing is, or was within protectionAge.
func (p *protection) trouble() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.good) < protectionAge {
		return ""
	}
	text := security.Trouble(security.Report(p.facts()))
	if text == "" {
		p.good = time.Now()
	}
	return text
}
