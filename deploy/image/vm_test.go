package image

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// TestVMMeasured starts a kernel image of ours, with a PID 1 that only tells what it sees, through firmware and a TPM: PCR 11 is what
// was predicted, and the signature that goes with it is where PID 1 looks.
func TestVMMeasured(t *testing.T) {
	if os.Getenv("BULKHEAD_VM") == "" {
		t.Skip("needs a virtual machine: make test-vm")
	}
	image, boot := measuredImage(t)
	k, err := boot.kernel(strings.Repeat("5", 64))
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(image, diskFile)
	esp := filepath.Join(t.TempDir(), "esp")
	if err := makeESP(t.Context(), esp, espSize, 1, boot.files(k)); err != nil {
		t.Fatal(err)
	}
	writeESPDisk(t, disk, esp)
	t.Setenv("BULKHEAD_MACHINES", t.TempDir())
	zero := strings.Repeat("0", 64)
	plain := measure(t, "plain", image)
	for what, want := range map[string]string{
		"pcr 11":  boot.describe(k).PCR11,
		"pcr 12":  zero,
		"cmdline": "[" + cmdline(strings.Repeat("5", 64), 1, "") + "]",
		"extra":   "[/.extra/os-release /.extra/tpm2-pcr-public-key.pem /.extra/tpm2-pcr-signature.json]",
	} {
		if plain[what] != want {
			t.Errorf("%s is %q, want %q", what, plain[what], want)
		}
	}
	// Whoever has the machine can add to the kernel's command line, Secure Boot or not. PCR 11 does not show it, PCR 12 does: a disk's key
	// must depend on both.
	added := measure(t, "added", image, "-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=added=1")
	if !strings.HasSuffix(added["cmdline"], " added=1]") || added["pcr 11"] != plain["pcr 11"] || added["pcr 12"] == zero {
		t.Errorf("words added by SMBIOS: %v", added)
	}
}

// measure boots a machine once, with more arguments for QEMU, and returns what its PID 1 tells.
func measure(t *testing.T, name, image string, more ...string) map[string]string {
	t.Helper()
	m, err := qemu.New(name)
	if err != nil {
		t.Fatal(err)
	}
	m.Memory, m.DiskSize, m.Firmware, m.SecureBoot, m.TPM, m.Extra = 1024, 1<<30, qemu.UEFI, true, true, more
	if err := m.Create(image, nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	start := time.Now()
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	waited := m.Wait(t.Context(), 3*time.Minute)
	console, err := os.ReadFile(m.Console())
	if waited != nil || err != nil {
		t.Fatalf("%v, %v; the console:\n%s", waited, err, console)
	}
	t.Logf("%s: power-on to power-off took %s", name, time.Since(start).Round(100*time.Millisecond))
	told := map[string]string{}
	for _, line := range regexp.MustCompile(`(?m)^TEST (\w+(?: \d+)?) (.*?)\r?$`).FindAllStringSubmatch(string(console), -1) {
		told[line[1]] = line[2]
	}
	if len(told) == 0 {
		t.Fatalf("PID 1 told nothing; the console:\n%s", console)
	}
	return told
}

// measuredImage returns a folder with all that a machine is made of but the disk, and what its kernel image is made of.
func measuredImage(t *testing.T) (dir string, boot bootSet) {
	t.Helper()
	dir = t.TempDir()
	init := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-o", init, "./testdata/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cache, err := debian.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	lock, err := Lock()
	if err != nil {
		t.Fatal(err)
	}
	c := debian.Cache{Dir: cache, Log: slog.New(slog.DiscardHandler)}
	if err := c.Fetch(t.Context(), lock); err != nil {
		t.Fatal(err)
	}
	files, err := c.Read(t.Context(), lock, wanted)
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := readKernel(t.Context(), files)
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
	kernel.stage1 = nil
	initramfs, err := makeInitramfs(init, kernel)
	if err != nil {
		t.Fatal(err)
	}
	if boot, err = newBootSet(Config{Version: "0.0.1", Epoch: 1, Keys: keys}, files, kernel, initramfs); err != nil {
		t.Fatal(err)
	}
	small := map[string][]byte{"vmlinuz": kernel.vmlinuz, "initramfs.cpio": initramfs, "cmdline": []byte("x\n")}
	for name, c := range keys.Certificates {
		small[name+".crt"] = certificatePEM(c)
	}
	if err := writeFiles(dir, small); err != nil {
		t.Fatal(err)
	}
	return dir, boot
}

// writeESPDisk writes a disk with an EFI partition and nothing else.
func writeESPDisk(t *testing.T, disk, esp string) {
	t.Helper()
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = espSize + 2*mib
	table := gpt.Table{DiskGUID: derived("disk", [32]byte{}), Partitions: []gpt.Partition{{
		Number: 1, Type: gpt.EFISystem, GUID: derived("ESP", [32]byte{}), Name: "ESP", First: mib / gpt.SectorSize, Last: (mib+espSize)/gpt.SectorSize - 1,
	}}}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := copyTo(f, mib, esp); err != nil {
		t.Fatal(err)
	}
	if err := table.WriteTo(f, size); err != nil {
		t.Fatal(err)
	}
}
