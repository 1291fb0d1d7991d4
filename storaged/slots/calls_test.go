package slots

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// FuzzCalls sends random messages to every method of the slots of a disk in memory that has a version, as every caller. There is a medium, with nothing on it.
func FuzzCalls(f *testing.F) {
	s, dir := testrpc.Listen(f), f.TempDir()
	for _, folder := range []string{"sys/class/block/sda", "sys/class/block/sdb", "dev", "proc"} {
		must(f, os.MkdirAll(filepath.Join(dir, folder), 0o755))
	}
	must(f, os.WriteFile(filepath.Join(dir, "dev/sdb"), make([]byte, 1<<20), 0o600))
	one := makeVersion(f, "0.1.0")
	disk, _ := install(f, one)
	table, err := disk.table()
	must(f, err)
	sda, err := os.Create(filepath.Join(dir, "dev/sda")) // the same, as far as media are told from it
	must(f, err)
	f.Cleanup(func() { sda.Close() })
	must(f, sda.Truncate(disk.device.Size()))
	must(f, table.WriteTo(sda, disk.device.Size()))
	must(f, os.WriteFile(filepath.Join(dir, "proc/cmdline"), []byte("bulkhead bulkhead.verity="+hexOf(one.root)+" bulkhead.epoch=2\n"), 0o600))
	service := &Server{Store: newStore(disk, "0.1.0"), Linux: &Linux{sys: dir + "/sys", dev: dir + "/dev", proc: dir + "/proc", system: func() string { return "" }}}
	s.Fuzz(f, func(ctx context.Context) error {
		return daemon.Serve(ctx, s.Env("storaged"), peer.List{slotv1.Slots_ServiceDesc.ServiceName: {uid.Updated}}, func(g *grpc.Server) { slotv1.RegisterSlotsServer(g, service) })
	}, peer.List{slotv1.Slots_ServiceDesc.ServiceName: {uid.Updated}}, slotv1.Slots_ServiceDesc.ServiceName)
}
