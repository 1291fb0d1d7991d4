package storaged

import (
	"log/slog"
	"os"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a storaged, over a model of disks, as every caller.
func FuzzCalls(f *testing.F) {
	s, folder := testrpc.Listen(f), f.TempDir()
	d := newDaemon(Config{Env: daemon.Env{
		Name: "storaged", Log: slog.New(slog.DiscardHandler), Listen: s, Ready: func() {}, Metrics: metrics.New("storaged"), Who: s.Who,
	}}, &fake{m: machine(imageDisk("/dev/vda", 8*gib))}, noVault(f.TempDir()), func(State) (*os.Root, error) { return os.OpenRoot(folder) })
	s.Fuzz(f, d.Run, nil, "storage.v1.Storage", "storage.v1.Unlock", "slot.v1.Slots", "control.v1.Control")
}
