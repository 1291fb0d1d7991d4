package updated

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of an updated between its fakes, as every caller. No name is looked up: an address in a message is nobody's.
func FuzzCalls(f *testing.F) {
	resolver := net.DefaultResolver
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no names here") }}
	f.Cleanup(func() { net.DefaultResolver = resolver })
	s, b := testrpc.Listen(f), newBench(f)
	b.restarts = make(chan struct{}, 1<<20)
	d, closeFakes := b.make(s.Env("updated"))
	f.Cleanup(closeFakes)
	s.Fuzz(f, d.Run, callers)
}
