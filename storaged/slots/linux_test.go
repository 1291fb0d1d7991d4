package slots

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/peer"
	"github.com/bulkhead-os/bulkhead/internal/uid"
)

// attach puts content on a loop device with its partitions, and returns the device's name.
func attach(t *testing.T, content []byte) string {
	t.Helper()
	skip := t.Skipf
	if os.Getenv("REQUIRE_ROOT") == "1" {
		skip = t.Fatalf
	}
	if os.Getuid() != 0 {
		skip("not root: loop devices are not tested")
	}
	for _, tool := range []string{"losetup", "addpart"} {
		if _, err := exec.LookPath(tool); err != nil {
			skip("no %s: loop devices are not tested", tool)
		}
	}
	file := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, content, 0o600))
	out, err := exec.Command("losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		skip("losetup: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	})
	table, _, err := gpt.Read(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return filepath.Base(dev) // a medium
	}
	for _, p := range table.Partitions {
		if _, err := os.Stat(fmt.Sprintf("%sp%d", dev, p.Number)); errors.Is(err, fs.ErrNotExist) { // this kernel does not read GPTs
			run(t, "addpart", dev, fmt.Sprint(p.Number), fmt.Sprint(p.First), fmt.Sprint(p.Last-p.First+1))
		}
		t.Cleanup(func() { _ = exec.Command("delpart", dev, fmt.Sprint(p.Number)).Run() })
	}
	return filepath.Base(dev)
}

// newBench is a Linux that sees the loop devices of a test, one of them as the disk that it was started from.
func newBench(t *testing.T, running bundle.Digest, disks ...string) *Linux {
	t.Helper()
	dir := t.TempDir()
	l := &Linux{sys: dir + "/sys", dev: "/dev", proc: dir + "/proc", system: func() string { return "" }}
	must(t, errors.Join(os.MkdirAll(dir+"/sys/class/block", 0o755), os.MkdirAll(dir+"/sys/firmware/efi", 0o755), os.Mkdir(dir+"/proc", 0o755)))
	for _, d := range disks {
		must(t, os.Symlink("/sys/class/block/"+d, dir+"/sys/class/block/"+d))
	}
	l.boot(t, running)
	l.edit = func(disk string, change func(*gpt.Table) error) error {
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		table, _, err := gpt.Read(f, size)
		if err != nil {
			return err
		}
		if err := change(&table); err != nil {
			return err
		}
		return table.WriteTo(f, size)
	}
	return l
}

// boot sets the command line of the running kernel.
func (l *Linux) boot(t *testing.T, running bundle.Digest) {
	t.Helper()
	must(t, os.WriteFile(l.proc+"/cmdline", []byte("console=ttyS0 bulkhead bulkhead.verity="+running.String()+" bulkhead.epoch=2\n"), 0o600))
}

// serve puts the store behind a socket, for a caller with that user id.
func serve(t *testing.T, l *Linux, running string, who uid.ID) slotv1.SlotsClient {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", path)
	must(t, err)
	s := grpc.NewServer(peer.ServerOptions(peer.List{slotv1.Slots_ServiceDesc.ServiceName: {uid.Updated}}, func(net.Conn) (uid.ID, error) { return who, nil })...)
	slotv1.RegisterSlotsServer(s, &Server{Store: newStore(l, running), Linux: l})
	go func() { _ = s.Serve(listener) }()
	t.Cleanup(s.Stop)
	conn, err := peer.Dial(path)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return slotv1.NewSlotsClient(conn)
}

