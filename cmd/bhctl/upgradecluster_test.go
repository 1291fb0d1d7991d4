package main

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/peer"
)

// fakeUpdate is updated of each node: what it got, and what lies ready there.
type fakeUpdate struct {
	updatev1.UnimplementedUpdateServer

	mu    sync.Mutex
	ready map[string]string // guarded by mu; by node: a version
	runs  map[string]string // guarded by mu
	sent  map[string]int    // guarded by mu; bytes
	full  string            // guarded by mu; a node without room
}

func nodeIn(ctx context.Context) string {
	md, _ := metadata.FromIncomingContext(ctx)
	return strings.Join(md.Get(peer.NodeKey), ",")
}

func (f *fakeUpdate) GetStatus(ctx context.Context, _ *updatev1.GetStatusRequest) (*updatev1.Status, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := nodeIn(ctx)
	runs := f.runs[n]
	if runs == "" {
		runs = "0.1.0"
	}
	st := &updatev1.Status{Slots: []*updatev1.Slot{{Name: "A", Version: runs, Status: "good", Running: true, Next: f.ready[n] == ""}}}
	if f.ready[n] != "" {
		st.Slots = append(st.Slots, &updatev1.Slot{Name: "B", Version: f.ready[n], Status: "on trial", Next: true})
	}
	return st, nil
}

func (f *fakeUpdate) Upload(s grpc.BidiStreamingServer[updatev1.UploadRequest, updatev1.UploadResponse]) error {
	n := nodeIn(s.Context())
	m, err := s.Recv()
	if err != nil {
		return err
	}
	parsed, err := bundle.Parse(m.GetManifest())
	if err != nil {
		return err
	}
	f.mu.Lock()
	full := f.full == n
	f.mu.Unlock()
	if full {
		return errs.New(errs.Precondition, "0.2.0 is too large")
	}
	if err := s.Send(&updatev1.UploadResponse{Want: &updatev1.Piece{File: bundle.RootName, Offset: 1, Length: 1000}}); err != nil {
		return err
	}
	if m, err = s.Recv(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent[n] += len(m.GetData())
	f.ready[n] = parsed.Version
	return s.Send(&updatev1.UploadResponse{Progress: &updatev1.UpgradeProgress{Step: "done", Version: parsed.Version}})
}

func (f *fakeUpdate) Upgrade(r *updatev1.UpgradeRequest, s grpc.ServerStreamingServer[updatev1.UpgradeProgress]) error {
	n := nodeIn(s.Context())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.runs[n] == "0.3.0" {
		return errs.New(errs.Precondition, "0.3.0 runs already")
	}
	f.ready[n] = "0.3.0"
	return s.Send(&updatev1.UpgradeProgress{Step: "done", Version: "0.3.0"})
}

// All nodes get the image before one restarts; then the cluster is told the version, and the rest is its business.
func TestUpgradeCluster(t *testing.T) {
	f, c := startFake(t)
	f.update.ready, f.update.runs, f.update.sent = map[string]string{}, map[string]string{}, map[string]int{}
	config := filepath.Join(t.TempDir(), "contexts.yaml")
	writeContexts(t, config, c)
	t.Setenv("BHCONFIG", config)
	image, _, _, _ := localFiles(t)
	run := func(args ...string) (string, error) {
		var out bytes.Buffer
		a := &app{in: strings.NewReader(""), out: &out, err: &out, args: args}
		root := a.root()
		root.SetArgs(args)
		root.SetErr(&out)
		err := root.ExecuteContext(t.Context())
		return out.String(), err
	}
	state := func() (kind, version string) {
		f.rolling.mu.Lock()
		defer f.rolling.mu.Unlock()
		return f.rolling.now.GetKind(), f.rolling.now.GetVersion()
	}
	f.update.mu.Lock()
	f.update.full = "n3"
	f.update.mu.Unlock()
	out, err := run("upgrade", "--cluster", "--image", image, "--detach")
	if err == nil || !strings.Contains(err.Error(), "none was restarted") || !strings.Contains(err.Error(), "n3: 0.2.0 is too large") {
		t.Errorf("a node without room: %v\n%s", err, out)
	}
	if kind, _ := state(); kind != "" {
		t.Errorf("a %s was ordered though a node has no image", kind)
	}
	f.update.mu.Lock()
	f.update.full = ""
	f.update.mu.Unlock()
	out, err = run("upgrade", "--cluster", "--image", image, "--detach")
	if err != nil || !strings.Contains(out, "n1  0.2.0 lies ready already") || !strings.Contains(out, "rolling upgrade to 0.2.0 abc goes on in the cluster") {
		t.Errorf("the same again: %v\n%s", err, out)
	}
	if kind, version := state(); kind != "upgrade" || version != "0.2.0" {
		t.Errorf("ordered: %s to %s", kind, version)
	}
	if got := fmt.Sprint(f.update.sent); got != "map[n1:1000 n3:1000]" {
		t.Errorf("sent: %s, want each node once", got)
	}
	// It halted, a node got the image again: the same command goes on with it.
	f.rolling.mu.Lock()
	f.rolling.now.State = "halted"
	f.rolling.mu.Unlock()
	if out, err = run("upgrade", "--cluster", "--image", image, "--detach"); err != nil || !strings.Contains(out, "rolling upgrade to 0.2.0 abc goes on") {
		t.Errorf("after it halted: %v\n%s", err, out)
	}
	f.rolling.mu.Lock()
	f.rolling.now.State = "done"
	f.rolling.mu.Unlock()
	// Fetched by the nodes; one of them has it.
	f.update.mu.Lock()
	f.update.runs["n1"], f.update.ready = "0.3.0", map[string]string{}
	f.update.mu.Unlock()
	if out, err = run("upgrade", "--cluster", "--image", "registry.example.org/bulkhead:0.3.0", "--no-reboot"); err != nil || !strings.Contains(out, "0.3.0 lies ready on n1, n3") {
		t.Errorf("from a registry: %v\n%s", err, out)
	}
	for _, bad := range []struct {
		args []string
		want string
	}{
		{[]string{"--media", "auto"}, "a device of one node"},
		{[]string{"--image", image, "--only", "n7"}, `no node "n7" is registered`},
		{[]string{"--image", image, "--wait", "1m"}, "give --node-timeout"},
		{nil, "name what to install"},
	} {
		if _, err := run(slices.Concat([]string{"upgrade", "--cluster"}, bad.args)...); err == nil || !strings.Contains(err.Error(), bad.want) {
			t.Errorf("%v: %v, want %q", bad.args, err, bad.want)
		}
	}
}
