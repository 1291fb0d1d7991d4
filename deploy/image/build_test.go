package image

import (
	"bytes"
	"encoding/hex"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/deploy/image/uki"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtool"
	"github.com/bulkhead-os/bulkhead/storaged/enrol"
)

// TestBuild makes an image of the real packages twice, and looks at it with other people's tools.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches 40 MB once and packs a root")
	}
	dir, err := debian.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	folder, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := LoadKeys(folder)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Kubernetes: "none", Version: "0.0.1", Epoch: 1, Level: 1, Append: "one=1 two", Keys: keys, AllowMissing: true, Cache: debian.Cache{Dir: dir, Log: slog.New(slog.DiscardHandler)}, Log: slog.New(slog.DiscardHandler)}
	lock, err := Lock()
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Cache.Fetch(t.Context(), lock); err != nil && os.Getenv("CI") == "" {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	build := func() (Manifest, string) {
		cfg.Bin, cfg.Out = t.TempDir(), filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(filepath.Join(cfg.Bin, "init"), fakeELF("", nil, nil), 0o700); err != nil {
			t.Fatal(err)
		}
		m, built, err := Build(t.Context(), cfg)
		if err != nil || !built {
			t.Fatal(built, err)
		}
		return m, cfg.Out
	}
	first, out := build()
	second, _ := build()
	if !reflect.DeepEqual(first, second) {
		t.Errorf("two builds differ:\n%+v\n%+v", first, second)
	}
	if _, built, err := Build(t.Context(), cfg); built || err != nil {
		t.Errorf("a third build of the same: %v, %v", built, err)
	}
	cfg.Version, cfg.Epoch = "0.0.2", 2
	if m, built, err := Build(t.Context(), cfg); !built || err != nil || m.RootHash == first.RootHash {
		t.Errorf("a build of another version: %v, %v", built, err)
	}
	cfg.Append = "one=1\ntwo"
	if _, _, err := Build(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "printable ASCII") {
		t.Errorf("two lines for the kernel: %v", err)
	}
	cfg.Append = ""
	look(t, first, out)
	lookAtBoot(t, first, out, keys)
	lookAtForms(t, first, out)
	cfg.AllowMissing = false
	if _, _, err := Build(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "bulkheadd") || !strings.Contains(err.Error(), "--allow-missing") {
		t.Errorf("missing binaries: %v", err)
	}
}

func look(t *testing.T, m Manifest, dir string) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	table, health, err := gpt.Read(f, fi.Size())
	if err != nil || !health.OK() {
		t.Fatalf("partition table: %v, %+v", err, health)
	}
	a, _ := table.ByName("ROOT-A")
	if want := m.RootHash[:32]; strings.ReplaceAll(a.GUID.String(), "-", "") != want {
		t.Errorf("ROOT-A: GUID %s, want %s", a.GUID, want)
	}
	head := make([]byte, 4)
	if _, err := f.ReadAt(head, a.Start()); err != nil || string(head) != "hsqs" {
		t.Errorf("ROOT-A starts with %q, %v", head, err)
	}
	for tool, args := range map[string][]string{
		"veritysetup": {"verify", filepath.Join(dir, "root.squashfs"), filepath.Join(dir, "root.verity"), m.RootHash},
		"unsquashfs":  {"-lln", filepath.Join(dir, "root.squashfs")},
	} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Log("no " + tool)
			continue
		}
		out, err := exec.Command(tool, args...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", tool, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if tool == "unsquashfs" && strings.Contains(line, "squashfs-root") && !strings.Contains(line, " 0/0 ") {
				t.Errorf("not of root: %s", line)
			}
		}
	}
}

