package machined

import (
	"context"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a machined, over a model of the node, as every caller.
func FuzzCalls(f *testing.F) {
	s, n := testrpc.Listen(f), newNode(f)
	n.host.mounted = true
	d, stop := n.start()
	f.Cleanup(stop)
	env := s.Env("machined")
	s.Fuzz(f, func(ctx context.Context) error { return daemon.Serve(ctx, env, callers, d.Register) }, callers)
}
