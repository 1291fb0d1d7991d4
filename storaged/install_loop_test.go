package storaged

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

// mediumFile makes an installation medium, as an ISO is one, and returns its root hash.
func mediumFile(t *testing.T, path string) (hash [32]byte) {
	t.Helper()
	const espSize = 34 * mib
	data := make([]byte, mib)
	rand.NewChaCha8([32]byte{1}).Read(data)
	tree, err := verity.Build(bytes.NewReader(data), []byte("salt"), [16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	var hashes bytes.Buffer
	if _, err := tree.WriteTo(&hashes); err != nil {
		t.Fatal(err)
	}
	esp := powercut.New(make([]byte, espSize))
	if err := fat.Format(esp, espSize, 1, "ESP"); err != nil {
		t.Fatal(err)
	}
	v, err := fat.Open(esp, espSize)
	if err != nil {
		t.Fatal(err)
	}
	kernel := make([]byte, 4096)
	copy(kernel, "MZ")
	binary.LittleEndian.PutUint32(kernel[60:], 64)
	copy(kernel[64:], "PE\x00\x00\x00\x00\x01\x00")
	copy(kernel[88:], ".cmdline")
	line := fmt.Sprintf("bulkhead bulkhead.verity=%x", tree.Root)
	for at, n := range map[int]int{96: len(line), 104: 512, 108: 512} {
		binary.LittleEndian.PutUint32(kernel[at:], uint32(n))
	}
	copy(kernel[512:], line)
	for _, f := range []struct {
		dir, name string
		data      []byte
	}{{"EFI/BOOT", "BOOTX64.EFI", []byte("loader")}, {"EFI/Linux", "bulkhead_0001_0.1.0.efi", kernel}, {"loader", "loader.conf", []byte("timeout 0\n")}} {
		w, err := (*fat.File)(nil), v.Mkdir(f.dir)
		if err == nil {
			w, err = v.Create(f.dir, f.name, int64(len(f.data)))
		}
		if err == nil {
			_, err = w.WriteAt(f.data, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, next := gpt.Table{DiskGUID: newGUID()}, int64(mib)
	for i, p := range []struct {
		name string
		typ  gpt.GUID
		guid gpt.GUID
		data []byte
	}{{layout.ESP, gpt.EFISystem, newGUID(), esp.Content()}, {layout.RootA, gpt.Root, gpt.GUID(tree.Root[:16]), data}, {layout.TreeA, gpt.RootVerity, gpt.GUID(tree.Root[16:]), hashes.Bytes()}} {
		q := part(i+1, p.name, p.typ, next, (int64(len(p.data))+mib-1)/mib*mib, "")
		q.GUID = p.guid
		table.Partitions = append(table.Partitions, q.Partition)
		if _, err := f.WriteAt(p.data, next); err != nil {
			t.Fatal(err)
		}
		next += q.Size()
	}
	if err := errors.Join(f.Truncate(next+mib), table.WriteTo(f, next+mib)); err != nil {
		t.Fatal(err)
	}
	return tree.Root
}

// An installBench is a machine that was started from a medium, beside an empty disk.
type installBench struct {
	*bench
	medium *bench
	hash   [32]byte
}

func newInstallBench(t *testing.T) *installBench {
	t.Helper()
	b := &installBench{bench: newBench(t, 3*gib+512*mib, false), medium: &bench{t: t, linux: newLinux(nil, noVault(t.TempDir())), file: filepath.Join(t.TempDir(), "medium")}}
	b.hash = mediumFile(t, b.medium.file)
	b.medium.attach()
	t.Cleanup(b.medium.detach)
	b.proc = t.TempDir()
	if err := errors.Join(os.Symlink("/proc/thread-self", b.proc+"/thread-self"),
		os.WriteFile(b.proc+"/cmdline", fmt.Appendf(nil, "bulkhead bulkhead.verity=%x\n", b.hash), 0o600)); err != nil {
		t.Fatal(err)
	}
	b.sees(b.medium)
	return b
}

// sees makes the machine one that was started from a disk.
func (b *installBench) sees(from *bench) {
	names := []string{filepath.Base(b.loop.Name()), filepath.Base(b.medium.loop.Name())}
	b.include = func(s string) bool { return slices.Contains(names, s) }
	b.rootDev = func() string { return attr(b.block(filepath.Base(from.device(2))), "dev") }
	b.loader = func() (gpt.GUID, error) {
		for _, d := range b.medium.tables() {
			if p, ok := d.ByName(layout.ESP); ok {
				return p.GUID, nil
			}
		}
		return gpt.GUID{}, errors.New("no ESP")
	}
}

// tables reads the disk's table.
func (b *bench) tables() []gpt.Table {
	n, err := size(b.loop)
	if err != nil {
		b.t.Fatal(err)
	}
	forget(b.loop)
	t, _, err := gpt.Read(b.loop, n)
	if err != nil {
		b.t.Fatal(err)
	}
	return []gpt.Table{t}
}

// restart is a restart of the machine: what is in its runtime folder is gone.
func (b *installBench) restart(from *bench) {
	b.t.Helper()
	b.reboot()
	b.runtime = b.t.TempDir()
	b.sees(from)
}

// TestInstallDisk installs to a disk behind a loop device, with a power cut before each of the steps that matter, and lets other people's tools judge.
func TestInstallDisk(t *testing.T) {
	isolate(t)
	for _, cut := range []Op{opLay, opAdd, opRoot, opBoot, ""} {
		t.Run("cut before "+string(cut), func(t *testing.T) {
			b := newInstallBench(t)
			want := selects(config.DiskSelector{Device: b.loop.Name()})
			want.StateSize = 64 * mib
			steps, err := plan(*want, b.read())
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range steps {
				if s.Op == cut {
					break
				}
				if err := b.Do(t.Context(), s); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
			if cut == "" && restart(b.read()) == "" {
				t.Error("all is done, and no restart is wanted")
			}
			b.restart(b.medium)
			for _, err := range b.round(nil) {
				t.Error(err)
			}
			want.Install.Disk.Device = b.loop.Name() // a loop device has another number now
			b.converge(want)
			b.checkMounts()
			if got := restart(b.read()) != ""; got != (cut != "") {
				t.Errorf("a restart is wanted: %v", got)
			}
			b.judge()
			if all, err := os.ReadDir(b.vars); err != nil || len(all) != 2 { // BootOrder, and one entry
				t.Errorf("the firmware's variables: %v, %v", all, err)
			}

			b.restart(b.bench)
			b.converge(want)
			if where, d := b.read().installed(); where != installRunning || d.Device != b.loop.Name() {
				t.Errorf("it is %q on %s", where, d)
			}
		})
	}
}

// judge asks sgdisk, fsck.vfat and veritysetup about the installed disk.
func (b *installBench) judge() {
	b.t.Helper()
	t := b.tables()[0]
	for name, guid := range map[string]gpt.GUID{layout.RootA: gpt.GUID(b.hash[:16]), layout.TreeA: gpt.GUID(b.hash[16:])} {
		if p, _ := t.ByName(name); p.GUID != guid || p.Attributes&unformatted != 0 {
			b.t.Errorf("%s: %+v", name, p)
		}
	}
	for _, tool := range []string{"sgdisk", "fsck.vfat", "veritysetup"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.t.Logf("PARTLY SKIPPED: no %s", tool)
			return
		}
	}
	if out := b.tool("sgdisk", "-v", b.file); !strings.Contains(out, "No problems found") {
		b.t.Error(out)
	}
	b.tool("fsck.vfat", "-n", b.device(1))
	b.tool("veritysetup", "verify", b.device(2), b.device(3), fmt.Sprintf("%x", b.hash))
}

// TestInstallRefuses asks the kernel layer for what the planner never would, or would not any more.
func TestInstallRefuses(t *testing.T) {
	isolate(t)
	b := newInstallBench(t)
	disk := b.loop.Name()
	refused := func(s Step, text string) {
		t.Helper()
		if err := b.Do(t.Context(), s); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want …%s…", s, err, text)
		}
	}
	refused(Step{Op: opRoot, Disk: disk}, "no installation was begun")
	refused(Step{Op: opBoot, Disk: disk}, "no installation was begun")
	refused(Step{Op: opRoot, Disk: b.medium.loop.Name()}, "no installation was begun")
	refused(Step{Op: opLay, Disk: b.medium.loop.Name(), Wipe: true}, "partitions meanwhile")
	if err := b.Do(t.Context(), Step{Op: opCreate, Disk: disk}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.loop.WriteAt([]byte("XFSB"), 129*mib); err != nil { // in the place of ROOT-A
		t.Fatal(err)
	}
	refused(Step{Op: opLay, Disk: disk}, "found xfs at 129MiB")
	if err := b.Do(t.Context(), Step{Op: opLay, Disk: disk, Wipe: true}); err != nil {
		t.Fatal(err)
	}
	refused(Step{Op: opBoot, Disk: disk}, "the root is not there yet")
	b.medium.damage(35*mib + 100)
	refused(Step{Op: opRoot, Disk: disk}, "the medium is damaged")
	if d := b.read(); d.disk(disk).named(layout.RootA).Attributes&unformatted == 0 || d.disk(disk).named(layout.RootA).GUID == gpt.GUID(b.hash[:16]) {
		t.Error("a root that is not whole looks like one")
	}
	b.medium.damage(35*mib + 100) // and mended
	if err := b.Do(t.Context(), Step{Op: opRoot, Disk: disk}); err != nil {
		t.Fatal(err)
	}
	b.loader = func() (gpt.GUID, error) { return newGUID(), nil }
	refused(Step{Op: opBoot, Disk: disk}, "no disk has the EFI partition")
	if no := b.read().Install.NoBoot; !strings.Contains(no, "taken out, or is a CD") {
		t.Errorf("NoBoot is %q", no)
	}
}

// damage turns a byte over.
func (b *bench) damage(at int64) {
	b.t.Helper()
	one := make([]byte, 1)
	_, err := b.loop.ReadAt(one, at)
	one[0] ^= 1
	if _, e := b.loop.WriteAt(one, at); err != nil || e != nil || b.loop.Sync() != nil {
		b.t.Fatal(err, e)
	}
}

// disk returns one by its device.
func (s State) disk(device string) Disk {
	i := slices.IndexFunc(s.Disks, func(d Disk) bool { return d.Device == device })
	return s.Disks[i]
}
