package storaged

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

var probeEmpty = probe.Result{Kind: probe.Empty}

// fake is the model as a kernel.
type fake struct {
	mu sync.Mutex
	m  *model // guarded by mu
}

func (f *fake) Read(context.Context) (State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.m.clone().State, nil
}

func (f *fake) Do(_ context.Context, s Step) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.m.do(s)
}

func (f *fake) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return ctx.Err()
}

// serve runs a storaged on a model; callers are whom who says.
func serve(t *testing.T, m *model, caller uid.ID) *grpc.ClientConn {
	return serveKernel(t, &fake{m: m}, noVault(t.TempDir()), t.TempDir(), who(caller))
}

// who says that all callers are one.
func who(id uid.ID) func(net.Conn) (uid.ID, error) {
	return func(net.Conn) (uid.ID, error) { return id, nil }
}

// serveKernel runs a storaged on a kernel with a vault of its own; folder is storaged's on STATE.
func serveKernel(t *testing.T, k kernel, v *vault.Vault, folder string, who func(net.Conn) (uid.ID, error)) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	d := newDaemon(Config{Env: daemon.Env{
		Name: "storaged", Log: slog.New(slog.DiscardHandler), Listen: l, Ready: func() {}, Metrics: metrics.New("storaged"),
		Who: who,
	}}, k, v, func(State) (*os.Root, error) { return os.OpenRoot(folder) })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	conn, err := peer.Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	return conn
}

func TestControl(t *testing.T) {
	conn := serve(t, machine(imageDisk("/dev/vda", 8*gib)), uid.Machined)
	c := controlv1.NewControlClient(conn)
	spec := &controlv1.Spec{Generation: 7, Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Storage\nstateSize: 128MiB\n")}
	p, err := c.PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: spec})
	if err != nil || len(p.Steps) < 10 || p.Steps[1] != "gpt add STATE 128MiB on /dev/vda" {
		t.Fatalf("PlanSpec: %v, %v", p, err)
	}
	other := &controlv1.Spec{Generation: 7, Documents: []byte("apiVersion: bulkhead.dev/v1\nkind: Storage\ndisk: /dev/sda\n")}
	if _, err := c.PlanSpec(t.Context(), &controlv1.PlanSpecRequest{Spec: other}); !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "there is no disk /dev/sda") {
		t.Errorf("PlanSpec: %v", err)
	}
	if _, err := c.SetSpec(t.Context(), &controlv1.SetSpecRequest{Spec: spec}); err != nil {
		t.Fatal(err)
	}
	w, err := c.WatchState(t.Context(), &controlv1.WatchStateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		s, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if s.Generation == 0 && s.Converged {
			t.Fatal("converged without a spec")
		}
		if s.Generation == 7 && s.Converged {
			break
		}
	}
	m, err := c.ReadMetrics(t.Context(), &controlv1.ReadMetricsRequest{})
	if err != nil || len(m.Families) < 6 {
		t.Errorf("ReadMetrics: %v, %v", m, err)
	}
	if _, err := storagev1.NewStorageClient(conn).GetStatus(t.Context(), &storagev1.GetStatusRequest{}); !errs.Is(err, errs.Denied) {
		t.Errorf("machined reads the status: %v", err)
	}
}

// Before there is a spec, the status shows what is there, and volumes of an earlier boot are mounted.
func TestStatus(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	m.boot()
	c := storagev1.NewStorageClient(serve(t, m, uid.Apid))
	w, err := c.WatchStatus(t.Context(), &storagev1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for {
		s, err := w.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Volumes) == 2 && s.Volumes[0].State == "mounted" && s.Volumes[1].State == "mounted" {
			break
		}
	}
	s, err := c.GetStatus(t.Context(), &storagev1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Generation != 0 || s.Converged || len(s.Disks) != 1 || !s.Disks[0].System || s.Disks[0].Content != "gpt" || len(s.Partitions) != 6 {
		t.Errorf("got %v", s)
	}
	if p := s.Partitions[4]; p.Device != "/dev/vda5" || p.Label != "STATE" || p.SizeBytes != 64*mib {
		t.Errorf("got %v", p)
	}
}
