package storaged

import (
	"os"
	"slices"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a storaged, over a model of disks, as every caller.
func FuzzCalls(f *testing.F) {
	s, folder := testrpc.Listen(f), f.TempDir()
	d := newDaemon(Config{Env: s.Env("storaged")}, &fake{m: machine(imageDisk("/dev/vda", 8*gib))}, noVault(f.TempDir()), func(State) (*os.Root, error) { return os.OpenRoot(folder) })
	// Slots have a target of their own, with a disk in memory; what lies in the firmware is the machine's.
	served := slices.DeleteFunc(testrpc.Services("storaged", callers), func(service string) bool { return service == "slot.v1.Slots" || service == "storage.v1.SecureBoot" })
	s.Fuzz(f, d.Run, callers, served...)
}
