package judge

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testtool"
	"github.com/bulkhead-os/bulkhead/services/machined/store"
)

// aState is a file system as STATE's, with two generations of machined's on it.
func aState(t *testing.T, label string) (image string) {
	t.Helper()
	mkfs, debugfs := testtool.Path(t, "mkfs.ext4", "e2fsprogs"), testtool.Path(t, "debugfs", "e2fsprogs")
	dir := t.TempDir()
	image = filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 64<<20)); err != nil {
		t.Fatal(err)
	}
	testtool.Run(t, mkfs, "-q", "-b", "4096", "-g", "8192", "-L", label, "-O", "metadata_csum,64bit", image)
	folder, err := store.OpenFolder(dir, "generations")
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	s, err := store.Open(folder)
	for _, text := range []string{"kind: One\n", "kind: Two\n"} {
		if err == nil {
			_, err = s.Add(store.Generation{Applied: time.Unix(1, 0), Documents: []byte(text)})
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	commands := "mkdir machined\nmkdir machined/generations\nmkdir trustd\n"
	for _, name := range []string{"00000001.generation", "00000002.generation"} {
		commands += "write " + filepath.Join(dir, "generations", name) + " machined/generations/" + name + "\n"
	}
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte(commands), 0o600); err != nil {
		t.Fatal(err)
	}
	testtool.Run(t, debugfs, "-w", "-f", script, image)
	return image
}

// change overwrites a piece of a file.
func change(t *testing.T, file string, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestMountable(t *testing.T) {
	for _, c := range []struct {
		name, label string
		spoil       func(image string)
		repaired    bool
		want        string
	}{
		{"in order", stateLabel, nil, false, ""},
		{"a torn superblock", stateLabel, func(image string) { change(t, image, 1024+0x274, []byte{1}) }, true, ""},
		{"both superblocks", stateLabel, func(image string) {
			change(t, image, 1024+0x274, []byte{1})
			change(t, image, 8192*4096, make([]byte, 1024))
		}, true, "it needs a person"},
		{"another system's", "data", nil, false, `found ext4 "data" where the file system ext4 "BULKHEAD-STATE" must be`},
		{"overwritten", stateLabel, func(image string) { change(t, image, 0, make([]byte, 4096)) }, false, "found data of unknown kind where"},
	} {
		image := aState(t, c.label)
		if c.spoil != nil {
			c.spoil(image)
		}
		repaired, err := mountable(image)
		if repaired != c.repaired || (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: repaired %v, %v", c.name, repaired, err)
		}
		if err != nil {
			continue
		}
		dir := t.TempDir()
		if err := errors.Join(dump(image, dir), sound(image)); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if n, text, err := newest(filepath.Join(dir, "machined")); n != 2 || text != "kind: Two\n" || err != nil {
			t.Errorf("%s: generation %d, %q, %v", c.name, n, text, err)
		}
	}
}

// A generation that is not whole is nothing that machined leaves.
func TestNewest(t *testing.T) {
	image, dir := aState(t, stateLabel), t.TempDir()
	if err := dump(image, dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "machined", "generations", "00000002.generation")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, bytes.Replace(b, []byte("Two"), []byte("Too"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, _, err := newest(filepath.Join(dir, "machined")); n != 1 || err == nil {
		t.Errorf("generation %d, %v", n, err)
	}
	if n, _, err := newest(t.TempDir()); n != 0 || err != nil {
		t.Errorf("none: generation %d, %v", n, err)
	}
}

func TestRootHash(t *testing.T) {
	for _, b := range [][]byte{nil, []byte("MZ"), make([]byte, 4096)} {
		if _, err := rootHash(b); err == nil {
			t.Errorf("%d bytes have a root hash", len(b))
		}
	}
}
