package probe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

const mib = 1 << 20

// at makes a disk of 4 MiB with pieces of bytes on it.
func at(pieces ...any) []byte {
	b := make([]byte, 4*mib)
	for i := 0; i < len(pieces); i += 2 {
		copy(b[pieces[i].(int):], pieces[i+1].(string))
	}
	return b
}

func u32(v uint32) string { return string(binary.LittleEndian.AppendUint32(nil, v)) }

func TestRead(t *testing.T) {
	boot := "\x55\xaa"
	ext := []any{1080, "\x53\xef\x01\x00", 1024 + 4, u32(1000), 1024 + 24, u32(2), 1024 + 120, "data"}
	tests := []struct {
		name string
		disk []byte
		want Result
	}{
		{"zeros", at(), Result{Kind: Empty}},
		{"one byte in the first mebibyte", at(mib-1, "x"), Result{Kind: Unknown}},
		{"data behind the first mebibyte only", at(mib, "x"), Result{Kind: Empty}},
		{"gpt", at(510, boot, 450, "\xee", 512, "EFI PART"), Result{Kind: GPT}},
		{"gpt of 4096-byte sectors", at(510, boot, 450, "\xee", 4096, "EFI PART"), Result{Kind: GPT}},
		{"gpt over btrfs", at(512, "EFI PART", 0x10040, "_BHRfS_M"), Result{Kind: GPT}},
		{"backup gpt only", at(4*mib-512, "EFI PART"), Result{Kind: GPT}},
		{"ext4 with a gpt's backup left", at(append(ext, 1024+96, u32(0x40), 4*mib-512, "EFI PART")...), Result{Kind: Ext4, Label: "data", Size: 4096000}},
		{"mbr", at(510, boot, 446, "\x80", 450, "\x83"), Result{Kind: MBR}},
		{"boot sector without partitions", at(510, boot), Result{Kind: Unknown}},
		{"boot code", at(510, boot, 446, "\x17\x80\x80\x80\x80"), Result{Kind: Unknown}},
		{"vfat", at(510, boot, 82, "FAT32   ", 71, "EFI        "), Result{Kind: "vfat", Label: "EFI"}},
		{"vfat16", at(510, boot, 54, "FAT16   ", 43, "\x01\xff\x00"), Result{Kind: "vfat", Label: "??"}},
		{"ntfs", at(3, "NTFS    ", 510, boot), Result{Kind: "ntfs"}},
		{"ext2", at(ext...), Result{Kind: "ext2", Label: "data", Size: 4096000}},
		{"ext3", at(append(ext, 1024+92, u32(4))...), Result{Kind: "ext3", Label: "data", Size: 4096000}},
		{"ext4", at(append(ext, 1024+100, u32(0x400))...), Result{Kind: Ext4, Label: "data", Size: 4096000}},
		{"ext4 of 64 bits", at(append(ext, 1024+96, u32(0x80), 1024+0x150, u32(1))...), Result{Kind: Ext4, Label: "data", Size: (1<<32 + 1000) * 4096}},
		{"ext4 with errors", at(append(ext, 1082, "\x03", 1024+96, u32(0x40))...), Result{Kind: Ext4, Label: "data", Size: 4096000, Dirty: true}},
		{"ext4 with a count of errors", at(append(ext, 1024+0x194, u32(7), 1024+96, u32(0x40))...), Result{Kind: Ext4, Label: "data", Size: 4096000, Dirty: true}},
		{"xfs", at(0, "XFSB", 108, "backup"), Result{Kind: "xfs", Label: "backup"}},
		{"btrfs", at(0x10040, "_BHRfS_M", 0x1012b, "pool"), Result{Kind: "btrfs", Label: "pool"}},
		{"luks", at(0, "LUKS\xba\xbe\x00\x02"), Result{Kind: "luks"}},
		{"luks with a damaged first header", at(0x4000, "SKUL\xba\xbe\x00\x02"), Result{Kind: "luks"}},
		{"luks over ext4", at(append(ext, 0, "LUKS\xba\xbe")...), Result{Kind: "luks"}},
		{"lvm", at(512, "LABELONE", 536, "LVM2 001"), Result{Kind: "lvm"}},
		{"swap", at(4086, "SWAPSPACE2", 1052, "sw"), Result{Kind: "swap", Label: "sw"}},
		{"squashfs", at(0, "hsqs"), Result{Kind: "squashfs"}},
		{"verity", at(0, "verity\x00\x00"), Result{Kind: "verity"}},
		{"iso9660", at(32769, "CD001", 32808, "DEBIAN    "), Result{Kind: "iso9660", Label: "DEBIAN"}},
		{"mdraid 1.1", at(0, u32(0xa92b4efc)), Result{Kind: "mdraid"}},
		{"mdraid 1.2", at(4096, u32(0xa92b4efc)), Result{Kind: "mdraid"}},
		{"mdraid 1.0", at(4*mib-8192, u32(0xa92b4efc)), Result{Kind: "mdraid"}},
		{"mdraid 0.90", at(4*mib-65536, u32(0xa92b4efc)), Result{Kind: "mdraid"}},
		{"zfs", at(128<<10+3*1024, u32(0x00bab10c)), Result{Kind: "zfs"}},
		{"zfs, other byte order", at(128<<10, "\x00\x00\x00\x00\x00\xba\xb1\x0c"), Result{Kind: "zfs"}},
		{"zfs, last label only", at(4*mib-128<<10, u32(0x00bab10c)), Result{Kind: "zfs"}},
		{"too small for anything", make([]byte, 512), Result{Kind: Empty}},
		{"one byte", []byte{1}, Result{Kind: Unknown}},
	}
	for _, tt := range tests {
		got, err := Read(bytes.NewReader(tt.disk), int64(len(tt.disk)))
		if err != nil || got != tt.want {
			t.Errorf("%s: got %+v, %v, want %+v", tt.name, got, err, tt.want)
		}
	}
}

