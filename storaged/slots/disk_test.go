package slots

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

const (
	kib     = 1 << 10
	mib     = 1 << 20
	espSize = 34 * mib
	rootMax = 3 * mib
	treeMax = 64 * kib
)

func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func noise(seed, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(b)
	return b
}

// A version is an image of a test: its files, and the manifest over them.
type version struct {
	name  string
	root  bundle.Digest
	files [3][]byte
	head  bundle.Head
}

// makeVersion makes an image of which half the root and most of the kernel are the same in all versions.
func makeVersion(t testing.TB, name string, edit ...func(*bundle.Image)) version {
	t.Helper()
	seed := int(sha256.Sum256([]byte(name))[0]) + 1000
	v := version{name: name}
	v.files[bundle.Root] = append(noise(1, mib), noise(seed, mib)...)
	tree, err := verity.Build(bytes.NewReader(v.files[bundle.Root]), []byte(name), [16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := tree.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	v.files[bundle.Tree], v.root = b.Bytes(), tree.Root
	v.files[bundle.Kernel] = makeUKI(fmt.Sprintf("bulkhead bulkhead.verity=%x bulkhead.epoch=2\x00", tree.Root), 400*kib)
	v.seal(t, key(1), edit...)
	return v
}

func (v *version) seal(t testing.TB, signer ed25519.PrivateKey, edit ...func(*bundle.Image)) {
	t.Helper()
	img := bundle.Image{Version: v.name, Architecture: "amd64", Epoch: 2, RootHash: v.root}
	dir := t.TempDir()
	for i, b := range v.files {
		img.Files[i] = filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(img.Files[i], b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range edit {
		e(&img)
	}
	var err error
	if v.head, err = bundle.Seal(img, signer); err != nil {
		t.Fatal(err)
	}
}

// makeUKI is a PE file with a section .linux of that size, and .cmdline behind it.
func makeUKI(cmdline string, kernel int) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	copy(b, "MZ")
	le.PutUint32(b[60:], 128)
	copy(b[128:], "PE\x00\x00")
	le.PutUint16(b[134:], 2)
	le.PutUint16(b[148:], 112)
	table := 128 + 24 + 112
	for _, s := range []struct {
		name string
		data []byte
	}{{".linux", noise(2, kernel)}, {".cmdline", []byte(cmdline)}} {
		copy(b[table:], s.name)
		le.PutUint32(b[table+8:], uint32(len(s.data)))
		le.PutUint32(b[table+16:], uint32(len(s.data)+511)&^511)
		le.PutUint32(b[table+20:], uint32(len(b)))
		table += 40
		b = append(b, s.data...)
		b = append(b, make([]byte, -len(b)&511)...)
	}
	return b
}

// testDisk is a whole disk in memory, or after a power cut.
type testDisk struct {
	device interface {
		powercut.Device
		Size() int64
	}
	running bundle.Digest
	opened  map[PartName]int
}

type testPart struct {
	powercut.Section
	close func()
}

func (p testPart) Close() error { p.close(); return nil }

func (d *testDisk) table() (gpt.Table, error) {
	t, _, err := gpt.Read(d.device, d.device.Size())
	return t, err
}

func (d *testDisk) Look(context.Context) (Layout, error) {
	t, err := d.table()
	if err != nil {
		return Layout{}, err
	}
	l := Layout{Running: d.running, Epoch: 2}
	for i := range 2 {
		r, _ := t.ByName(string(rootName(i)))
		v, _ := t.ByName(string(treeName(i)))
		l.Slots[i] = bundle.Digest(append(r.GUID[:], v.GUID[:]...))
		l.Root[i], l.Tree[i] = r.Size(), v.Size()
	}
	return l, nil
}

func (d *testDisk) Open(name PartName, mode Mode) (Part, error) {
	t, err := d.table()
	if err != nil {
		return nil, err
	}
	p, ok := t.ByName(string(name))
	if !ok {
		return nil, fmt.Errorf("no partition %s", name)
	}
	d.opened[name]++
	return testPart{powercut.Section{Device: d.device, From: p.Start(), Length: p.Size()}, func() { d.opened[name]-- }}, nil
}

func (d *testDisk) Label(slot int, root bundle.Digest) error {
	t, err := d.table()
	if err != nil {
		return err
	}
	for i, p := range t.Partitions {
		switch PartName(p.Name) {
		case rootName(slot):
			t.Partitions[i].GUID = gpt.GUID(root[:16])
		case treeName(slot):
			t.Partitions[i].GUID = gpt.GUID(root[16:])
		}
	}
	return t.WriteTo(d.device, d.device.Size())
}

func run(t testing.TB, argv ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return out
}

// install makes a disk as the image builder does, with v in slot A, running.
func install(t testing.TB, v version) (*testDisk, *powercut.Disk) {
	t.Helper()
	return installSized(t, v, espSize, rootMax, treeMax)
}

func installSized(t testing.TB, v version, espSize, rootMax, treeMax int64) (*testDisk, *powercut.Disk) {
	t.Helper()
	dir := t.TempDir()
	esp, file := filepath.Join(dir, "esp"), filepath.Join(dir, "file")
	if err := errors.Join(os.WriteFile(esp, nil, 0o600), os.Truncate(esp, espSize), os.WriteFile(file, v.files[bundle.Kernel], 0o600)); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.vfat", "-F", "32", "-s", "1", "-i", "12345678", "--invariant", esp)
	run(t, "mmd", "-i", esp, "::EFI", "::EFI/Linux")
	run(t, "mcopy", "-i", esp, file, "::EFI/Linux/"+Name{Sequence: 1, Version: v.name}.String())
	content, err := os.ReadFile(esp)
	if err != nil {
		t.Fatal(err)
	}
	table, next := gpt.Table{DiskGUID: gpt.GUID{1}}, int64(mib)
	disk := make([]byte, 0, 2*mib+espSize+2*rootMax+2*treeMax)
	for i, p := range []struct {
		name PartName
		typ  gpt.GUID
		size int64
		guid gpt.GUID
		data []byte
	}{
		{espName, gpt.EFISystem, espSize, gpt.GUID{2}, content},
		{"ROOT-A", gpt.Root, rootMax, gpt.GUID(v.root[:16]), v.files[bundle.Root]}, {"VERITY-A", gpt.RootVerity, treeMax, gpt.GUID(v.root[16:]), v.files[bundle.Tree]},
		{"ROOT-B", gpt.Root, rootMax, gpt.GUID{3}, nil}, {"VERITY-B", gpt.RootVerity, treeMax, gpt.GUID{4}, nil},
	} {
		table.Partitions = append(table.Partitions, gpt.Partition{Number: i + 1, Name: string(p.name), Type: p.typ, GUID: p.guid, First: uint64(next / 512), Last: uint64((next+p.size)/512) - 1})
		disk = append(disk, make([]byte, next-int64(len(disk)))...)
		disk = append(disk, p.data...)
		next += p.size
	}
	disk = append(disk, make([]byte, next+mib-int64(len(disk)))...)
	d := powercut.New(disk)
	if err := table.WriteTo(d, d.Size()); err != nil {
		t.Fatal(err)
	}
	d.Forget()
	return &testDisk{d, v.root, map[PartName]int{}}, d
}

// testEpochs is a TPM.
type testEpochs struct{ floor int }

func (e *testEpochs) Floor(context.Context) (int, bool, error) { return e.floor, true, nil }
func (e *testEpochs) Raise(_ context.Context, n int) error {
	e.floor = max(e.floor, n)
	return nil
}

func newStore(d Disk, running string) *Store {
	return New(Config{Disk: d, Epochs: &testEpochs{}, Architecture: "amd64", Version: running, Log: slog.New(slog.DiscardHandler),
		Keys: func() (bundle.Keys, error) { return bundle.Keys{key(1).Public().(ed25519.PublicKey)}, nil }})
}

func quiet(Progress) {}

// send writes the chunks of some ranges, at most limit of them.
func send(t testing.TB, s *Store, session uint64, v version, missing []Range, limit int) (bytesSent int64) {
	t.Helper()
	for _, r := range missing {
		f := v.head.Manifest.Files[r.File]
		for j := r.First; j < r.First+r.Count && limit > 0; j++ {
			at := f.Start(j)
			data := v.files[r.File][at : at+int64(f.Chunks[j].Size)]
			if err := s.WriteChunks(session, r.File, j, data); err != nil {
				t.Fatal(err)
			}
			bytesSent += int64(len(data))
			limit--
		}
	}
	return bytesSent
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// upgrade does all of it.
func upgrade(t testing.TB, s *Store, v version) (fetched int64) {
	t.Helper()
	n, missing, err := s.Begin(t.Context(), v.head.Raw, v.head.Signature, quiet)
	must(t, err)
	fetched = send(t, s, n, v, missing, 1<<30)
	got, err := s.Commit(t.Context(), n, quiet)
	must(t, err)
	if got != v.name {
		t.Fatalf("%s will be tried, want %s", got, v.name)
	}
	return fetched
}

// start is a power-on: systemd-boot counts, and the slot that the kernel names must be whole. It returns what runs then.
func (d *testDisk) start(known ...version) (version, error) {
	part, err := d.Open(espName, Write)
	if err != nil {
		return version{}, err
	}
	volume, err := fat.Open(part, part.Size())
	if err != nil {
		return version{}, err
	}
	files, err := volume.List("EFI/Linux")
	if err != nil {
		return version{}, err
	}
	var names []string
	for _, f := range files {
		if filepath.Ext(f.Name) == ".efi" {
			names = append(names, f.Name)
		}
	}
	if Order(names); len(names) == 0 {
		return version{}, errors.New("nothing to start")
	}
	f, err := volume.Open("EFI/Linux", names[0])
	if err != nil {
		return version{}, err
	}
	kernel, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size))
	if err != nil {
		return version{}, err
	}
	i := slices.IndexFunc(known, func(v version) bool { return bytes.Equal(v.files[bundle.Kernel], kernel) })
	if i < 0 {
		return version{}, fmt.Errorf("%s is no kernel that was ever whole", names[0])
	}
	if n, _ := ParseName(names[0]); n.Counted {
		n.Left, n.Done = max(0, n.Left-1), n.Done+1
		if err := volume.Rename("EFI/Linux", names[0], n.String()); err != nil {
			return version{}, err
		}
	}
	l, err := d.Look(context.Background())
	if err != nil {
		return version{}, err
	}
	slot := slices.Index(l.Slots[:], known[i].root)
	if slot < 0 {
		return version{}, fmt.Errorf("%s starts a root that no slot has", names[0])
	}
	d.running = known[i].root
	return known[i], newStore(d, "").Verify(context.Background(), slot)
}

func hexOf(d bundle.Digest) string { return hex.EncodeToString(d[:]) }
