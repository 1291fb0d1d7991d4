package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/hardening"
)

// TestVM boots this program, with units of its own, from a verified disk under Debian's kernel in QEMU. The judge of
// testdata/vm/probe runs in there as a unit and prints what it finds.
//
// BULKHEAD_TEST_KERNEL is the folder of an unpacked kernel package (boot/vmlinuz-*, lib/modules).
func TestVM(t *testing.T) {
	kernel := os.Getenv("BULKHEAD_TEST_KERNEL")
	if kernel == "" {
		if os.Getenv("REQUIRE_VM") == "1" {
			t.Fatal("REQUIRE_VM=1, but BULKHEAD_TEST_KERNEL is not set")
		}
		t.Skip("needs a kernel: set BULKHEAD_TEST_KERNEL to the folder of an unpacked Debian kernel package")
	}
	m := build(t, kernel)

	console := m.boot(t, m.disk, "", "")
	for line := range strings.Lines(console) {
		if strings.Contains(line, "TEST WRONG") {
			t.Errorf("in the machine: %s", line)
		}
	}
	for _, want := range []string{"bulkhead: root verified (dm-verity, /dev/vda1)", "TEST done", "unit stuck: does not stop, killing it", "bulkhead: stopping 2 processes of pods", "bulkhead: restarting"} {
		if !strings.Contains(console, want) {
			t.Errorf("the console lacks %q", want)
		}
	}
	if strings.Contains(console, "stays mounted") {
		t.Error("a volume was not unmounted")
	}
	if out := run(t, m.dir, "/sbin/dumpe2fs", "-h", "volume"); !strings.Contains(out, "Filesystem state:         clean") || strings.Contains(out, "needs_recovery") {
		t.Errorf("the volume was left dirty:\n%s", out)
	}
	t.Log(console)

	// A kernel that cannot restrict files: what is to be restricted does not start, and the console says so.
	console = m.boot(t, m.disk, "lsm=lockdown,yama test.nolandlock", "")
	if strings.Contains(console, "TEST WRONG") || !strings.Contains(console, "TEST done") || !strings.Contains(console, "init: confine caged: landlock: operation not supported") ||
		!strings.Contains(console, "unit caged: exit 126: it could not be confined, again in") {
		t.Errorf("without Landlock:\n%s", console)
	}

	// A root of which every block is damaged does not come up, whatever the superblock says.
	damaged := bytes.Clone(m.disk)
	for i := m.root; i < m.root+m.rootSize; i += 4096 {
		damaged[i+100] ^= 1
	}
	console = m.boot(t, damaged, "", "")
	if !strings.Contains(console, "bulkhead: cannot mount the root") || strings.Contains(console, "root verified") || !strings.Contains(console, "Attempted to kill init") {
		t.Errorf("a damaged root:\n%s", console)
	}

	// A machine that hangs is reset by its watchdog: in the initramfs, by a disk that answers the first pages and then nothing any more ...
	console = m.boot(t, m.disk, "", ",throttling.bps-total=1,throttling.bps-total-max=8192")
	m.reset(t, console, "root verified")
	// ... and later, when PID 1 is not scheduled any more.
	console = m.boot(t, m.disk, "test.freeze", "")
	m.reset(t, console, "TEST done")
	if !strings.Contains(console, "TEST PID 1 is stopped now") {
		t.Errorf("PID 1 was not stopped:\n%s", console)
	}
}

// reset says what is wrong if the machine was not reset by its watchdog; never is what it must not have come to.
func (m *machine) reset(t *testing.T, console, never string) {
	t.Helper()
	if !strings.Contains(console, "bulkhead: the hardware watchdog is on") || strings.Contains(console, never) || strings.Contains(console, "restarting") || strings.Contains(console, "panic") {
		t.Errorf("want a reset by the watchdog alone:\n%s", console)
	}
}

type machine struct {
	dir, kernel, hash string
	disk              []byte
	root, rootSize    int64
}

