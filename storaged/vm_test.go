package storaged

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
)

// TestVMCrypt runs the kernel layer where there is a device-mapper and a TPM: under Debian's kernel in QEMU, as the unit's user with the unit's
// capabilities. The guest is this test's own program (guest_test.go). The same disk is booted four times:
//
//	make      volumes are made; cryptsetup opens ours and we open its
//	grow      the TPM opens them; the disk has grown; keys are rotated
//	stolen    in another machine, with another TPM: locked, and unlocked with the recovery key
//	file      the same, with a key file from the firmware
//
// BULKHEAD_TEST_KERNEL is the folder of an unpacked kernel package (boot/vmlinuz-*, lib/modules).
func TestVMCrypt(t *testing.T) {
	kernel := os.Getenv("BULKHEAD_TEST_KERNEL")
	if kernel == "" {
		if os.Getenv("REQUIRE_VM") == "1" {
			t.Fatal("REQUIRE_VM=1, but BULKHEAD_TEST_KERNEL is not set")
		}
		t.Skip("needs a kernel: set BULKHEAD_TEST_KERNEL to the folder of an unpacked Debian kernel package")
	}
	for _, tool := range []string{"swtpm", "qemu-system-x86_64", "cryptsetup"} {
		testtpm.Need(t, tool)
	}
	m := newVM(t, kernel)
	out := m.boot("make", "")
	recovery := between(out, "RECOVERY ", "\n")
	if recovery == "" {
		t.Fatal("no recovery key")
	}
	m.judge(recovery)

	m.resize(5 * gib)
	out = m.boot("grow", "")
	rotated := between(out, "RECOVERY ", "\n")
	if rotated == "" || rotated == recovery {
		t.Errorf("after rotation the recovery key is %q, was %q", rotated, recovery)
	}
	m.judge(rotated)

	if err := os.RemoveAll(filepath.Join(m.dir, "tpm")); err != nil {
		t.Fatal(err)
	}
	m.boot("stolen", rotated)
	m.boot("file", "", "-fw_cfg", "name=opt/test.key,string="+strings.Repeat("k", 40))
}

func between(s, from, to string) string {
	_, rest, _ := strings.Cut(s, from)
	out, _, _ := strings.Cut(rest, to)
	return strings.TrimSpace(out)
}

type vm struct {
	t                            *testing.T
	dir, kernel, initrd, release string
	modules                      string
}

func newVM(t *testing.T, kernel string) *vm {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm") // short: swtpm's socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	paths, _ := filepath.Glob(kernel + "/boot/vmlinuz-*")
	if len(paths) != 1 {
		t.Fatalf("%s/boot has kernels %q", kernel, paths)
	}
	m := &vm{t: t, dir: dir, kernel: paths[0], initrd: dir + "/initrd", release: strings.TrimPrefix(filepath.Base(paths[0]), "vmlinuz-"), modules: kernel + "/lib/modules/"}
	m.makeInitrd()
	m.makeDisk()
	return m
}

// output runs a program on the host.
func (m *vm) output(argv ...string) []byte {
	m.t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("%v: %v\n%s%s", argv, err, out, stderr.Bytes())
	}
	return out
}

func (m *vm) read(path string) []byte {
	m.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	return b
}

// cpio is an archive in the form that the kernel unpacks.
type cpio struct {
	bytes.Buffer
	seen map[string]bool
}

