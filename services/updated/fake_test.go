package updated

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/daemon"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/metrics"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func trusted() (bundle.Keys, error) {
	return bundle.Keys{key(1).Public().(ed25519.PublicKey)}, nil
}

func noise(seed, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(b)
	return b
}

// testImage returns a bundle whose root has that many bytes.
func testImage(t testing.TB, version string, root int) (bundle.Head, []byte) {
	t.Helper()
	img := bundle.Image{Version: version, Architecture: architecture, Epoch: 1, RootHash: bundle.Sum([]byte(version))}
	for i, n := range []int{300_000, root, 8192} {
		img.Files[i] = filepath.Join(t.TempDir(), fmt.Sprint(i))
		must(t, os.WriteFile(img.Files[i], noise(i+1, n), 0o600))
	}
	var b bytes.Buffer
	h, err := bundle.Write(&b, img, key(1))
	must(t, err)
	return h, b.Bytes()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A fakeStorage is storaged as updated sees it: it takes chunks, and keeps account. It has what an earlier session brought.
type fakeStorage struct {
	slotv1.UnimplementedSlotsServer
	mu        sync.Mutex
	slots     *slotv1.GetResponse // guarded by mu
	m         bundle.Manifest     // guarded by mu
	session   uint64              // guarded by mu
	have      map[[2]int][]byte   // guarded by mu
	committed string              // guarded by mu
	marked    int                 // guarded by mu
	forget    int                 // guarded by mu; after so many writes it is started anew; 0: never
	writes    int                 // guarded by mu
	media     []byte
	broken    bool // it answers nothing about its slots
}

func (s *fakeStorage) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *fakeStorage) Get(context.Context, *slotv1.GetRequest) (*slotv1.GetResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return nil, errs.New(errs.Unavailable, "broken")
	}
	if s.slots == nil {
		return nil, errs.New(errs.Precondition, "this machine was not started by UEFI")
	}
	return proto.Clone(s.slots).(*slotv1.GetResponse), nil // it is sent after mu was let go
}

func (s *fakeStorage) Begin(r *slotv1.BeginRequest, out grpc.ServerStreamingServer[slotv1.BeginResponse]) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys, err := trusted()
	if err != nil {
		return err
	}
	m, err := keys.Verify(r.GetManifest(), r.GetSignature())
	if err != nil {
		return err
	}
	if m.Architecture != architecture {
		return errs.New(errs.Precondition, "%s is for another architecture", m.Version)
	}
	s.m = m
	s.session++
	if s.have == nil {
		s.have = map[[2]int][]byte{}
	}
	if err := out.Send(&slotv1.BeginResponse{Progress: &slotv1.Progress{Step: "compare", DoneBytes: 1, TotalBytes: 2}}); err != nil {
		return err
	}
	last := &slotv1.BeginResponse{Session: s.session}
	for i, f := range m.Files {
		for j := range f.Chunks {
			if s.have[[2]int{i, j}] == nil {
				last.Missing = append(last.Missing, &slotv1.Range{File: uint32(i), First: uint32(j), Count: 1})
			}
		}
	}
	return out.Send(last)
}

func (s *fakeStorage) WriteChunks(_ context.Context, r *slotv1.WriteChunksRequest) (*slotv1.WriteChunksResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writes++; s.forget > 0 && s.writes >= s.forget {
		s.forget, s.session = 0, s.session+100
	}
	if r.GetSession() != s.session {
		return nil, errs.New(errs.Conflict, "no upgrade %d is being written; begin again", r.GetSession())
	}
	if len(r.GetData()) > maxWrite {
		return nil, errs.New(errs.Invalid, "%d bytes at once", len(r.GetData()))
	}
	f, data := s.m.Files[r.GetFile()], r.GetData()
	for j := int(r.GetFirst()); len(data) > 0; j++ {
		n := f.Chunks[j].Size
		if err := f.Check(j, data[:min(n, len(data))]); err != nil {
			return nil, errs.New(errs.Invalid, "%w", err)
		}
		if s.have[[2]int{int(r.GetFile()), j}] != nil {
			return nil, errs.New(errs.Invalid, "chunk %d of %s was sent twice", j, f.Name)
		}
		s.have[[2]int{int(r.GetFile()), j}] = bytes.Clone(data[:n])
		data = data[n:]
	}
	return &slotv1.WriteChunksResponse{}, nil
}

