package supervise

import (
	"os"
	"slices"
	"time"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
)

const (
	// judge is the unit that finds out whether a version on trial is good, and restarts the machine if it is not. If it does not run itself,
	// nobody else would.
	judge      = "updated"
	judgeLimit = 10 * time.Minute // that it may be gone
	judgeLife  = 10 * time.Second // that it must be up to count
)

// Try makes this boot one of a version on trial: it has to run the unit that judges it, until that makes the file good.
func (s *Supervisor) Try(good string) { s.trial, s.judged = good, time.Now() }

// guard orders a restart if nobody judges a version on trial: the boot loader then counts one try less, or takes the old version.
func (s *Supervisor) guard(now time.Time) {
	if s.trial == "" || s.order != 0 {
		return
	}
	if slices.ContainsFunc(s.units, func(v *service) bool { return v.Name == judge && v.state == Up && now.Sub(v.up) >= judgeLife }) {
		s.judged = now
	}
	if now.Sub(s.judged) < judgeLimit {
		return
	}
	if _, err := os.Stat(s.trial); err == nil {
		s.trial = ""
		return
	}
	console.Say("bulkhead: this version is on trial, and ", judge, ", which judges it, was gone for ", console.Seconds(judgeLimit), ": restart")
	s.order = initctl.Reboot
}
