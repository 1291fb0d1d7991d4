package trustd

import (
	"context"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of a trustd that has an owner and keys, as every caller.
func FuzzCalls(f *testing.F) {
	m, s := newMachine(f), testrpc.Listen(f)
	m.mountState()
	m.cfg.Env = s.Env("trustd")
	m.cfg.Socket = func(name string) string { return m.cfg.StateDir + "/none-" + name }
	d, err := New(m.cfg)
	m.must(err)
	s.Fuzz(f, func(ctx context.Context) error { return d.Run(ctx) }, Callers())
}
