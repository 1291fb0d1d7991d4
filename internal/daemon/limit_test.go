package daemon

import (
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// One user takes no more than his part of the places: the next one gets in, and his own next connection when one of his has ended.
func TestLimit(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var who atomic.Uint32
	l := Limit(inner, 4, 2, func(net.Conn) (uid.ID, error) { return uid.ID(who.Load()), nil })
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func(as uid.ID) net.Conn {
		who.Store(uint32(as))
		c, err := net.Dial("unix", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	take := func(what string) net.Conn {
		select {
		case c := <-accepted:
			return c
		case <-time.After(10 * time.Second):
			t.Fatalf("%s is not let in", what)
			return nil
		}
	}
	refused := func(what string, c net.Conn) {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: %v, want it closed", what, err)
		}
	}
	dial(uid.Updated)
	first := take("the first")
	dial(uid.Updated)
	take("the second")
	for range 10 {
		refused("one more of the same user", dial(uid.Updated))
	}
	dial(uid.Machined)
	take("another user")
	first.Close()
	first.Close() // is one end
	dial(uid.Updated)
	take("the first user again")
	refused("and once more", dial(uid.Updated))
}
