package supervise

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

// A version on trial that nobody judges is left; one that is judged, was found good, or is not on trial, is not.
func TestGuard(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good")
	v := &service{Unit: &unit.Unit{Name: judge}}
	s := &Supervisor{units: []*service{{Unit: &unit.Unit{Name: "apid"}, state: Up}, v}}
	start := time.Now()
	at := func(after time.Duration) initctl.Verb { s.guard(start.Add(after)); return s.order }
	if at(time.Hour) != 0 {
		t.Error("restart, though no version is on trial")
	}
	s.Try(good)
	if at(judgeLimit-time.Second) != 0 {
		t.Error("restart too early")
	}
	v.state, v.up = Up, start.Add(9*time.Minute)
	if at(judgeLimit-time.Second) != 0 { // up for nearly a minute
		t.Error("restart, though it is judged")
	}
	v.state = Waiting
	if at(judgeLimit+time.Second) != 0 {
		t.Error("restart, though it was judged a moment ago")
	}
	v.state = Up // for a moment again and again
	for m := range 11 {
		v.up = start.Add(judgeLimit + time.Duration(m)*time.Minute)
		at(judgeLimit + time.Duration(m)*time.Minute + time.Second)
	}
	if s.order != initctl.Reboot {
		t.Error("no restart, though the judge crashes again and again")
	}
	s.order = 0
	if err := os.WriteFile(good, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	v.state = Down
	if at(10*time.Hour) != 0 || at(20*time.Hour) != 0 {
		t.Error("restart of a version that was found good")
	}
}
