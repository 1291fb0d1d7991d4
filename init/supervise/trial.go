package supervise

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// judgeLimit is how long nobody may judge a version on trial. updated judges every few seconds from a few seconds after its start on, which is an
// early one and waits for nothing but storaged's word on the slots.
const judgeLimit = 90 * time.Second

// maxReason bounds what is taken over from a file of storaged's, in bytes.
const maxReason = 300

// A Trial is a version that has to prove itself in this boot. The zero value is none.
type Trial struct {
	// Good is the file that ends it, Judged one that is written anew each time when updated has looked at the version.
	Good, Judged string
	// Locked is a file that is there while STATE is locked, with the reason as its text.
	Locked string

	mark time.Time // Judged's own time, when it was looked at last
	seen time.Time // when it was seen to change
	left string    // why PID 1 leaves the version
}

// Try makes this boot one of a version on trial: it has to be judged, until that makes it a good one. That the judge is up is not enough: it may wait for
// a storaged that crashes again and again, and then nobody would ever leave this version.
func (s *Supervisor) Try(t Trial) { s.trial, s.trial.seen = t, time.Now() }

// guard orders a restart if nobody judges a version on trial: the boot loader then counts one try less, or takes the old version.
func (s *Supervisor) guard(now time.Time) {
	t := &s.trial
	if t.Good == "" || s.order != 0 {
		return
	}
	if fi, err := os.Stat(t.Judged); err == nil && !fi.ModTime().Equal(t.mark) {
		t.mark, t.seen = fi.ModTime(), now
	}
	if now.Sub(t.seen) < judgeLimit {
		return
	}
	if t.good() {
		*t = Trial{}
		return
	}
	t.left = "nobody has judged it for " + console.Seconds(judgeLimit)
	s.order = initctl.Reboot
}

func (t Trial) good() bool {
	_, err := os.Stat(t.Good)
	return err == nil
}

// LastWords is what the next boot must know of this one and would find nowhere: why a version on trial is left that nobody judges, or one without STATE, where
// updated would have written it. It is "" in every other case. Who has it lets the kernel panic with it instead of restarting: then it is kept.
func (s *Supervisor) LastWords() string {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return ""
	}
	return s.lastWords(console.Mounts(text))
}

func (s *Supervisor) lastWords(mounts []console.Mount) string {
	t := s.trial
	if t.Good == "" || s.order != initctl.Reboot || t.good() {
		return ""
	}
	state := false
	for _, m := range mounts {
		state = state || m.Point == unit.StateDir && strings.HasPrefix(m.Source, "/dev/") && m.FS != "squashfs" // the image's own folder is mounted on itself
	}
	why := t.left
	if locked, err := os.ReadFile(t.Locked); err == nil {
		line, _, _ := strings.Cut(strings.TrimSpace(string(locked)), "\n")
		why = "STATE does not open: " + line[:min(len(line), maxReason)]
	} else if why == "" && !state {
		why = "STATE was not mounted"
	}
	if why == "" {
		return ""
	}
	for _, v := range s.units {
		if v.failures > 1 {
			why += "; " + v.Name + " failed " + strconv.Itoa(v.failures) + " times in a row: " + v.record().Ending()
		}
	}
	return "cannot keep this version: " + why
}