func begin2(ctx context.Context, c slotv1.SlotsClient, h bundle.Head) (last *slotv1.BeginResponse, steps int, err error) {
	stream, err := c.Begin(ctx, &slotv1.BeginRequest{Manifest: h.Raw, Signature: h.Signature})
	for err == nil {
		var m *slotv1.BeginResponse
		if m, err = stream.Recv(); err == nil {
			last = m
			steps++
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return last, steps, err
}

// TestLoop does an upgrade over the socket, on a block device.
func TestLoop(t *testing.T) {
	one, two := makeVersion(t, "0.1.0"), makeVersion(t, "0.2.0")
	_, content := install(t, one)
	l := newBench(t, one.root, attach(t, content.Content()))
	c := serve(t, l, "0.1.0", uid.Updated)
	g, err := c.Get(t.Context(), &slotv1.GetRequest{})
	must(t, err)
	if s := g.GetSlots()[0]; s.GetStatus() != "good" || !s.GetRunning() || s.GetVersion() != "0.1.0" || g.GetEpoch() != 2 {
		t.Errorf("at first: %v", g)
	}
	b, steps, err := begin2(t.Context(), c, two.head)
	must(t, err)
	if steps < 2 || b.GetSession() == 0 || len(b.GetMissing()) == 0 {
		t.Errorf("begin: %d messages, the last %v", steps, b)
	}
	fetched := 0
	for _, r := range b.GetMissing() {
		f := two.head.Manifest.Files[r.GetFile()]
		for j := int(r.GetFirst()); j < int(r.GetFirst()+r.GetCount()); j++ {
			data := two.files[r.GetFile()][f.Start(j):f.Start(j+1)]
			fetched += len(data)
			_, err := c.WriteChunks(t.Context(), &slotv1.WriteChunksRequest{Session: b.GetSession(), File: r.GetFile(), First: uint32(j), Data: data})
			must(t, err)
		}
	}
	if fetched > mib+600*kib {
		t.Errorf("%d bytes were fetched", fetched)
	}
	stream, err := c.Commit(t.Context(), &slotv1.CommitRequest{Session: b.GetSession()})
	must(t, err)
	version := ""
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		version = m.GetVersion()
	}
	if version != "0.2.0" {
		t.Errorf("committed %q", version)
	}
	l.boot(t, two.root)
	c = serve(t, l, "0.2.0", uid.Updated)
	g, err = c.MarkGood(t.Context(), &slotv1.MarkGoodRequest{Override: true})
	must(t, err)
	if s := g.GetSlots()[1]; s.GetStatus() != "good" || !s.GetRunning() || s.GetSequence() != 2 {
		t.Errorf("after the upgrade: %v", g)
	}
	r, err := c.Rollback(t.Context(), &slotv1.RollbackRequest{})
	if err != nil || r.GetVersion() != "0.1.0" || !r.GetRestart() {
		t.Errorf("rollback: %v, %v", r, err)
	}
	esp, err := l.Open(espName, Direct)
	must(t, err)
	defer esp.Close()
	h := sha256.New()
	if n, err := io.Copy(h, io.NewSectionReader(esp, 0, esp.Size())); err != nil || n != espSize {
		t.Errorf("%d bytes, %v", n, err)
	}
	buffered, err := l.Open(espName, Read)
	must(t, err)
	defer buffered.Close()
	again := sha256.New()
	if _, err := io.Copy(again, io.NewSectionReader(buffered, 0, espSize)); err != nil || !bytes.Equal(again.Sum(nil), h.Sum(nil)) {
		t.Errorf("what O_DIRECT reads is something else: %v", err)
	}
}

func TestStrangers(t *testing.T) {
	l := &Linux{sys: t.TempDir(), dev: "/dev", proc: t.TempDir(), system: func() string { return "" }}
	for _, who := range []uid.ID{uid.Apid, uid.Machined, uid.Root} {
		if _, err := serve(t, l, "0.1.0", who).Get(t.Context(), &slotv1.GetRequest{}, grpc.WaitForReady(false)); err == nil {
			t.Errorf("%s was let in", who.Name())
		}
	}
	_, err := serve(t, l, "0.1.0", uid.Updated).Get(t.Context(), &slotv1.GetRequest{})
	if !errs.Is(err, errs.Precondition) || !strings.Contains(err.Error(), "not started by UEFI") {
		t.Errorf("without UEFI: %v", err)
	}
}

// A medium is a device that starts with a bundle; nothing else can be read, the system disk least of all.
func TestMedia(t *testing.T) {
	one := makeVersion(t, "0.1.0")
	_, content := install(t, one)
	var b bytes.Buffer
	img := bundle.Image{Version: "0.2.0", Architecture: "amd64", Epoch: 2, RootHash: one.root}
	for i := range img.Files {
		img.Files[i] = filepath.Join(t.TempDir(), "f")
		must(t, os.WriteFile(img.Files[i], noise(i, 10_000), 0o600))
	}
	_, err := bundle.Write(&b, img, key(1))
	must(t, err)
	system, other, stick := attach(t, content.Content()), attach(t, noise(5, mib)), attach(t, append(b.Bytes(), make([]byte, -b.Len()&511)...))
	l := newBench(t, one.root, system, other, stick)
	c := serve(t, l, "0.1.0", uid.Updated)
	found, err := c.FindMedia(t.Context(), &slotv1.FindMediaRequest{})
	if err != nil || !slices.Equal(found.GetDevices(), []string{"/dev/" + stick}) {
		t.Fatalf("found %v, %v", found, err)
	}
	r, err := c.ReadMedia(t.Context(), &slotv1.ReadMediaRequest{Device: "/dev/" + stick, Offset: 512, Length: 1000})
	if err != nil || !bytes.Equal(r.GetData(), b.Bytes()[512:1512]) {
		t.Errorf("read %d bytes, %v", len(r.GetData()), err)
	}
	for _, dev := range []string{"/dev/" + other, "/dev/" + system, "/dev/" + system + "p2", "/etc/passwd", "", "/dev/../etc/passwd"} {
		if _, err := c.ReadMedia(t.Context(), &slotv1.ReadMediaRequest{Device: dev, Length: 10}); !errs.Is(err, errs.NotFound) {
			t.Errorf("%s: %v", dev, err)
		}
	}
	if _, err := c.ReadMedia(t.Context(), &slotv1.ReadMediaRequest{Device: "/dev/" + stick, Length: maxPiece + 1}); !errs.Is(err, errs.Invalid) {
		t.Errorf("too much: %v", err)
	}
}

// counter is a target that notes how much was written between two flushes.
type counter struct{ now, most int }

func (c *counter) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }
func (c *counter) Sync() error                       { c.now = 0; return nil }
func (c *counter) WriteAt(p []byte, _ int64) (int, error) {
	c.now += len(p)
	c.most = max(c.most, c.now)
	return len(p), nil
}

// An upgrade must do with 32 MiB, whatever its size: little may wait in memory for the disk.
func TestFlushedInTime(t *testing.T) {
	c := &counter{}
	n := &session{targets: [3]target{c, c, c}}
	n.manifest.Files = make([]bundle.File, 3)
	b := make([]byte, mib)
	for at := range int64(100) {
		must(t, n.write(1, b, at*mib))
	}
	if c.most > 5*mib {
		t.Errorf("%d bytes waited for a flush", c.most)
	}
}
