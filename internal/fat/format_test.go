package fat

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/powercut"
)

// TestFormat makes file systems of all sizes that Format shapes differently, fills them as an installation does, and lets fsck.vfat and mtools judge.
func TestFormat(t *testing.T) {
	for _, size := range []int64{34 << 20, 128 << 20, 300 << 20} {
		d := powercut.New(make([]byte, size))
		rand.NewChaCha8([32]byte{1}).Read(d.Content()[:4<<20]) // what was there before
		if err := Format(d, size, 0x12345678, "ESP"); err != nil {
			t.Fatal(err)
		}
		v, err := Open(d, size)
		if err != nil {
			t.Fatalf("%d: %v", size, err)
		}
		want := map[string][]byte{}
		for _, f := range []struct{ dir, name string }{
			{"EFI/BOOT", "BOOTX64.EFI"}, {"EFI/Linux", "bulkhead_0001_0.1.0.efi"}, {"loader", "loader.conf"}, {"loader/keys/auto", "PK.auth"}, {"loader/keys/auto", "KEK.auth"},
			{"loader/keys/auto", "db.auth"}, {"EFI/systemd", "systemd-bootx64.efi"},
		} {
			if err := v.Mkdir(f.dir); err != nil {
				t.Fatal(err)
			}
			data := bytes.Repeat([]byte(f.name), 1000)
			w, err := v.Create(f.dir, f.name, int64(len(data)))
			if err == nil {
				_, err = w.WriteAt(data, 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			want[f.dir+"/"+f.name] = data
		}
		judge(t, d.Content(), want)
	}
	if err := Format(powercut.New(make([]byte, 1<<20)), 1<<20, 1, "ESP"); err == nil {
		t.Error("a mebibyte was formatted")
	}
	d := powercut.New(make([]byte, 34<<20))
	if err := Format(d, 34<<20, 1, "ESP"); err != nil {
		t.Fatal(err)
	}
	v, err := Open(d, 34<<20)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Create("", "EFI", 1); err != nil {
		t.Fatal(err)
	}
	if err := v.Mkdir("EFI/BOOT"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a folder in the place of a file: %v", err)
	}
}

// judge asks the tools of other people.
func judge(t *testing.T, content []byte, want map[string][]byte) {
	t.Helper()
	for _, tool := range []string{"fsck.vfat", "mcopy"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("REQUIRE_ROOT") == "1" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	file := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("fsck.vfat", "-n", "-v", file).CombinedOutput(); err != nil {
		t.Errorf("fsck.vfat: %v\n%s", err, out)
	}
	for name, data := range want {
		out, err := exec.Command("mcopy", "-i", file, "::/"+name, "-").Output()
		if err != nil || !bytes.Equal(out, data) {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(out), err, len(data))
		}
	}
}

// TestFormatCuts cuts the power: what is there is not taken for a file system, or is one without damage.
func TestFormatCuts(t *testing.T) {
	const size = 34 << 20
	d := powercut.New(make([]byte, size))
	if err := Format(d, size, 7, "OLD"); err != nil {
		t.Fatal(err)
	}
	d.Forget()
	if err := Format(d, size, 1, "ESP"); err != nil {
		t.Fatal(err)
	}
	v, err := Open(d, size)
	if err == nil {
		err = v.Mkdir("EFI/BOOT")
	}
	if err == nil {
		err = v.Mkdir("loader/keys/auto")
	}
	if err != nil {
		t.Fatal(err)
	}
	n := d.Cuts(rand.New(rand.NewPCG(1, 2)), 2, func(m *powercut.Image) {
		v, err := Open(m, size)
		if err != nil {
			return
		}
		if err := v.Reclaim(func(a, _ string) string { return a }); err != nil {
			t.Errorf("it opens, but: %v", err)
		}
		if err := errors.Join(v.Mkdir("EFI/BOOT"), v.Mkdir("loader/keys/auto")); err != nil {
			t.Errorf("it does not go on: %v", err)
		}
	})
	t.Logf("%d states", n)
}