func (c *cpio) add(name string, mode int, data []byte) {
	if c.seen[name] {
		return
	}
	if dir := filepath.Dir(name); dir != "." {
		c.add(dir, 0o040755, nil)
	}
	c.seen[name] = true
	fmt.Fprintf(c, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", c.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	c.Write(make([]byte, -c.Len()&3))
	c.Write(data)
	c.Write(make([]byte, -c.Len()&3))
}

// makeInitrd packs this program, the host's tools with their libraries, modules, and the image's signed policy.
func (m *vm) makeInitrd() {
	c := &cpio{seen: map[string]bool{}}
	program := m.dir + "/guest"
	m.output("go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", program, ".")
	c.add("init", 0o100755, m.read(program))
	library := regexp.MustCompile(`(/[^ ]+) \(0x`)
	for _, tool := range []string{"mkfs.ext4", "e2fsck", "cryptsetup"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			m.t.Fatal(err)
		}
		c.add("sbin/"+tool, 0o100755, m.read(path))
		for _, l := range library.FindAllStringSubmatch(string(m.output("ldd", path)), -1) {
			c.add(strings.TrimPrefix(l[1], "/"), 0o100755, m.read(l[1]))
		}
	}
	if found, _ := filepath.Glob("/lib/*/libgcc_s.so.1"); len(found) > 0 { // which libpthread loads when a thread ends
		c.add(strings.TrimPrefix(found[0], "/"), 0o100755, m.read(found[0]))
	}
	var list string
	for _, path := range []string{"drivers/block/virtio_blk", "drivers/firmware/qemu_fw_cfg", "drivers/md/dm-mod", "drivers/md/dm-crypt", "lib/crypto/gf128mul", "crypto/xts", "crypto/cryptd", "crypto/crypto_simd", "arch/x86/crypto/aesni-intel"} {
		name := "m/" + filepath.Base(path) + ".ko"
		c.add(name, 0o100644, m.output("xz", "-dc", m.modules+m.release+"/kernel/"+path+".ko.xz"))
		list += "/" + name + "\n"
	}
	c.add("m/list", 0o100644, []byte(list))
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "state", "var", "mnt", "usr/share/bulkhead"} {
		c.add(dir, 0o040755, nil)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		m.t.Fatal(err)
	}
	sig, err := pcrpolicy.Sign(key, pcrpolicy.Policy{Epoch: 1}) // nothing measures into PCR 11 when the kernel is started directly
	if err != nil {
		m.t.Fatal(err)
	}
	public, err := pcrpolicy.EncodeKey(&key.PublicKey)
	if err != nil {
		m.t.Fatal(err)
	}
	c.add("extra/tpm2-pcr-signature.json", 0o100444, sig)
	c.add("extra/tpm2-pcr-public-key.pem", 0o100444, public)
	c.add("usr/share/bulkhead/pcr.pub", 0o100444, public)
	unit := m.read("unit.json")
	c.add("unit.json", 0o100444, unit)
	c.add("TRAILER!!!", 0, nil)
	if err := os.WriteFile(m.initrd, c.Bytes(), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// makeDisk makes the image's disk, and a small one for cryptsetup.
func (m *vm) makeDisk() {
	const image = 6 * mib
	f, err := os.Create(m.dir + "/disk")
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	tab := gpt.Table{DiskGUID: newGUID()}
	for i, n := range []string{"ROOT-A", "VERITY-A", "ROOT-B", "VERITY-B"} {
		p := part(i+1, n, gpt.Root, int64(i+1)*mib, mib, "")
		p.GUID = newGUID()
		tab.Partitions = append(tab.Partitions, p.Partition)
	}
	if err := errors.Join(f.Truncate(image), tab.WriteTo(f, image), f.Truncate(3*gib)); err != nil {
		m.t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(m.dir+"/other", nil, 0o600), os.Truncate(m.dir+"/other", 64*mib)); err != nil {
		m.t.Fatal(err)
	}
}

func (m *vm) resize(size int64) {
	if err := os.Truncate(m.dir+"/disk", size); err != nil {
		m.t.Fatal(err)
	}
}

// boot runs one phase in the guest and returns what it printed.
func (m *vm) boot(phase, key string, more ...string) string {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 5*time.Minute)
	defer cancel()
	state, sock := m.dir+"/tpm", m.dir+"/tpm.sock"
	if err := os.MkdirAll(state, 0o700); err != nil {
		m.t.Fatal(err)
	}
	tpm := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--ctrl", "type=unixio,path="+sock, "--terminate", "--log", "file="+m.dir+"/swtpm.log")
	if err := tpm.Start(); err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = tpm.Process.Kill(); _ = tpm.Wait() }()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		} else if time.Now().After(end) {
			m.t.Fatal("swtpm does not come up")
		}
	}
	start := time.Now()
	// One processor, as in TestVM of init.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append([]string{
		"-M", "q35", "-accel", "tcg,thread=multi", "-cpu", qemu.EmulatedCPU, "-smp", "1", "-m", "1024", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", m.kernel, "-initrd", m.initrd, "-append", "console=ttyS0 quiet loglevel=4 panic=-1 " + qemu.EmulatedCommandLine + " bulkhead.epoch=1 test.phase=" + phase + " test.key=" + key,
		"-drive", "if=virtio,format=raw,cache=unsafe,file=" + m.dir + "/disk", "-drive", "if=virtio,format=raw,cache=unsafe,file=" + m.dir + "/other",
		"-chardev", "socket,id=tpm,path=" + sock, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
	}, more...)...)
	raw, err := cmd.CombinedOutput()
	out := strings.ReplaceAll(string(raw), "\r", "")
	m.t.Logf("phase %s took %s\n%s", phase, time.Since(start).Round(time.Second), out)
	if err != nil {
		m.t.Fatalf("qemu: %v", err)
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, "TEST WRONG") {
			m.t.Errorf("in the machine: %s", line)
		}
	}
	if !strings.Contains(out, "TEST DONE "+phase) {
		m.t.Fatalf("phase %s did not end", phase)
	}
	return out
}

// judge lets cryptsetup look at both volumes on the host: whether it finds fault with the headers, and whether the recovery key opens them.
func (m *vm) judge(recovery string) {
	m.t.Helper()
	f, err := os.Open(m.dir + "/disk")
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	n, err := size(f)
	if err != nil {
		m.t.Fatal(err)
	}
	table, _, err := gpt.Read(f, n)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, v := range volumes {
		for _, p := range table.Partitions {
			if !v.owns(p) {
				continue
			}
			header := make([]byte, luks.DataOffset)
			if _, err := f.ReadAt(header, p.Start()); err != nil {
				m.t.Fatal(err)
			}
			path := m.dir + "/header"
			if err := errors.Join(os.WriteFile(path, header, 0o600), os.Truncate(path, p.Size())); err != nil {
				m.t.Fatal(err)
			}
			cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file=-", path)
			cmd.Stdin = strings.NewReader(recovery)
			if out, err := cmd.CombinedOutput(); err != nil {
				m.t.Errorf("cryptsetup does not open %s with the recovery key: %v\n%s", v.name, err, out)
			}
			if out := string(m.output("cryptsetup", "luksDump", path)); !strings.Contains(out, "aes-xts-plain64") || !strings.Contains(out, "sector: 4096") {
				m.t.Errorf("luksDump of %s:\n%s", v.name, out)
			}
		}
	}
}
