package supervise

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/init/console"
	"github.com/bulkhead-os/bulkhead/internal/initctl"
	"github.com/bulkhead-os/bulkhead/internal/unit"
)

func aTrial(t *testing.T) Trial {
	dir := t.TempDir()
	return Trial{Good: filepath.Join(dir, "good"), Judged: filepath.Join(dir, "judged"), Locked: filepath.Join(dir, "locked")}
}

func write(t *testing.T, path, text string, at time.Time) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

// A version on trial that nobody judges is left; one that is judged, was found good, or is not on trial, is not.
func TestGuard(t *testing.T) {
	judge := &service{Unit: &unit.Unit{Name: "updated"}, state: Up}
	s := &Supervisor{units: []*service{judge}}
	start := time.Now()
	at := func(after time.Duration) initctl.Verb { s.guard(start.Add(after)); return s.order }
	if at(time.Hour) != 0 {
		t.Error("restart, though no version is on trial")
	}
	trial := aTrial(t)
	s.Try(trial)
	if at(judgeLimit-time.Second) != 0 {
		t.Error("restart too early")
	}
	for m := range 60 { // with a clock that stands, and one that was set back
		write(t, trial.Judged, "", time.Unix(int64(1000-m), 0))
		if at(time.Duration(m)*time.Minute) != 0 {
			t.Fatal("restart, though it is judged")
		}
	}
	if at(59*time.Minute+judgeLimit-time.Second) != 0 {
		t.Error("restart, though it was judged a moment ago")
	}
	if at(59*time.Minute+judgeLimit) != initctl.Reboot {
		t.Error("no restart, though nobody judges any more: that the judge is up is not enough")
	}
	s.order = 0
	write(t, trial.Good, "", start)
	if at(10*time.Hour) != 0 || at(20*time.Hour) != 0 {
		t.Error("restart of a version that was found good")
	}
}

// What nobody could write to STATE goes into the kernel's record; what updated has written there does not.
func TestLastWords(t *testing.T) {
	bare := []console.Mount{{Point: "/", FS: "squashfs", Source: "/dev/dm-0"}, {Point: "/state", FS: "squashfs", Source: "/dev/dm-0"}}
	mounted := append(bare[:2:2], console.Mount{Point: "/state", FS: "ext4", Source: "/dev/mapper/x"})
	for _, c := range []struct {
		what   string
		mounts []console.Mount
		set    func(*Supervisor)
		want   string
	}{
		{"left by updated, which wrote why", mounted, nil, ""},
		{"no STATE", bare, nil, "cannot keep this version: STATE was not mounted"},
		{"a STATE that is locked", bare, func(s *Supervisor) { write(t, s.trial.Locked, "tpm: the image was changed\n", time.Now()) },
			"cannot keep this version: STATE does not open: tpm: the image was changed"},
		{"a storaged that crashes", bare, func(s *Supervisor) {
			*s.units[1] = service{Unit: s.units[1].Unit, state: Waiting, failures: 12, end: initctl.Exited, value: 3}
		}, "cannot keep this version: STATE was not mounted; storaged failed 12 times in a row: exit 3"},
		{"not judged", mounted, func(s *Supervisor) { s.order = 0; s.guard(time.Now().Add(judgeLimit)) }, "cannot keep this version: nobody has judged it for 90 s"},
		{"good", bare, func(s *Supervisor) { write(t, s.trial.Good, "", time.Now()) }, ""},
		{"turned off", bare, func(s *Supervisor) { s.order = initctl.PowerOff }, ""},
		{"not on trial", bare, func(s *Supervisor) { s.trial = Trial{} }, ""},
		{"a reason without end", bare, func(s *Supervisor) { write(t, s.trial.Locked, strings.Repeat("x", 4000), time.Now()) },
			"cannot keep this version: STATE does not open: " + strings.Repeat("x", maxReason)},
	} {
		s := &Supervisor{units: []*service{{Unit: &unit.Unit{Name: "apid"}, state: Up}, {Unit: &unit.Unit{Name: "storaged"}, state: Up, end: initctl.Killed, value: uint8(unix.SIGKILL)}}, order: initctl.Reboot}
		s.Try(aTrial(t))
		if c.set != nil {
			c.set(s)
		}
		if got := s.lastWords(c.mounts); got != c.want {
			t.Errorf("%s: got %q, want %q", c.what, got, c.want)
		}
	}
}