func TestReadError(t *testing.T) {
	for _, size := range []int64{1, 4096, mib} {
		if r, err := Read(bytes.NewReader(nil), size); !errors.Is(err, io.EOF) || r != (Result{}) {
			t.Errorf("%d: got %v, %v; what cannot be read must not be called anything", size, r, err)
		}
	}
}

// TestOracle asks the tools that make file systems.
func TestOracle(t *testing.T) {
	for _, tool := range []struct {
		want Result
		argv []string
	}{
		{Result{Kind: Ext4, Label: "hull", Size: 16 * mib}, []string{"mkfs.ext4", "-q", "-F", "-L", "hull"}},
		{Result{Kind: "ext2", Label: "hull", Size: 16 * mib}, []string{"mke2fs", "-t", "ext2", "-q", "-F", "-L", "hull"}},
		{Result{Kind: "swap", Label: "hull"}, []string{"mkswap", "-L", "hull"}},
		{Result{Kind: "vfat", Label: "HULL"}, []string{"mkfs.vfat", "-n", "HULL"}},
	} {
		path, err := exec.LookPath(tool.argv[0])
		if err != nil {
			t.Logf("%s: not here, skipped", tool.argv[0])
			continue
		}
		img := filepath.Join(t.TempDir(), "img")
		if err := os.WriteFile(img, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(img, 16*mib); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(path, append(tool.argv[1:], img)...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", tool.argv[0], err, out)
		}
		f, err := os.Open(img)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, err := Read(f, 16*mib); err != nil || got != tool.want {
			t.Errorf("%s: got %+v, %v, want %+v", tool.argv[0], got, err, tool.want)
		}
	}
}

// Whatever lies on a disk: no panic, no label that could upset a terminal, and Empty only for zeros.
func FuzzRead(f *testing.F) {
	f.Add([]byte("XFSB"), 0)
	f.Add([]byte("\x53\xef\x01\x00"), 1080)
	f.Add([]byte("CD001"), 32769)
	testfuzz.Run(f, func(t *testing.T, piece []byte, off int) {
		disk := make([]byte, 2*mib)
		if off < 0 || off >= mib {
			off = 0
		}
		n := copy(disk[off:mib], piece)
		r, err := Read(bytes.NewReader(disk), int64(len(disk)))
		if err != nil {
			t.Fatal(err)
		}
		if zero := len(bytes.Trim(piece[:n], "\x00")) == 0; zero != (r.Kind == Empty) {
			t.Errorf("%q at %d: %v", piece, off, r)
		}
	})
}
