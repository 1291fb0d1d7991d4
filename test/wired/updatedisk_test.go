package wired

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/internal/verity"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

const (
	mib     = 1 << 20
	espSize = 34 * mib
)

// release is a signing key of the test, by number: 1 is the node's.
func release(n byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, ed25519.SeedSize))
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// An image is a version of the system as the image builder makes it, with a kernel that only says what it starts.
type image struct {
	root  bundle.Digest
	files [3][]byte
}

// makeImage makes one whose root has a mebibyte that all have, and some of its own.
func makeImage(t *testing.T, own byte, size int) image {
	t.Helper()
	var m image
	m.files[bundle.Root] = append(noise(1, mib), noise(own, size)...)
	tree, err := verity.Build(bytes.NewReader(m.files[bundle.Root]), []byte{own}, [16]byte{own})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := tree.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	m.files[bundle.Tree], m.root = b.Bytes(), tree.Root
	line := fmt.Sprintf("bulkhead bulkhead.verity=%s bulkhead.epoch=2", m.root)
	pe := make([]byte, 1024)
	copy(pe, "MZ")
	binary.LittleEndian.PutUint32(pe[60:], 64)
	copy(pe[64:], "PE\x00\x00")
	binary.LittleEndian.PutUint16(pe[64+6:], 1)
	section := pe[64+24:]
	copy(section, ".cmdline")
	binary.LittleEndian.PutUint32(section[8:], uint32(len(line)))
	binary.LittleEndian.PutUint32(section[16:], 512)
	binary.LittleEndian.PutUint32(section[20:], 512)
	copy(pe[512:], line)
	m.files[bundle.Kernel] = append(pe, noise(own, 200_000)...)
	return m
}

// bundle packs it.
func (m image) bundle(t *testing.T, version string, signer ed25519.PrivateKey, edit func(*bundle.Image)) (bundle.Head, []byte) {
	t.Helper()
	img := bundle.Image{Version: version, Architecture: "amd64", Epoch: 2, RootHash: m.root}
	for i, b := range m.files {
		img.Files[i] = filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(img.Files[i], b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if edit != nil {
		edit(&img)
	}
	var b bytes.Buffer
	h, err := bundle.Write(&b, img, signer)
	if err != nil {
		t.Fatal(err)
	}
	return h, b.Bytes()
}

// A disk is the pair of slots and the EFI partition, in memory.
type disk struct {
	*powercut.Disk
	running atomic.Pointer[bundle.Digest] // changed by a restart
}

type part struct{ powercut.Section }

func (part) Close() error { return nil }

func (d *disk) Look(context.Context) (slots.Layout, error) {
	t, _, err := gpt.Read(d.Disk, d.Size())
	l := slots.Layout{Running: *d.running.Load(), Epoch: 2}
	for i, name := range []string{"A", "B"} {
		r, _ := t.ByName("ROOT-" + name)
		v, _ := t.ByName("VERITY-" + name)
		l.Slots[i], l.Root[i], l.Tree[i] = bundle.Digest(append(r.GUID[:], v.GUID[:]...)), r.Size(), v.Size()
	}
	return l, err
}

func (d *disk) Open(name slots.PartName, _ slots.Mode) (slots.Part, error) {
	t, _, err := gpt.Read(d.Disk, d.Size())
	if err != nil {
		return nil, err
	}
	p, ok := t.ByName(string(name))
	if !ok {
		return nil, errors.New("no partition " + string(name))
	}
	return part{powercut.Section{Device: d.Disk, From: p.Start(), Length: p.Size()}}, nil
}

func (d *disk) Label(slot int, root bundle.Digest) error {
	t, _, err := gpt.Read(d.Disk, d.Size())
	if err != nil {
		return err
	}
	for i, p := range t.Partitions {
		switch p.Name {
		case "ROOT-" + slots.Label(slot):
			t.Partitions[i].GUID = gpt.GUID(root[:16])
		case "VERITY-" + slots.Label(slot):
			t.Partitions[i].GUID = gpt.GUID(root[16:])
		}
	}
	return t.WriteTo(d.Disk, d.Size())
}

// newDisk is a disk as it is installed. spare files fill the EFI partition.
func newDisk(t *testing.T, m image, version string, spare int64) *disk {
	t.Helper()
	run := func(argv ...string) {
		t.Helper()
		if _, err := exec.LookPath(argv[0]); err != nil {
			if os.Getenv("REQUIRE_ROOT") == "1" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
	}
	dir := t.TempDir()
	esp, kernel, fill := filepath.Join(dir, "esp"), filepath.Join(dir, "kernel"), filepath.Join(dir, "fill")
	err := errors.Join(os.WriteFile(esp, nil, 0o600), os.Truncate(esp, espSize), os.WriteFile(kernel, m.files[bundle.Kernel], 0o600), os.WriteFile(fill, nil, 0o600), os.Truncate(fill, spare))
	if err != nil {
		t.Fatal(err)
	}
	run("mkfs.vfat", "-F", "32", "-s", "1", "--invariant", esp)
	run("mmd", "-i", esp, "::EFI", "::EFI/Linux")
	run("mcopy", "-i", esp, kernel, "::EFI/Linux/bulkhead_0001_"+version+".efi")
	run("mcopy", "-i", esp, fill, "::fill")
	content, err := os.ReadFile(esp)
	if err != nil {
		t.Fatal(err)
	}
	table, b, next := gpt.Table{DiskGUID: gpt.GUID{9}}, make([]byte, 0, 48*mib), int64(mib)
	for i, p := range []struct {
		name string
		size int64
		guid gpt.GUID
		data []byte
	}{
		{"ESP", espSize, gpt.GUID{1}, content}, {"ROOT-A", 3 * mib, gpt.GUID(m.root[:16]), m.files[bundle.Root]}, {"VERITY-A", mib, gpt.GUID(m.root[16:]), m.files[bundle.Tree]},
		{"ROOT-B", 3 * mib, gpt.GUID{2}, nil}, {"VERITY-B", mib, gpt.GUID{3}, nil},
	} {
		table.Partitions = append(table.Partitions, gpt.Partition{Number: i + 1, Name: p.name, Type: gpt.Root, GUID: p.guid, First: uint64(next / 512), Last: uint64((next+p.size)/512) - 1})
		b = append(append(b, make([]byte, next-int64(len(b)))...), p.data...)
		next += p.size
	}
	d := powercut.New(append(b, make([]byte, next+mib-int64(len(b)))...))
	if err := table.WriteTo(d, d.Size()); err != nil {
		t.Fatal(err)
	}
	out := &disk{Disk: d}
	out.running.Store(&m.root)
	return out
}