// lookAtBoot judges what a firmware starts: with sbverify, mtools and fsck.vfat, and by reading it again.
func lookAtBoot(t *testing.T, m Manifest, dir string, keys Keys) {
	t.Helper()
	sbverify, mcopy := testtool.Path(t, "sbverify", "sbsigntool"), testtool.Path(t, "mcopy", "mtools")
	cert := filepath.Join(dir, "db.crt")
	esp := filepath.Join(t.TempDir(), "esp")
	disk, err := os.ReadFile(filepath.Join(dir, diskFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(esp, disk[mib:mib+espSize], 0o600); err != nil {
		t.Fatal(err)
	}
	testtool.Run(t, testtool.Path(t, "fsck.vfat", "dosfstools"), "-n", esp)
	read := func(name string) (string, []byte) {
		file := filepath.Join(t.TempDir(), "file")
		testtool.Run(t, mcopy, "-n", "-i", esp, "::/"+name, file)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return file, b
	}
	for _, name := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi", m.Boot.Name} {
		file, _ := read(name)
		if out := testtool.Run(t, sbverify, "--cert", cert, file); strings.Contains(out, "warning") {
			t.Errorf("%s: %s", name, out)
		}
	}
	if _, b := read("loader/keys/auto/db.auth"); !bytes.Equal(b, keys.Enrol["db.auth"]) {
		t.Error("db.auth is another one")
	}
	_, onESP := read(m.Boot.Name)
	image, err := os.ReadFile(filepath.Join(dir, kernelFile))
	if err != nil || !bytes.Equal(image, onESP) {
		t.Fatalf("the kernel image in the EFI partition is not %s: %v", kernelFile, err)
	}
	lookAtSections(t, m, image)
	f, err := os.Open(filepath.Join(dir, updateFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	public, err := keys.publicKeys()
	if err != nil {
		t.Fatal(err)
	}
	nodesKeys(t, public, image)
	trusted, err := bundle.ParseKeys(public["release.pub"])
	if err != nil {
		t.Fatal(err)
	}
	r, err := bundle.NewReader(f, trusted)
	if err != nil || r.Manifest.Version != m.Version || r.Manifest.RootHash.String() != m.RootHash {
		t.Fatalf("the update is of %+v: %v", r, err)
	}
	if err := r.Each(func(int, int, []byte) error { return nil }); err != nil {
		t.Error(err)
	}
}

func lookAtSections(t *testing.T, m Manifest, image []byte) {
	t.Helper()
	sections, err := uki.Sections(image)
	if err != nil {
		t.Fatal(err)
	}
	data := map[string][]byte{}
	var measured []pcrpolicy.Section
	for _, s := range sections {
		data[s.Name] = s.Data
		if slices.Contains(strings.Fields(".linux .osrel .cmdline .initrd .uname .sbat .pcrpkey"), s.Name) {
			measured = append(measured, pcrpolicy.Section(s))
		}
	}
	if len(measured) != 7 {
		t.Errorf("sections: %v", slices.Sorted(maps.Keys(data)))
	}
	if got := string(data[".cmdline"]); got != m.Cmdline || !strings.Contains(got, m.RootHash) || !strings.Contains(got, " bulkhead.epoch=1 ") || !strings.HasSuffix(got, " one=1 two") {
		t.Errorf(".cmdline is %q", got)
	}
	if text := string(data[".osrel"]); strings.Contains(text, "VERSION") || strings.Contains(text, "BUILD_ID") || !strings.Contains(text, "ID=bulkhead\n") {
		t.Errorf("systemd-boot would order by a version in .osrel, not by the file's name:\n%s", text)
	}
	pcr, err := pcrpolicy.PredictPCR11(measured)
	if err != nil || hex.EncodeToString(pcr[:]) != m.Boot.PCR11 {
		t.Errorf("PCR 11 is predicted as %x, the manifest says %s: %v", pcr, m.Boot.PCR11, err)
	}
	key, err := pcrpolicy.ParseKey(data[".pcrpkey"])
	if err != nil {
		t.Fatal(err)
	}
	signature, err := pcrpolicy.ParseSignature(data[".pcrsig"])
	if err != nil {
		t.Fatal(err)
	}
	want, err := pcrpolicy.Policy{PCR11: pcr, Epoch: 1}.Digest()
	if err := signature.Verify(key); err != nil || signature.Policy != want {
		t.Errorf("the signed policy is %x, want %x: %v", signature.Policy, want, err)
	}
	if err != nil {
		t.Error(err)
	}
}

// nodesKeys lets storaged read what the root has for the firmware, and find that the image is signed for it.
func nodesKeys(t *testing.T, public map[string][]byte, image []byte) {
	t.Helper()
	folder := t.TempDir()
	for name, data := range public {
		if err := os.WriteFile(filepath.Join(folder, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := enrol.ReadKeys(folder)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := keys.Covers(bytes.NewReader(image), int64(len(image))); !ok || err != nil {
		t.Errorf("the node takes its own kernel for foreign: %v, %v", ok, err)
	}
}
