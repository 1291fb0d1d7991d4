package install

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/verity"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

const (
	kib     = 1 << 10
	mib     = 1 << 20
	espSize = 34 * mib
	rootMax = 3 * mib
	treeMax = 64 * kib
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// makeUKI is a PE file with only a command line, and some weight.
func makeUKI(cmdline string, weight int) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	copy(b, "MZ")
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[70:], 1)
	section := b[64+24:]
	copy(section, ".cmdline")
	le.PutUint32(section[8:], uint32(len(cmdline)))
	le.PutUint32(section[16:], 512)
	le.PutUint32(section[20:], 512)
	copy(b[512:], cmdline)
	return append(b, noise(7, weight)...)
}

// A medium is what the system was started from.
type medium struct {
	esp, root, tree source
	hash            bundle.Digest
	kernel, loader  []byte
}

type source struct{ *bytes.Reader }

func newSource(b []byte) source { return source{bytes.NewReader(b)} }

func newMedium(t testing.TB) *medium {
	t.Helper()
	m := &medium{loader: noise(3, 100*kib)}
	data := noise(1, mib+12*kib)
	tree, err := verity.Build(bytes.NewReader(data), []byte("salt"), [16]byte{1})
	must(t, err)
	var b bytes.Buffer
	_, err = tree.WriteTo(&b)
	must(t, err)
	m.hash, m.root, m.tree = tree.Root, newSource(append(data, make([]byte, 64*kib)...)), newSource(b.Bytes())
	m.kernel = makeUKI(fmt.Sprintf("bulkhead bulkhead.verity=%s", m.hash), 300*kib)
	disk := powercut.New(make([]byte, espSize))
	must(t, fat.Format(disk, espSize, 1, "ESP"))
	v, err := fat.Open(disk, espSize)
	must(t, err)
	for _, f := range []struct {
		dir, name string
		data      []byte
	}{
		{"EFI/BOOT", "BOOTX64.EFI", m.loader}, {"EFI/systemd", "systemd-bootx64.efi", m.loader}, {"loader", "loader.conf", []byte("timeout 0\n")},
		{"loader/keys/auto", "db.auth", noise(4, 900)}, {"loader", "random-seed", noise(6, 32)},
		{"EFI/Linux", "bulkhead_0007_0.1.0+2-1.efi", m.kernel},
		{"EFI/Linux", "bulkhead_0009_9.9.9.efi", makeUKI("bulkhead bulkhead.verity="+strings.Repeat("ab", 32), 10)},
		{"EFI/Linux", "other.efi", noise(5, 1000)},
	} {
		must(t, v.Mkdir(f.dir))
		w, err := v.Create(f.dir, f.name, int64(len(f.data)))
		must(t, err)
		_, err = w.WriteAt(f.data, 0)
		must(t, err)
	}
	m.esp = newSource(disk.Content())
	return m
}

// A target is a disk with three partitions.
type target struct {
	device interface {
		powercut.Device
		Size() int64
	}
}

func (d target) part(from, length int64) powercut.Section {
	return powercut.Section{Device: d.device, From: from, Length: length}
}
func (d target) esp() powercut.Section  { return d.part(0, espSize) }
func (d target) root() powercut.Section { return d.part(espSize, rootMax) }
func (d target) tree() powercut.Section { return d.part(espSize+rootMax, treeMax) }

func (d target) boot(m *medium) Boot {
	return Boot{Medium: m.esp, ESP: d.esp(), Hash: m.hash, Serial: 7, Again: func() (Source, func() error, error) {
		return d.esp(), func() error { return nil }, nil
	}}
}

func quiet(int64, int64) {}

// all does what storaged does, in its order.
func (d target) all(ctx context.Context, m *medium) error {
	if err := Root(ctx, m.root, m.tree, m.hash, d.root(), d.tree(), quiet); err != nil {
		return err
	}
	if err := Verify(ctx, d.root(), d.tree(), m.hash, quiet); err != nil {
		return err
	}
	b := d.boot(m)
	if err := b.Copy(ctx, quiet); err != nil {
		return err
	}
	return b.Finish(ctx)
}

// starts reports whether a firmware finds a loader, and then wants everything else to be there and right.
func (d target) starts(t *testing.T, m *medium) bool {
	t.Helper()
	v, err := fat.Open(d.esp(), espSize)
	if err != nil {
		return false
	}
	f, err := v.Open(loaderDir, "BOOTX64.EFI")
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	must(t, err)
	for _, want := range []struct {
		f    *fat.File
		data []byte
	}{{f, m.loader}, {kernelOf(t, v), m.kernel}} {
		got := make([]byte, want.f.Size)
		if _, err := want.f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want.data) {
			t.Errorf("%s is not what the medium has: %v", want.f.Name, err)
		}
	}
	if err := Verify(t.Context(), d.root(), d.tree(), m.hash, quiet); err != nil {
		t.Errorf("a firmware starts it, but: %v", err)
	}
	return true
}

// kernelOf returns the one kernel that there is.
func kernelOf(t *testing.T, v *fat.Volume) *fat.File {
	t.Helper()
	files, err := v.List(slots.KernelDir)
	must(t, err)
	if len(files) != 1 || files[0].Name != "bulkhead_0001_0.1.0.efi" {
		t.Fatalf("kernels %v, want bulkhead_0001_0.1.0.efi and no other", files)
	}
	f, err := v.Open(slots.KernelDir, files[0].Name)
	must(t, err)
	return f
}

