package image

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

func someFiles(kernel int) []espFile {
	return espFiles("1.2.3-rc.1", make([]byte, 120_000), make([]byte, kernel), map[string][]byte{"PK.auth": {1}, "KEK.auth": {2}, "db.auth": {3}})
}

// TestESPFits lets mkfs.vfat and fsck.vfat count: what is thought to be there must be, and what is thought to be taken is enough.
func TestESPFits(t *testing.T) {
	fsck := testtool.Path(t, "fsck.vfat", "dosfstools")
	testtool.Path(t, "mcopy", "mtools")
	count := regexp.MustCompile(`, (\d+)/(\d+) clusters`)
	for _, size := range []int{1, 20 << 20} {
		files := someFiles(size)
		file := filepath.Join(t.TempDir(), "esp")
		if err := makeESP(t.Context(), file, espSize, 7, files); err != nil {
			t.Fatal(err)
		}
		m := count.FindStringSubmatch(testtool.Run(t, fsck, "-n", file))
		if m == nil {
			t.Fatal("fsck.vfat tells no clusters")
		}
		taken, _ := strconv.ParseInt(m[1], 10, 64)
		all, _ := strconv.ParseInt(m[2], 10, 64)
		if need := fatNeed(files); need < taken || need > taken+20 {
			t.Errorf("kernel of %d bytes: %d clusters needed, fsck counts %d", size, need, taken)
		}
		if have := fatClusters(espSize); have > all || have < all-100 {
			t.Errorf("%d clusters, fsck counts %d", have, all)
		}
	}
	if err := espFits(someFiles(62<<20), 62<<20); err != nil {
		t.Error(err)
	}
	err := espFits(someFiles(64<<20), 64<<20)
	if err == nil || !strings.Contains(err.Error(), "two kernel images of 67108864 bytes") || !strings.Contains(err.Error(), "more than its 128 MiB hold") {
		t.Errorf("two of 64 MiB: %v", err)
	}
}

func TestESPSame(t *testing.T) {
	testtool.Path(t, "mcopy", "mtools")
	testtool.Path(t, "mkfs.vfat", "dosfstools")
	var got [2]string
	for i := range got {
		file := filepath.Join(t.TempDir(), "esp")
		if err := makeESP(t.Context(), file, 40*mib, 7, someFiles(1000)); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		got[i] = string(b)
		if serial := b[67:71]; string(serial) != "\x07\x00\x00\x00" {
			t.Errorf("serial number % x", serial)
		}
	}
	if got[0] != got[1] {
		t.Error("two file systems of the same differ")
	}
}

func TestNames(t *testing.T) {
	if got := kernelName(1, "0.1.0"); got != "EFI/Linux/bulkhead_0001_0.1.0.efi" {
		t.Error(got)
	}
	if got, want := fmt.Sprint(folders(someFiles(1))), "[EFI EFI/BOOT EFI/systemd EFI/Linux loader loader/keys loader/keys/auto]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