func (s *fakeStorage) Commit(r *slotv1.CommitRequest, out grpc.ServerStreamingServer[slotv1.CommitResponse]) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.m.Files {
		if r.GetSession() != s.session || len(f.Chunks) == 0 {
			return errs.New(errs.Conflict, "begin again")
		}
		for j := range f.Chunks {
			if s.have[[2]int{i, j}] == nil {
				return errs.New(errs.Precondition, "chunk %d of %s is missing", j, f.Name)
			}
		}
	}
	s.committed = s.m.Version
	return errors.Join(out.Send(&slotv1.CommitResponse{Progress: &slotv1.Progress{Step: "verify", DoneBytes: 1, TotalBytes: 1}}), out.Send(&slotv1.CommitResponse{Version: s.m.Version}))
}

func (s *fakeStorage) Abort(context.Context, *slotv1.AbortRequest) (*slotv1.AbortResponse, error) {
	return &slotv1.AbortResponse{}, nil
}

func (s *fakeStorage) MarkGood(context.Context, *slotv1.MarkGoodRequest) (*slotv1.GetResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.marked++
	for _, v := range s.slots.Slots {
		if v.Running {
			v.Status, v.TriesLeft, v.TriesDone = "good", 0, 0
		}
	}
	return proto.Clone(s.slots).(*slotv1.GetResponse), nil // it is sent after mu was let go
}

func (s *fakeStorage) Rollback(context.Context, *slotv1.RollbackRequest) (*slotv1.RollbackResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &slotv1.RollbackResponse{Restart: true}
	for _, v := range s.slots.Slots {
		if v.Running && v.Status == "on trial" {
			v.Status = "given up"
		} else if !v.Running {
			out.Version = v.Version
		}
	}
	return out, nil
}

func (s *fakeStorage) FindMedia(context.Context, *slotv1.FindMediaRequest) (*slotv1.FindMediaResponse, error) {
	if s.media == nil {
		return &slotv1.FindMediaResponse{}, nil
	}
	return &slotv1.FindMediaResponse{Devices: []string{"/dev/sdb"}}, nil
}

func (s *fakeStorage) ReadMedia(_ context.Context, r *slotv1.ReadMediaRequest) (*slotv1.ReadMediaResponse, error) {
	if r.GetDevice() != "/dev/sdb" || r.GetLength() > maxWrite {
		return nil, errs.New(errs.NotFound, "%q, %d bytes", r.GetDevice(), r.GetLength())
	}
	at := min(int(r.GetOffset()), len(s.media))
	return &slotv1.ReadMediaResponse{Data: s.media[at:min(at+int(r.GetLength()), len(s.media))]}, nil
}

// A fakeMachine is machined as updated sees it.
type fakeMachine struct {
	machinev1.UnimplementedMachineServer
	mu     sync.Mutex
	checks []*machinev1.Check // guarded by mu
	events []string           // guarded by mu
	heard  chan string        // the same, one by one; what nobody takes in time is dropped
	boots  []*machinev1.Boot  // guarded by mu; nil: STATE is not open there yet
	panic  []string           // guarded by mu; the lines of boot 6's

	reboots int // guarded by mu
}

func (m *fakeMachine) ListBoots(context.Context, *machinev1.ListBootsRequest) (*machinev1.ListBootsResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boots == nil {
		return nil, errs.New(errs.Precondition, "boots are kept on STATE, which is not open")
	}
	return &machinev1.ListBootsResponse{Boots: m.boots}, nil
}

func (m *fakeMachine) Reboot(context.Context, *machinev1.RebootRequest) (*machinev1.RebootResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reboots++
	if m.boots == nil {
		return nil, errs.New(errs.Unavailable, "not now")
	}
	return &machinev1.RebootResponse{}, nil
}

func (m *fakeMachine) StreamBootLog(r *machinev1.StreamBootLogRequest, out grpc.ServerStreamingServer[machinev1.BootLogLine]) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.GetBoot() != 6 || r.GetSource() != "panic" {
		return errs.New(errs.NotFound, "boot %d has no lines of %s", r.GetBoot(), r.GetSource())
	}
	for _, l := range m.panic {
		if err := out.Send(&machinev1.BootLogLine{Source: "panic", Text: l}); err != nil {
			return err
		}
	}
	return nil
}

func (m *fakeMachine) GetHealth(context.Context, *machinev1.GetHealthRequest) (*machinev1.GetHealthResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &machinev1.GetHealthResponse{Checks: m.checks}, nil
}

func (m *fakeMachine) TellEvent(_ context.Context, r *machinev1.TellEventRequest) (*machinev1.TellEventResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events = append(m.events, r.GetText())
	select {
	case m.heard <- r.GetText():
	default:
	}
	return &machinev1.TellEventResponse{}, nil
}

