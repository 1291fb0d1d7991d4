package storaged

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// fakeSys makes a tree like /sys from lines "path: text" and "path -> target".
func fakeSys(t *testing.T, tree string) string {
	t.Helper()
	root := t.TempDir()
	for line := range strings.Lines(tree) {
		line = strings.TrimSpace(line)
		link, target, isLink := strings.Cut(line, " -> ")
		path, text, _ := strings.Cut(line, ": ")
		if line == "" {
			continue
		}
		if isLink {
			path = link
		}
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if isLink {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(text+"\n"), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const sysTree = `
	devices/pci0/virtio0/block/vda/size: 2048
	devices/pci0/virtio0/block/vda/dev: 254:0
	devices/pci0/virtio0/block/vda/serial: root-1
	devices/pci0/virtio0/block/vda/queue/logical_block_size: 512
	devices/pci0/virtio0/block/vda/queue/rotational: 1
	devices/pci0/virtio0/block/vda/vda1/partition: 1
	devices/pci0/virtio0/block/vda/vda1/dev: 254:1
	devices/pci0/virtio0/block/vda/vda1/start: 64
	devices/pci0/virtio0/block/vda/vda1/size: 100
	devices/pci0/virtio0/block/vda/vda1/holders/dm-0: x
	devices/pci0/virtio0/block/vda/vda2/partition: 2
	devices/pci0/virtio0/block/vda/vda2/dev: 254:2
	devices/pci0/nvme/nvme0/nvme0n1/size: 4096
	devices/pci0/nvme/nvme0/nvme0n1/ro: 1
	devices/pci0/nvme/nvme0/nvme0n1/device/model: Fast  Disk
	devices/pci0/ata1/host0/target0:0:0/0:0:0:0/block/sda/size: 8
	devices/pci0/ata1/host0/target0:0:0/0:0:0:0/block/sdb/size: 0
	devices/virtual/block/loop0/size: 8
	devices/virtual/block/dm-0/size: 8
	devices/virtual/block/dm-0/dev: 253:0
	devices/virtual/block/dm-0/slaves/vda1 -> ../../../../pci0/virtio0/block/vda/vda1
	devices/virtual/block/dm-0/slaves/vda2 -> ../../../../pci0/virtio0/block/vda/vda2
	class/block/vda -> ../../devices/pci0/virtio0/block/vda
	class/block/vda1 -> ../../devices/pci0/virtio0/block/vda/vda1
	class/block/vda2 -> ../../devices/pci0/virtio0/block/vda/vda2
	class/block/nvme0n1 -> ../../devices/pci0/nvme/nvme0/nvme0n1
	class/block/sda -> ../../devices/pci0/ata1/host0/target0:0:0/0:0:0:0/block/sda
	class/block/sdb -> ../../devices/pci0/ata1/host0/target0:0:0/0:0:0:0/block/sdb
	class/block/loop0 -> ../../devices/virtual/block/loop0
	class/block/dm-0 -> ../../devices/virtual/block/dm-0
	dev/block/253:0 -> ../../devices/virtual/block/dm-0
	dev/block/254:0 -> ../../devices/pci0/virtio0/block/vda
	dev/block/254:1 -> ../../devices/pci0/virtio0/block/vda/vda1
`

func TestDisks(t *testing.T) {
	l := newLinux(slog.New(slog.DiscardHandler), noVault(t.TempDir()))
	l.sys, l.dev, l.proc = fakeSys(t, sysTree), t.TempDir(), t.TempDir()
	for _, dev := range []string{"253:0", "254:1", "254:0", "0:27", "9:9", ""} {
		l.rootDev = func() string { return dev }
		disks, err := l.disks([]Mount{{Dev: "254:2"}})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range disks {
			got = append(got, fmt.Sprintf("%s %d %s %q %q ro=%v rot=%v system=%v", filepath.Base(d.Device), d.Size, d.Transport, d.Model, d.Serial, d.ReadOnly, d.Rotational, d.System))
			for _, p := range d.Partitions {
				got = append(got, fmt.Sprintf("%s %d+%d busy=%v", filepath.Base(p.Device), p.KernelStart, p.KernelSize, p.Busy))
			}
			if d.Unreadable == "" {
				t.Errorf("%s: has no node, but was read", d.Device)
			}
		}
		want := []string{
			`nvme0n1 2097152 nvme "Fast  Disk" "" ro=true rot=false system=false`,
			`sda 4096 sata "" "" ro=false rot=false system=false`,
			fmt.Sprintf(`vda 1048576 virtio "" "root-1" ro=false rot=true system=%v`, strings.HasPrefix(dev, "25")),
			"vda1 32768+51200 busy=true",
			"vda2 0+0 busy=true",
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("root on %q:\ngot  %q\nwant %q", dev, got, want)
		}
	}
}

// Without a root on a block device, the kernel's command line tells.
func TestSystemByGUID(t *testing.T) {
	hash := "00112233445566778899aabbccddeeff" + strings.Repeat("0", 32)
	l := newLinux(slog.New(slog.DiscardHandler), noVault(t.TempDir()))
	l.sys, l.proc = t.TempDir(), t.TempDir()
	l.rootDev = func() string { return "0:27" }
	d := imageDisk("/dev/vdb", 4*gib)
	d.System = false
	d.Partitions[0].GUID = gpt.MustGUID("00112233-4455-6677-8899-aabbccddeeff")
	for _, tt := range []struct {
		cmdline string
		want    bool
	}{
		{"console=ttyS0 bulkhead bulkhead.verity=" + hash, true},
		{"bulkhead.verity=11" + hash[2:], false},
		{"bulkhead.verity=0011", false},
		{"bulkhead.verity=zz" + hash[2:], false},
		{"", false},
	} {
		if err := os.WriteFile(filepath.Join(l.proc, "cmdline"), []byte(tt.cmdline), 0o600); err != nil {
			t.Fatal(err)
		}
		disks := []Disk{otherDisk("/dev/vda", gib, probeEmpty), d}
		if l.markSystem(disks); disks[1].System != tt.want || disks[0].System {
			t.Errorf("%q: got %v, %v", tt.cmdline, disks[0].System, disks[1].System)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const text = `22 1 253:0 / / ro,relatime shared:1 - squashfs /dev/dm-0 ro
23 22 0:21 / /proc rw,nosuid shared:2 - proc proc rw
24 22 253:0 /var /var ro,relatime shared:3 - squashfs /dev/dm-0 ro
25 24 254:6 / /var rw,nosuid,nodev - ext4 /dev/vda6 rw
26 22 0:44 / /mnt/a\040b rw - btrfs /dev/vdb rw
27 22 garbage
`
	got := parseMounts(text, "")
	want := []Mount{
		{"/dev/dm-0", "/", "squashfs", "ro,relatime", "253:0"}, {"/dev/dm-0", "/var", "squashfs", "ro,relatime", "253:0"},
		{"/dev/vda6", "/var", "ext4", "rw,nosuid,nodev", "254:6"}, {"/dev/vdb", "/mnt/a b", "btrfs", "rw", "0:44"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if m, _ := (State{Mounts: got}).mounted("/var"); m.Dev != "254:6" {
		t.Errorf("topmost on /var: %+v", m)
	}
}

func TestSizeText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 512: "512 bytes", 1536 * 1024: "1MiB", 256 * mib: "256MiB", gib: "1GiB", 20*gib + mib: "20.0GiB", 3*gib + mib: "3073MiB"} {
		if got := sizeText(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("25 24 254:6 / /var rw - ext4 /dev/vda6 rw\n")
	f.Add("1 1 254:6 / /a\\04 rw - ext4 \\ rw\n")
	testfuzz.Run(f, func(t *testing.T, text string) { parseMounts(text, "/x") })
}
