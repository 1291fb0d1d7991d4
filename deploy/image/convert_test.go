package image

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

// lookAtForms converts an image and looks at the results with other people's tools.
func lookAtForms(t *testing.T, m Manifest, dir string) {
	t.Helper()
	for _, name := range Formats() {
		first, err := Convert(t.Context(), dir, name)
		if err != nil {
			t.Fatal(err)
		}
		if second, err := Convert(t.Context(), dir, name); err != nil || second != first {
			t.Errorf("%s: twice gives %v and %v, %v", name, first, second, err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	testtool.Run(t, testtool.Path(t, "qemu-img", "qemu-utils"), "compare", filepath.Join(dir, diskFile), filepath.Join(dir, "bulkhead.qcow2"))
	iso := filepath.Join(dir, "bulkhead.iso")
	if out := testtool.Run(t, testtool.Path(t, "xorriso", "xorriso"), "-indev", iso, "-report_el_torito", "plain"); !strings.Contains(out, "El Torito boot img :   1  UEFI  y") {
		t.Errorf("xorriso: %s", out)
	}
	if out := testtool.Run(t, testtool.Path(t, "sgdisk", "gdisk"), "-v", iso); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk: %s", out)
	}
	data, err := os.ReadFile(iso)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(iso)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, health, err := gpt.Read(f, int64(len(data)))
	if err != nil || !health.OK() || len(table.Partitions) != 3 {
		t.Fatalf("%+v, %+v, %v", table, health, err)
	}
	part := func(i int, file string) string {
		p := table.Partitions[i]
		out := filepath.Join(t.TempDir(), file)
		if err := os.WriteFile(out, data[p.Start():p.Start()+p.Size()], 0o600); err != nil {
			t.Fatal(err)
		}
		return out
	}
	esp := part(0, "esp")
	testtool.Run(t, testtool.Path(t, "fsck.vfat", "dosfstools"), "-n", esp)
	kernel := filepath.Join(t.TempDir(), "kernel")
	testtool.Run(t, testtool.Path(t, "mcopy", "mtools"), "-n", "-i", esp, "::/"+m.Boot.Name, kernel)
	testtool.Run(t, testtool.Path(t, "sbverify", "sbsigntool"), "--cert", filepath.Join(dir, "db.crt"), kernel)
	root, err := hex.DecodeString(m.RootHash)
	if err != nil {
		t.Fatal(err)
	}
	for i, half := range [][]byte{nil, root[:16], root[16:]} {
		if half != nil && table.Partitions[i].GUID != gpt.GUID(half) {
			t.Errorf("partition %d has the GUID %s: PID 1 will not find it", i+1, table.Partitions[i].GUID)
		}
	}
	testtool.Run(t, testtool.Path(t, "veritysetup", "cryptsetup-bin"), "verify", part(1, "root"), part(2, "tree"), m.RootHash)
}

func TestConvertRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Convert(t.Context(), dir, "vmdk"); err == nil || !strings.Contains(err.Error(), "want qcow2 or iso") {
		t.Errorf("format: %v", err)
	}
	if _, err := Convert(t.Context(), dir, "iso"); err == nil || !strings.Contains(err.Error(), "manifest.json") {
		t.Errorf("no image: %v", err)
	}
}
