package machine

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/image"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/deploy/qemu/ovmf"
)

// TestFirmware boots the disk as a real machine does: UEFI with Secure Boot and our keys, systemd-boot, the signed kernel image. It judges
// from outside, with other people's tools and by the console, and lets the firmware refuse what was changed.
func TestFirmware(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	start := time.Now()
	if _, err := n.try(t.Context(), 6*time.Minute, "bhctl", "up", "--no-bootstrap", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
		"--kubernetes-port", fmt.Sprint(n.kubePort), "--image", filepath.Join(n.root, "out/image"), "--memory", "2048", "--cpus", fmt.Sprint(secureCPUs), "--firmware", "uefi", "--secure-boot", "--tpm"); err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
	t.Logf("» configured %s after power-on, through firmware, Secure Boot and TPM", time.Since(start).Round(100*time.Millisecond))
	log := n.run(t, "bhctl", "dmesg")
	for _, want := range []string{"Secure boot enabled", "Kernel is locked down from command line", "MSFT0101"} {
		if !strings.Contains(log, want) {
			t.Errorf("the kernel's log does not say %q", want)
		}
	}
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	n.run(t, "bhctl", "shutdown")
	if err := m.Wait(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	esp := newESP(t, n, m)
	esp.judge(t)
	t.Run("refused", func(t *testing.T) { refused(t, esp) })
	t.Run("iso", func(t *testing.T) { isoBoots(t, esp) })
	t.Run("enrolled by systemd-boot", func(t *testing.T) { enrolled(t, esp) })
}

// A machineESP is the EFI partition of a machine that is off.
type machineESP struct {
	n      *node
	m      qemu.Machine
	kernel string // name of the kernel image
	mtools string // how mtools names the partition
}

func newESP(t *testing.T, n *node, m qemu.Machine) *machineESP {
	t.Helper()
	manifest, err := image.ReadManifest(filepath.Join(n.root, "out/image"))
	if err != nil {
		t.Fatal(err)
	}
	return &machineESP{n: n, m: m, kernel: manifest.Boot.Name, mtools: filepath.Join(m.Dir, "disk.raw") + "@@1M"}
}

func (e *machineESP) tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := e.n.shell(t, "", name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func (e *machineESP) get(t *testing.T, name string) (file string, data []byte) {
	t.Helper()
	file = filepath.Join(t.TempDir(), filepath.Base(name))
	e.tool(t, "mcopy", "-n", "-i", e.mtools, "::/"+name, file)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return file, data
}

func (e *machineESP) put(t *testing.T, name string, data []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "new")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	e.tool(t, "mcopy", "-o", "-i", e.mtools, file, "::/"+name)
}

// judge asks sbverify, fsck.vfat and sgdisk about the disk as the node left it.
func (e *machineESP) judge(t *testing.T) {
	t.Helper()
	for _, name := range []string{"EFI/BOOT/BOOTX64.EFI", "EFI/systemd/systemd-bootx64.efi", e.kernel} {
		file, _ := e.get(t, name)
		if out := e.tool(t, "sbverify", "--cert", filepath.Join(e.n.root, "out/image/db.crt"), file); strings.Contains(out, "warning") {
			t.Errorf("sbverify on %s: %s", name, out)
		}
	}
	disk := filepath.Join(e.m.Dir, "disk.raw")
	if out := e.tool(t, "sgdisk", "-v", disk); !strings.Contains(out, "No problems found") {
		t.Errorf("sgdisk: %s", out)
	}
	partition := filepath.Join(t.TempDir(), "esp")
	e.tool(t, "dd", "if="+disk, "of="+partition, "bs=1M", "skip=1", "count=128", "conv=sparse")
	e.tool(t, "fsck.vfat", "-n", partition)
}

// console waits until the machine's console shows a pattern, and returns what it showed so far. The machine must not show the other.
func (e *machineESP) console(t *testing.T, limit time.Duration, want, never string) string {
	t.Helper()
	start := time.Now()
	yes, no := regexp.MustCompile(want), regexp.MustCompile(never)
	for {
		text, _ := os.ReadFile(e.m.Console())
		switch {
		case no.Match(text):
			t.Fatalf("the console shows %q:\n%s", never, text)
		case yes.Match(text):
			t.Logf("» the console shows %q after %s", want, time.Since(start).Round(100*time.Millisecond))
			return string(text)
		case time.Since(start) > limit:
			t.Fatalf("the console does not show %q within %s:\n%s", want, limit, text)
		}
		wait(t.Context(), 100*time.Millisecond)
	}
}

// once starts the machine, waits for what the console shows, and cuts the power.
func (e *machineESP) once(t *testing.T, want, never string) string {
	t.Helper()
	if err := e.m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := e.m.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	return e.console(t, 3*time.Minute, want, never)
}

const (
	reached = "root verified"
	denied  = "(Access [Dd]enied|Security [Vv]iolation)"
)

// refused changes one byte at a time of what the firmware starts. Nothing of it may run.
func refused(t *testing.T, e *machineESP) {
	_, kernel := e.get(t, e.kernel)
	at := bytes.Index(kernel, []byte("bulkhead.verity="))
	if at < 0 {
		t.Fatal("no command line in the kernel image")
	}
	changed := bytes.Clone(kernel)
	changed[at+len("bulkhead.verity=")] ^= 1 // still a digit
	unsigned, foreign := resigned(t, e, kernel)
	for name, image := range map[string][]byte{"a changed command line": changed, "no signature": unsigned, "somebody else's signature": foreign} {
		t.Log(name)
		e.put(t, e.kernel, image)
		e.once(t, denied, reached)
	}
	e.put(t, e.kernel, kernel)

	const loader = "EFI/BOOT/BOOTX64.EFI"
	_, boot := e.get(t, loader)
	changed = bytes.Clone(boot)
	changed[len(changed)/2] ^= 1
	e.put(t, loader, changed)
	e.once(t, denied, reached)
	e.put(t, loader, boot)

	e.once(t, reached, denied)
}

// resigned returns the image without a signature, and with one of a key that nobody has enrolled.
func resigned(t *testing.T, e *machineESP, image []byte) (unsigned, foreign []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	e.tool(t, "sbattach", "--remove", file)
	unsigned, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	key, cert := file+".key", file+".crt"
	e.tool(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=Bulkhead boot signing key", "-keyout", key, "-out", cert)
	e.tool(t, "sbsign", "--key", key, "--cert", cert, "--output", file, file)
	if foreign, err = os.ReadFile(file); err != nil {
		t.Fatal(err)
	}
	return unsigned, foreign
}

// isoBoots starts the machine from the ISO, as a disk that cannot be written, beside a disk with nothing on it.
func isoBoots(t *testing.T, e *machineESP) {
	e.n.run(t, filepath.Join(e.n.root, "out/bin/mkimage"), "convert", "iso", filepath.Join(e.n.root, "out/image"))
	m, err := qemu.New("iso")
	if err != nil {
		t.Fatal(err)
	}
	m.Memory, m.CPUs, m.Firmware, m.SecureBoot, m.TPM = 1024, secureCPUs, qemu.UEFI, true, true
	m.Extra = []string{"-drive", "if=none,id=iso,format=raw,readonly=on,file=" + filepath.Join(e.n.root, "out/image/bulkhead.iso"), "-device", "virtio-blk-pci,drive=iso,bootindex=1"}
	if err := m.Create(filepath.Join(e.n.root, "out/image"), nil); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Remove(); err != nil {
			t.Error(err)
		}
	}()
	disk := filepath.Join(m.Dir, "disk.raw")
	for _, size := range []int64{0, m.DiskSize} {
		if err := os.Truncate(disk, size); err != nil {
			t.Fatal(err)
		}
	}
	iso := &machineESP{n: e.n, m: m}
	iso.once(t, `root verified \(dm-verity, /dev/vdb2\)`, denied)
}

// enrolled boots with a firmware that has no keys: systemd-boot enrols ours from the EFI partition, and restarts into Secure Boot.
func enrolled(t *testing.T, e *machineESP) {
	empty, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(e.m.Dir, qemu.VarsFile)
	if err := os.WriteFile(file, empty, 0o600); err != nil {
		t.Fatal(err)
	}
	e.once(t, reached, denied)
	flash, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	vars, err := ovmf.Read(flash)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, v := range vars {
		names = append(names, v.Name)
	}
	for _, want := range []string{"PK", "KEK", "db"} {
		if !strings.Contains(" "+strings.Join(names, " ")+" ", " "+want+" ") {
			t.Errorf("%s was not enrolled: %v", want, names)
		}
	}
	// And then nothing else is started any more.
	_, kernel := e.get(t, e.kernel)
	changed := bytes.Clone(kernel)
	changed[len(changed)/2] ^= 1
	e.put(t, e.kernel, changed)
	e.once(t, denied, reached)
}
