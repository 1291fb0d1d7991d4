// Package testns gives a test a network of its own. What a test does in it, the host never sees.
//
// New is for code that stays on one thread. Isolate is for everything else: goroutines run on any thread, and a daemon's
// would find themselves in the host's network.
package testns

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inside marks the process that Isolate starts.
const inside = "BULKHEAD_TESTNS"

// Root skips the test if it is not run by root; with REQUIRE_ROOT=1 it fails instead, so that a layer that did not run does not look green.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatal("REQUIRE_ROOT=1, but the test is not run by root")
	}
	t.Skip("needs root, to make a network namespace")
}

// New moves the test's goroutine, locked to its thread, into a new and empty network namespace until the test ends. Other
// goroutines stay where they are; programs that the test's goroutine starts are in the namespace.
func New(t testing.TB) netns.NsHandle {
	t.Helper()
	Root(t)
	runtime.LockOSThread()
	host, err := netns.Get()
	if err != nil {
		t.Fatalf("get network namespace: %v", err)
	}
	ns, err := netns.New() // moves the thread into it
	if err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		err := netns.Set(host)
		if err = errors.Join(err, ns.Close(), host.Close()); err != nil {
			t.Errorf("leave network namespace: %v", err)
			return // still locked: Go ends the thread with the goroutine
		}
		runtime.UnlockOSThread()
	})
	return ns
}

// Other makes one more empty network namespace, for the other side of a cable. The thread stays where it is.
func Other(t testing.TB) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	if err != nil {
		t.Fatalf("get network namespace: %v", err)
	}
	other, err := netns.New()
	if err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	if err := errors.Join(netns.Set(here), here.Close()); err != nil {
		t.Fatalf("return to the network namespace: %v", err)
	}
	t.Cleanup(func() { _ = other.Close() }) // closed twice at worst
	return other
}

// In runs f on its own thread in a network namespace and waits for it. Sockets that f opens stay there.
func In(t testing.TB, ns netns.NsHandle, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: Go ends the thread with the goroutine
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		f()
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatalf("enter network namespace: %v", err)
	}
}

// Isolate runs the calling test again in a process of its own, all of whose threads are in a new network namespace. It
// returns true in that process; in the first one it takes over the outcome and returns false, and the test must return.
// The loopback interface is down there. Call it first, from the function of a test, not of a subtest.
func Isolate(t *testing.T) bool {
	t.Helper()
	Root(t)
	if os.Getenv(inside) == t.Name() {
		return true
	}
	runtime.LockOSThread() // Pdeathsig is about the thread that started the process
	defer runtime.UnlockOSThread()
	args := []string{"-test.run=^" + regexp.QuoteMeta(t.Name()) + "$", "-test.v=true", "-test.count=1"}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	switch {
	case err != nil:
		t.Errorf("in its own network namespace: %v\n%s", err, text)
	case strings.Contains(text, "--- SKIP"):
		t.Skip(text)
	case !strings.Contains(text, "--- PASS: "+t.Name()):
		t.Errorf("the test did not run in its own network namespace:\n%s", text)
	default:
		t.Log(text)
	}
	return false
}
