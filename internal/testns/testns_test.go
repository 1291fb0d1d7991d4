package testns

import (
	"os"
	"testing"

	"github.com/vishvananda/netlink"
)

func links(t *testing.T) int {
	t.Helper()
	l, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func current(t *testing.T) string {
	t.Helper()
	ns, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func TestNew(t *testing.T) {
	before := current(t)
	t.Run("inside", func(t *testing.T) {
		New(t)
		if current(t) == before {
			t.Error("still in the network namespace of before")
		}
		if n := links(t); n != 1 {
			t.Errorf("a new namespace has %d links, want lo only", n)
		}
		other := Other(t)
		here := current(t)
		In(t, other, func() {
			if current(t) == here || current(t) == before {
				t.Error("In did not move the thread")
			}
		})
	})
}

func TestIsolate(t *testing.T) {
	host := current(t)
	if os.Getenv(inside) == "" {
		t.Setenv("BULKHEAD_TESTNS_HOST", host)
	}
	if !Isolate(t) {
		return
	}
	seen := make(chan string)
	go func() { seen <- current(t) }()
	if got := <-seen; got == os.Getenv("BULKHEAD_TESTNS_HOST") {
		t.Errorf("a goroutine of the isolated process is in %s, the host's", got)
	}
	if n := links(t); n != 1 {
		t.Errorf("a new namespace has %d links, want lo only", n)
	}
}