func newTarget() (target, *powercut.Disk) {
	d := powercut.New(make([]byte, espSize+rootMax+treeMax))
	return target{d}, d
}

// TestInstall copies, and then once more, which writes nothing.
func TestInstall(t *testing.T) {
	m := newMedium(t)
	d, disk := newTarget()
	must(t, d.all(t.Context(), m))
	if !d.starts(t, m) {
		t.Fatal("no firmware starts it")
	}
	v, err := fat.Open(d.esp(), espSize)
	must(t, err)
	for _, f := range []struct{ dir, name string }{{"EFI/systemd", "systemd-bootx64.efi"}, {"loader", "loader.conf"}, {"loader/keys/auto", "db.auth"}} {
		if _, err := v.Open(f.dir, f.name); err != nil {
			t.Error(err)
		}
	}
	if _, err := v.Open("loader", "random-seed"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the medium's random seed: %v", err)
	}
	disk.Fail = func(what string) error {
		if what == "write" {
			return errors.New("a write")
		}
		return nil
	}
	if err := d.all(t.Context(), m); err != nil {
		t.Errorf("what is there already is written again: %v", err)
	}
}

// TestPowerCuts cuts the power at every flush, in every write, at random halves of what was not flushed: a disk that is not complete is not
// started, and the installation goes on from there.
func TestPowerCuts(t *testing.T) {
	m := newMedium(t)
	d, disk := newTarget()
	must(t, d.all(t.Context(), m))
	count, started := 0, 0
	total := disk.Cuts(rand.New(rand.NewPCG(1, 2)), 2, func(i *powercut.Image) {
		cut := target{i}
		if cut.starts(t, m) {
			started++
		}
		if count++; count%17 == 0 {
			if err := cut.all(t.Context(), m); err != nil {
				t.Errorf("after cut %d it does not go on: %v", count, err)
			} else if !cut.starts(t, m) {
				t.Errorf("after cut %d it ends, but no firmware starts it", count)
			}
		}
	})
	t.Logf("%d states, %d of them start", total, started)
	if total < 100 || started == 0 || started == total {
		t.Errorf("%d states, %d of them start", total, started)
	}
}

// TestFaults lets writes and flushes fail: the call says so, and nothing is started.
func TestFaults(t *testing.T) {
	m := newMedium(t)
	broken := errors.New("the disk is broken")
	for n := 0; ; n += 13 {
		d, disk := newTarget()
		count := 0
		disk.Fail = func(string) error {
			if count++; count > n {
				return broken
			}
			return nil
		}
		err := d.all(t.Context(), m)
		if err == nil {
			t.Logf("%d writes and flushes", count)
			return
		}
		if !errors.Is(err, broken) {
			t.Fatalf("after %d: %v", n, err)
		}
		disk.Fail = nil
		d.starts(t, m)
	}
}

// lossy is a disk that keeps something else than it is given.
type lossy struct{ powercut.Section }

func (l lossy) WriteAt(p []byte, at int64) (int, error) {
	p = bytes.Clone(p)
	if at == 512*kib {
		p[100] ^= 1
	}
	return l.Section.WriteAt(p, at)
}

// TestRefused: what is damaged is told, and who did it.
func TestRefused(t *testing.T) {
	m := newMedium(t)
	ctx := t.Context()
	bad := func(b []byte) source {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
		return newSource(b)
	}
	all := func(s source) []byte {
		b := make([]byte, s.Size())
		_, err := s.ReadAt(b, 0)
		must(t, err)
		return b
	}
	d, _ := newTarget()
	if err := Root(ctx, bad(all(m.root)), m.tree, m.hash, d.root(), d.tree(), quiet); err == nil || !strings.Contains(err.Error(), "the medium is damaged") {
		t.Errorf("a damaged root: %v", err)
	}
	if err := Root(ctx, m.root, m.tree, m.hash, d.part(0, mib), d.tree(), quiet); err == nil || !strings.Contains(err.Error(), "its partition") {
		t.Errorf("a small partition: %v", err)
	}
	if err := Root(ctx, m.root, m.tree, m.hash, lossy{d.root()}, d.tree(), quiet); err != nil {
		t.Error(err)
	}
	if err := Verify(ctx, d.root(), d.tree(), m.hash, quiet); err == nil || !strings.Contains(err.Error(), "have the root hash") {
		t.Errorf("a disk that loses: %v", err)
	}
	b := d.boot(m)
	b.Hash = bundle.Digest{1}
	if err := b.Copy(ctx, quiet); err == nil || !strings.Contains(err.Error(), "no kernel of the running system") {
		t.Errorf("a medium of another system: %v", err)
	}
	b = d.boot(m)
	b.Again = func() (Source, func() error, error) { // what is read back is another disk's
		other, _ := newTarget()
		must(t, other.boot(m).Copy(ctx, quiet))
		v, err := fat.Open(other.esp(), espSize)
		must(t, err)
		f, err := v.Open("loader", "loader.conf")
		must(t, err)
		_, err = f.WriteAt([]byte("x"), 0)
		must(t, err)
		return other.esp(), func() error { return nil }, nil
	}
	if err := b.Copy(ctx, quiet); err == nil || !strings.Contains(err.Error(), "loader/loader.conf is another file") {
		t.Errorf("boot files that are not kept: %v", err)
	}
	stop, cancel := context.WithCancel(ctx)
	cancel()
	d, _ = newTarget()
	if err := d.all(stop, m); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
