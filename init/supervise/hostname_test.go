package supervise

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// alone gives the test's thread host names of its own, which end with it.
func alone(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal("REQUIRE_ROOT=1, but the test is not run by root")
		}
		t.Skip("needs root, to make a UTS namespace")
	}
	runtime.LockOSThread() // and never unlocked: Go ends the thread with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
		t.Fatal(err)
	}
}

// The kernel has the name that networkd wrote, a new one too, and has it again when somebody else set another.
func TestHostname(t *testing.T) {
	alone(t)
	const owner = 104
	file := filepath.Join(t.TempDir(), "hostname")
	s := &Supervisor{feed: func() {}, report: func() {}}
	s.Name(Hostname{File: file, Owner: owner})
	now := time.Now()
	turn := func() string { // a second later
		now = now.Add(lookSeldom)
		s.timers(now)
		return kernelName()
	}
	replace := func(text string, user int) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(file+".new", user, user); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Sethostname([]byte("(none)")); err != nil {
		t.Fatal(err)
	}
	if got := turn(); got != "(none)" {
		t.Errorf("before networkd wrote one: %q", got)
	}
	replace("cp-1.example\n", owner)
	if got := turn(); got != "cp-1.example" {
		t.Errorf("after networkd wrote it: %q", got)
	}
	replace("cp-2", owner)
	if got := turn(); got != "cp-2" {
		t.Errorf("after the document changed: %q", got)
	}
	if err := unix.Sethostname([]byte("evil")); err != nil {
		t.Fatal(err)
	}
	if got := turn(); got != "cp-2" {
		t.Errorf("after a pod set it: %q", got)
	}
	for _, bad := range []string{"", "\n", "A", "a b", "a\nb\n", "-a", "a.", "(none)", strings.Repeat("a", 64), strings.Repeat("a", 4000), "a\x00"} {
		replace(bad, owner)
		if got := turn(); got != "cp-2" {
			t.Errorf("%.70q became %q", bad, got)
		}
	}
	replace("other", owner+1)
	if got := turn(); got != "cp-2" {
		t.Errorf("another user's file became %q", got)
	}
	replace("linked", owner)
	if err := os.Rename(file, file+".target"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file+".target", file); err != nil {
		t.Fatal(err)
	}
	if got := turn(); got != "cp-2" {
		t.Errorf("a link was followed: %q", got)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(file, 0o644); err != nil { // reading it would hang
		t.Fatal(err)
	}
	if got := turn(); got != "cp-2" {
		t.Errorf("a pipe became %q", got)
	}
	longest := strings.Repeat("a", maxName)
	replace(longest+"\n", owner)
	if got := turn(); got != longest {
		t.Errorf("the longest name became %q", got)
	}
}