// waitFor returns when an event that begins so was told.
func (m *fakeMachine) waitFor(t *testing.T, begin string) {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case text := <-m.heard:
			if strings.HasPrefix(text, begin) {
				return
			}
		case <-late:
			t.Fatalf("no event %q", begin)
		}
	}
}

func (m *fakeMachine) StreamKernelLog(r *machinev1.StreamKernelLogRequest, out grpc.ServerStreamingServer[machinev1.LogLine]) error {
	return errors.Join(out.Send(&machinev1.LogLine{Text: "init: stage 2"}), out.Send(&machinev1.LogLine{Text: fmt.Sprintf("the last of %d lines", r.GetTail())}))
}

// A bench is updated between fakes, and a client that it takes for apid.
type bench struct {
	t        testing.TB
	storage  *fakeStorage
	machine  *fakeMachine
	folder   string
	restarts chan struct{}
	mu       sync.Mutex
	uptime   time.Duration // guarded by mu
	update   updatev1.UpdateClient
	conn     *grpc.ClientConn
	d        *Daemon
}

// hasty are limits for tests.
var hasty = limits{credit: 3, earn: 64 << 10, stall: 400 * time.Millisecond, least: 4 << 10, pause: time.Millisecond}

func newBench(t testing.TB) *bench {
	return &bench{t: t, storage: &fakeStorage{slots: slots("0.1.0", [2]string{"good", "empty"}, "0.1.0")}, machine: &fakeMachine{heard: make(chan string, 64), checks: healthy(), boots: []*machinev1.Boot{{Number: 7, End: machinev1.Boot_RUNNING}}},
		folder: t.TempDir(), restarts: make(chan struct{}, 100)}
}

func listen(t testing.TB) (net.Listener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "updated") // short: a socket's path has at most 108 bytes
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	must(t, err)
	return l, path
}

func dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	c, err := peer.Dial(path)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// make makes a process of updated that does not run yet, between its fakes, which end with close.
func (b *bench) make(env daemon.Env) (d *Daemon, close func()) {
	b.t.Helper()
	l, path := listen(b.t)
	fakes := grpc.NewServer()
	slotv1.RegisterSlotsServer(fakes, b.storage)
	machinev1.RegisterMachineServer(fakes, b.machine)
	go func() { _ = fakes.Serve(l) }()
	others := dial(b.t, path)
	d, err := New(Config{
		Env:   env,
		Slots: slotv1.NewSlotsClient(others), Machine: machinev1.NewMachineClient(others), Keys: trusted, Folder: b.folder, GoodFile: b.folder + "/good", JudgedFile: b.folder + "/judged", limits: hasty,
		Restart: func() error { b.restarts <- struct{}{}; return nil },
		Uptime: func() time.Duration {
			b.mu.Lock()
			defer b.mu.Unlock()
			return b.uptime
		},
	})
	must(b.t, err)
	return d, fakes.Stop
}

// start runs a process of updated; stop ends it.
func (b *bench) start() (stop func()) {
	b.t.Helper()
	own, ownPath := listen(b.t)
	d, closeFakes := b.make(daemon.Env{Name: "updated", Log: slog.New(slog.DiscardHandler), Metrics: metrics.New("updated"), Listen: own, Ready: func() {},
		Who: func(net.Conn) (uid.ID, error) { return uid.Apid, nil }})
	b.d = d
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	b.conn = dial(b.t, ownPath)
	b.update = updatev1.NewUpdateClient(b.conn)
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			b.t.Error(err)
		}
		closeFakes()
	})
	b.t.Cleanup(stop)
	return stop
}

// until waits for a status.
func (b *bench) until(what string, ok func(*updatev1.Status) bool) *updatev1.Status {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 20*time.Second)
	defer cancel()
	s, err := b.update.WatchStatus(ctx, &updatev1.WatchStatusRequest{})
	must(b.t, err)
	var last *updatev1.Status
	for {
		st, err := s.Recv()
		if err != nil {
			b.t.Fatalf("waiting for %s: %v; the last status was %v", what, err, last)
		}
		if last = st; ok(st) {
			return st
		}
	}
}

// upgrade runs an upgrade to its end.
func (b *bench) upgrade(r *updatev1.UpgradeRequest) (last *updatev1.UpgradeProgress, notes []string, err error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), time.Minute)
	defer cancel()
	stream, err := b.update.Upgrade(ctx, r)
	must(b.t, err)
	err = receive(stream.Recv, func(p *updatev1.UpgradeProgress) {
		last = p
		if p.GetNote() != "" {
			notes = append(notes, p.GetNote())
		}
	})
	return last, notes, err
}
