package machined

import (
	"context"
	"log/slog"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a machined, over a model of the node, as every caller.
func FuzzCalls(f *testing.F) {
	s, n := testrpc.Listen(f), newNode(f)
	n.host.mounted = true
	d, stop := n.start()
	f.Cleanup(stop)
	env := daemon.Env{Name: "machined", Log: slog.New(slog.DiscardHandler), Listen: s, Ready: func() {}, Metrics: metrics.New("machined"), Who: s.Who}
	s.Fuzz(f, func(ctx context.Context) error { return daemon.Serve(ctx, env, callers, d.Register) }, callers,
		"machine.v1.Machine", "machine.v1.Trial", "config.v1.Config")
}
