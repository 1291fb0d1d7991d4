package etcdd

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap/zapcore"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/latest"
	"github.com/bulkhead-os/bulkhead/internal/testca"
	"github.com/bulkhead-os/bulkhead/internal/testrpc"
)

// FuzzCalls sends random messages to every method of an etcdd whose member is a real one, the only one of its cluster, as every caller.
func FuzzCalls(f *testing.F) {
	s, ca, dir := testrpc.Listen(f), testca.New(f), f.TempDir()
	address := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			f.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	cfg := Config{Env: s.Env("etcdd"), DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Client: address(), Peer: address(), HTTP: address(),
		Addresses: func() ([]netip.Prefix, error) { return []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8")}, nil }}
	for _, folder := range []string{cfg.DataDir, cfg.RunDir} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			f.Fatal(err)
		}
	}
	var trust latest.Cell[*trustv1.TrustState]
	trust.Set(ca.State())
	cfg.Signer = signer{ca, &trust, nil}
	d, err := New(cfg)
	if err != nil {
		f.Fatal(err)
	}
	d.kernel.wait, d.kernel.tick = 2*time.Second, 50
	d.kernel.level.SetLevel(zapcore.FatalLevel)
	want, err := parse([]byte("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: n1\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\netcd: {snapshots: {every: 0, keep: 2}}\n"))
	if err != nil {
		f.Fatal(err)
	}
	if err := d.loop.Set(1, want); err != nil {
		f.Fatal(err)
	}
	s.Ready = func() bool { return d.loop.State().GetConverged() }
	s.Fuzz(f, func(ctx context.Context) error { return d.Run(ctx) }, callers)
}
