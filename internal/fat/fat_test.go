package fat

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

const (
	mib     = 1 << 20
	linux   = "EFI/Linux"
	volume  = 34 * mib
	oldName = "bulkhead_0001_0.1.0.efi"
)

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// run runs a tool; where it is missing, the test is skipped, in CI it fails.
func run(t testing.TB, argv ...string) string {
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
	return string(out)
}

// mkfs makes an EFI partition as the image builder does, with one file of that content in EFI/Linux, and returns its bytes.
func mkfs(t testing.TB, perCluster int, content []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	img, file := filepath.Join(dir, "esp"), filepath.Join(dir, "file")
	size := int64(volume) * int64(perCluster)
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, size), os.WriteFile(file, content, 0o600)); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.vfat", "-F", "32", "-s", fmt.Sprint(perCluster), "-i", "12345678", "-n", "ESP", "--invariant", img)
	run(t, "mmd", "-i", img, "::EFI", "::EFI/Linux", "::EFI/BOOT")
	run(t, "mcopy", "-i", img, file, "::EFI/Linux/"+oldName)
	run(t, "mcopy", "-i", img, file, "::EFI/BOOT/BOOTX64.EFI")
	b, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func open(t testing.TB, d interface {
	Device
	Size() int64
}) *Volume {
	t.Helper()
	v, err := Open(d, d.Size())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func read(t testing.TB, v *Volume, path, name string) []byte {
	t.Helper()
	f, err := v.Open(path, name)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, f.Size))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func create(t testing.TB, v *Volume, name string, content []byte) {
	t.Helper()
	f, err := v.Create(linux, name, int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.WriteAt(content, 0); err != nil || n != len(content) {
		t.Fatal(n, err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func names(t testing.TB, v *Volume) (out []string) {
	t.Helper()
	all, err := v.List(linux)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		out = append(out, i.Name)
	}
	slices.Sort(out)
	return out
}

// fsck lets dosfstools judge. It must find nothing at all.
func fsck(t testing.TB, content []byte) {
	t.Helper()
	img := filepath.Join(t.TempDir(), "esp")
	if err := os.WriteFile(img, content, 0o600); err != nil {
		t.Fatal(err)
	}
	out := run(t, "fsck.vfat", "-n", "-v", img)
	for _, bad := range []string{"wrong", "Orphan", "Reclaim", "differ", "uninitialized", "Bad", "Dirty", "Unused", "Duplicate", "shared"} {
		if strings.Contains(out, bad) {
			t.Fatalf("fsck.vfat finds %q:\n%s", bad, out)
		}
	}
}

// theirs reads a file with mtools.
func theirs(t testing.TB, content []byte, path string) []byte {
	t.Helper()
	dir := t.TempDir()
	img, out := filepath.Join(dir, "esp"), filepath.Join(dir, "out")
	if err := os.WriteFile(img, content, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "mcopy", "-i", img, "::"+path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestLife makes, renames and removes files, and lets mtools and fsck.vfat judge after each step.
func TestLife(t *testing.T) {
	for _, perCluster := range []int{1, 2} {
		t.Run(fmt.Sprint(perCluster), func(t *testing.T) {
			old, fresh := noise(1, 3*mib+77), noise(2, 5*mib+1)
			d := powercut.New(mkfs(t, perCluster, old))
			v := open(t, d)
			before := v.Free()
			if got := read(t, v, "efi/LINUX", strings.ToUpper(oldName)); !bytes.Equal(got, old) {
				t.Errorf("mtools' file is read as %d other bytes", len(got))
			}
			const temp, next = "bulkhead.next", "bulkhead_0002_0.2.0-a.long.prerelease.name.that.fills.many.slots+3.efi"
			create(t, v, temp, fresh)
			fsck(t, d.Content())
			must(t, v.Rename(linux, temp, next))
			fsck(t, d.Content())
			if got := theirs(t, d.Content(), linux+"/"+next); !bytes.Equal(got, fresh) {
				t.Errorf("mtools reads %d other bytes", len(got))
			}
			must(t, v.Rename(linux, oldName, "bulkhead_0003_0.1.0+3.efi"))
			must(t, v.Rename(linux, next, "bulkhead_0002_0.2.0+0-3.efi"))
			fsck(t, d.Content())
			v = open(t, d) // all of it is on the disk
			if got := names(t, v); !slices.Equal(got, []string{"bulkhead_0002_0.2.0+0-3.efi", "bulkhead_0003_0.1.0+3.efi"}) {
				t.Errorf("names: %v", got)
			}
			if got := theirs(t, d.Content(), linux+"/bulkhead_0003_0.1.0+3.efi"); !bytes.Equal(got, old) {
				t.Errorf("mtools reads %d other bytes", len(got))
			}
			must(t, v.Remove(linux, "bulkhead_0002_0.2.0+0-3.efi"))
			must(t, v.Remove(linux, "bulkhead_0002_0.2.0+0-3.efi"))
			fsck(t, d.Content())
			if grown := before - v.Free(); grown > 4*v.cluster {
				t.Errorf("%d bytes are lost", grown)
			}
			d.Forget()
			must(t, v.Reclaim(nil))
			if n := d.Cuts(rand.New(rand.NewPCG(1, 1)), 1, func(*powercut.Image) {}); n > 1 {
				t.Error("Reclaim wrote to a file system in order")
			}
		})
	}
}

// A directory grows by as many clusters as it takes, and shrunk entries are used again.
func TestManyFiles(t *testing.T) {
	d := powercut.New(mkfs(t, 1, noise(1, 1000)))
	v := open(t, d)
	for i := range 40 {
		create(t, v, fmt.Sprintf("file number %d.efi", i)[:4]+fmt.Sprintf("-%d.efi", i), noise(byte(i), 600+i))
	}
	fsck(t, d.Content())
	for i := range 40 {
		if name := fmt.Sprintf("file-%d.efi", i); i%3 != 0 {
			must(t, v.Remove(linux, name))
		} else if got := read(t, v, linux, name); !bytes.Equal(got, noise(byte(i), 600+i)) {
			t.Errorf("%s is %d other bytes", name, len(got))
		}
	}
	size := v.Free()
	for i := range 20 {
		create(t, v, fmt.Sprintf("again-%d", i), noise(1, 512))
	}
	if used := size - v.Free(); used != 20*512 {
		t.Errorf("20 files of a cluster took %d bytes: the directory grew though it has empty sectors", used)
	}
	fsck(t, d.Content())
}

// A file that finds no single hole is written in pieces.
func TestFragments(t *testing.T) {
	d := powercut.New(mkfs(t, 1, noise(1, 1000)))
	v := open(t, d)
	n := 0
	for ; v.Free() > 200_000; n++ {
		create(t, v, fmt.Sprintf("f%d", n), make([]byte, 100_000))
	}
	for i := 0; i < n; i += 2 {
		must(t, v.Remove(linux, fmt.Sprintf("f%d", i)))
	}
	content := noise(5, 3*mib)
	create(t, v, "pieces", content)
	if f, err := v.Open(linux, "pieces"); err != nil || len(f.extents) < 20 {
		t.Errorf("%v: %d pieces", err, len(f.extents))
	}
	if got := theirs(t, d.Content(), linux+"/pieces"); !bytes.Equal(got, content) {
		t.Errorf("mtools reads %d other bytes", len(got))
	}
	f, err := v.Open(linux, "pieces")
	must(t, err)
	b := make([]byte, 300_000)
	if _, err := f.ReadAt(b, 150_001); err != nil || !bytes.Equal(b, content[150_001:450_001]) {
		t.Errorf("a read over pieces: %v", err)
	}
	if n, err := f.ReadAt(b, f.Size-10); n != 10 || err != io.EOF {
		t.Errorf("a read over the end: %d, %v", n, err)
	}
	fsck(t, d.Content())
	_, err = v.Create(linux, "toolarge", v.Free()+1)
	if !errors.Is(err, ErrFull) {
		t.Errorf("too large: %v", err)
	}
	fsck(t, d.Content())
}

func TestRefusals(t *testing.T) {
	d := powercut.New(mkfs(t, 1, noise(1, 1000)))
	v := open(t, d)
	_, err := v.Open(linux, "none")
	is := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
	}
	is("open", err, fs.ErrNotExist)
	_, err = v.List("EFI/Windows")
	is("list", err, fs.ErrNotExist)
	_, err = v.Create(linux, strings.ToUpper(oldName), 10)
	is("create", err, fs.ErrExist)
	is("rename", v.Rename(linux, "none", "x"), fs.ErrNotExist)
	create(t, v, "x", []byte("x"))
	is("rename", v.Rename(linux, "x", oldName), fs.ErrExist)
	for _, name := range []string{"", ".", ".x", "x.", "a/b", "a b", "ä", "a:b", strings.Repeat("x", MaxName+1)} {
		if _, err := v.Create(linux, name, 1); err == nil {
			t.Errorf("%q was created", name)
		}
	}
	if err := v.Remove("", "EFI"); err == nil {
		t.Error("a directory was removed")
	}
	fsck(t, d.Content())
	good := d.Content()
	for what, at := range map[string]int{"sector size": 11, "cluster size": 13, "tables": 16, "type": 17, "size": 35, "table size": 38, "root": 47, "info": 49, "signature": 510} {
		b := bytes.Clone(good)
		b[at] ^= 0x7f
		if _, err := Open(powercut.New(b), int64(len(b))); err == nil {
			t.Errorf("%s: a wrong one was taken", what)
		}
	}
	if _, err := Open(d, d.Size()-1); err == nil {
		t.Error("a file system larger than its device was taken")
	}
}

// Files that share clusters, and chains that lead astray, are damage, which is said and not made worse.
func TestDamage(t *testing.T) {
	d := powercut.New(mkfs(t, 1, noise(1, 5000)))
	v := open(t, d)
	create(t, v, "a", noise(2, 5000))
	create(t, v, "b", noise(3, 5000))
	first := func(name string) uint32 {
		dir, err := v.walk(linux)
		must(t, err)
		e, _ := dir.find(name)
		return e.first
	}
	a, b := first("a"), first("b")
	for what, c := range map[string]struct{ from, to uint32 }{
		"shared": {a + 2, b + 2}, "loop": {a + 2, a}, "astray": {a + 2, v.top + 1}, "free": {a + 2, 0},
	} {
		e := powercut.New(bytes.Clone(d.Content()))
		w := open(t, e)
		le.PutUint32(w.table[4*c.from:], c.to)
		w.dirty[int(4*c.from)/sectorSize] = true
		must(t, w.flush())
		before := bytes.Clone(e.Content())
		w = open(t, e)
		if err := w.Reclaim(func(a, b string) string { return a }); err == nil || !strings.Contains(err.Error(), "fsck.vfat") {
			t.Errorf("%s: Reclaim: %v", what, err)
		}
		if !bytes.Equal(before, e.Content()) {
			t.Errorf("%s: Reclaim wrote", what)
		}
	}
}

// FuzzOpen reads whatever claims to be a file system; what it takes, it can list.
func FuzzOpen(f *testing.F) {
	f.Add(uint16(13), byte(4), uint32(1000), byte(9))
	f.Add(uint16(44), byte(3), uint32(40), byte(0xff))
	content := mkfs(f, 1, noise(1, 40_000))
	testfuzz.Run(f, func(t *testing.T, at uint16, value byte, more uint32, second byte) {
		b := powercut.New(bytes.Clone(content[:2*mib])) // boot sector, tables, the first clusters
		_, _ = b.WriteAt([]byte{value}, int64(at)%sectorSize)
		_, _ = b.WriteAt([]byte{second}, int64(more)%(2*mib))
		v, err := Open(b, volume)
		if err != nil {
			return
		}
		_, _ = v.List(linux)
		if file, err := v.Open(linux, oldName); err == nil {
			_, _ = io.Copy(io.Discard, io.NewSectionReader(file, 0, file.Size))
		}
		_ = v.Reclaim(func(a, _ string) string { return a })
	})
}