func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// build makes a disk and an initramfs.
func build(t *testing.T, kernel string) machine {
	m := machine{dir: t.TempDir()}
	units, overlay, program := m.dir+"/units.go", m.dir+"/overlay.json", m.dir+"/init"
	run(t, "..", "go", "run", "./internal/unit/gen", "-tree", "init/testdata/vm/units", "-out", units)
	here, err := filepath.Abs("units.go")
	if err != nil {
		t.Fatal(err)
	}
	replace, _ := json.Marshal(map[string]any{"Replace": map[string]string{here: units}})
	write(t, overlay, replace)
	run(t, ".", "go", "build", "-overlay", overlay, "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, ".")

	tree := m.dir + "/tree"
	run(t, ".", "go", "build", "-o", tree+"/usr/lib/probe", "./testdata/vm/probe")
	write(t, tree+"/sbin/init", read(t, program))
	write(t, tree+"/usr/share/something", nil)
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "state", "var", "etc"} {
		os.MkdirAll(tree+"/"+dir, 0o755)
	}
	os.Symlink("/run/bulkhead/etc/machine-id", tree+"/etc/machine-id")

	paths, _ := filepath.Glob(kernel + "/boot/vmlinuz-*")
	if len(paths) != 1 {
		t.Fatalf("%s/boot has kernels %q", kernel, paths)
	}
	m.kernel = paths[0]
	release := strings.TrimPrefix(filepath.Base(m.kernel), "vmlinuz-")
	module := func(path string) []byte {
		xz := exec.Command("xz", "-dc", kernel+"/lib/modules/"+release+"/kernel/"+path+".xz")
		out, err := xz.Output()
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return out
	}
	second := tree + "/usr/lib/modules/" + release + "/"
	var list string
	for _, path := range []string{"drivers/firmware/qemu_fw_cfg.ko"} {
		write(t, second+"kernel/"+path, module(path))
		list += "kernel/" + path + "\n"
	}
	write(t, second+"bulkhead.list", []byte(list))

	var cpio bytes.Buffer
	entry := func(name string, mode int, data []byte) {
		fmt.Fprintf(&cpio, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", cpio.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		cpio.Write(make([]byte, -cpio.Len()&3))
		cpio.Write(data)
		cpio.Write(make([]byte, -cpio.Len()&3))
	}
	entry("init", 0o100755, read(t, program))
	entry("m", 0o040755, nil)
	list = ""
	for _, path := range []string{"drivers/watchdog/watchdog.ko", "drivers/watchdog/i6300esb.ko", "drivers/block/virtio_blk.ko", "lib/reed_solomon/reed_solomon.ko", "drivers/md/dm-mod.ko", "drivers/md/dm-bufio.ko",
		"drivers/md/dm-verity.ko", "fs/squashfs/squashfs.ko"} {
		name := "m/" + filepath.Base(path)
		entry(name, 0o100644, module(path))
		list += "/" + name + "\n"
	}
	entry("modules.list", 0o100644, []byte(list))
	entry("TRAILER!!!", 0, nil)
	write(t, m.dir+"/initramfs", cpio.Bytes())
	m.makeDisk(t, tree)
	run(t, m.dir, "/sbin/mkfs.ext4", "-q", "volume", "16M")
	return m
}

func (m *machine) makeDisk(t *testing.T, tree string) {
	root, hash := m.dir+"/root", m.dir+"/hash"
	run(t, ".", "mksquashfs", tree, root, "-all-root", "-noappend", "-quiet", "-comp", "zstd", "-Xcompression-level", "1")
	for line := range strings.Lines(run(t, ".", "veritysetup", "format", root, hash)) {
		if v, ok := strings.CutPrefix(line, "Root hash:"); ok {
			m.hash = strings.TrimSpace(v)
		}
	}
	raw, err := hex.DecodeString(m.hash)
	if err != nil {
		t.Fatal(err)
	}
	const mib = 1 << 20
	rootData, hashData := read(t, root), read(t, hash)
	m.root, m.rootSize = mib, int64(len(rootData))
	second := m.root + (m.rootSize+mib-1)/mib*mib
	m.disk = make([]byte, second+(int64(len(hashData))+mib-1)/mib*mib+mib)
	copy(m.disk[m.root:], rootData)
	copy(m.disk[second:], hashData)
	part := func(n int, first, end int64, guid []byte) gpt.Partition {
		return gpt.Partition{Number: n, Type: gpt.GUID{1}, GUID: gpt.GUID(guid), First: uint64(first / 512), Last: uint64(end/512 - 1), Name: "x"}
	}
	table := gpt.Table{DiskGUID: gpt.GUID{2}, Partitions: []gpt.Partition{
		part(1, m.root, second, raw[:16]), part(2, second, int64(len(m.disk))-mib, raw[16:]),
	}}
	chunks, err := table.Encode(int64(len(m.disk)))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		copy(m.disk[c.Offset:], c.Data)
	}
}

// boot returns what the machine's console shows until it ends, at its first restart. word is one more for the kernel command line,
// drive more options of QEMU's for the disk.
func (m *machine) boot(t *testing.T, disk []byte, word, drive string) string {
	path := m.dir + "/disk"
	write(t, path, disk)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	// One processor: with two, QEMU 7.2 may run code that the other one has just changed, and kernels change theirs as they boot.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", qemu.EmulatedCPU, "-smp", "1", "-m", "1024",
		"-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", m.kernel, "-initrd", m.dir+"/initramfs",
		"-append", "console=ttyS0 quiet panic=-1 tsc=reliable "+qemu.EmulatedCommandLine+" bulkhead bulkhead.verity="+m.hash+" "+hardening.CommandLine()+" "+word,
		"-drive", "if=virtio,format=raw,file="+path+drive, "-drive", "if=virtio,format=raw,file="+m.dir+"/volume",
		"-fw_cfg", "name=opt/dev.bulkhead/claim-key,string=the-claim", "-device", "i6300esb")
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("qemu: %v\n%s", err, out)
	}
	return strings.ReplaceAll(string(out), "\r", "")
}
