// Package probe says what a piece of a disk holds, by the signatures at its start and end.
//
// It is pure but for the reader it is given, which it only reads. It must not be trusted to recognise everything: what it
// does not know is Unknown, and only what is without any signature and starts with a mebibyte of zeros is Empty.
package probe

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"unicode"
)

// Kind names a content, as blkid(8) would where it has a name for it.
type Kind string

// The kinds that code asks for by name; those of the table below are kinds too.
const (
	Unread  Kind = ""        // not looked at
	Empty   Kind = "empty"   // nothing, as far as anybody can tell
	Unknown Kind = "unknown" // data without a signature that we know
	GPT     Kind = "gpt"
	MBR     Kind = "mbr"
	Ext4    Kind = "ext4"
	LUKS    Kind = "luks"
)

// Result is what was found. The zero value says that nobody looked.
type Result struct {
	Kind Kind
	// Label is the file system's, made printable; "" if it has none or we do not read it.
	Label string
	// Size is the file system's length in bytes (ext only); 0 if unknown.
	Size int64
	// Dirty is true if an ext file system recorded errors or was not unmounted without having a journal: e2fsck is due.
	Dirty bool
}

// Data reports whether something is there that would be lost.
func (r Result) Data() bool { return r.Kind != Empty }

// String is for error messages: `ext4 "backup"`.
func (r Result) String() string {
	switch {
	case r.Kind == Unread:
		return "unread"
	case r.Kind == Unknown:
		return "data of unknown kind"
	case r.Label != "":
		return fmt.Sprintf("%s %q", r.Kind, r.Label)
	}
	return string(r.Kind)
}

// blank is how much at the start must be zero for Empty.
const blank = 1 << 20

// A magic is a signature at a fixed place.
type magic struct {
	kind     Kind
	at       int64
	want     string
	label    int64 // where the label is, 0: not read
	labelLen int
}

// magics is in the order of trust: a container's before what may have been left behind under it.
var magics = []magic{
	{kind: LUKS, at: 0, want: "LUKS\xba\xbe"},
	{kind: LUKS, at: 0x4000, want: "SKUL\xba\xbe"}, // LUKS2's second header, for the smallest size of the first,
	{kind: LUKS, at: 0x8000, want: "SKUL\xba\xbe"}, // and for ours
	{kind: "bitlocker", at: 3, want: "-FVE-FS-"},
	{kind: "lvm", at: 512 + 24, want: "LVM2 001"},
	{kind: "lvm", at: 24, want: "LVM2 001"},
	{kind: "lvm", at: 1024 + 24, want: "LVM2 001"},
	{kind: "lvm", at: 1536 + 24, want: "LVM2 001"},
	{kind: "mdraid", at: 0, want: "\xfc\x4e\x2b\xa9"},
	{kind: "mdraid", at: 4096, want: "\xfc\x4e\x2b\xa9"},
	{kind: "bluestore", at: 0, want: "bluestore block device"},
	{kind: "bcache", at: 4096 + 24, want: "\xc6\x85\x73\xf6\x4e\x1a\x45\xca"},
	{kind: "squashfs", at: 0, want: "hsqs"},
	{kind: "verity", at: 0, want: "verity\x00\x00"},
	{kind: "erofs", at: 1024, want: "\xe2\xe1\xf5\xe0", label: 1024 + 64, labelLen: 16},
	{kind: "xfs", at: 0, want: "XFSB", label: 108, labelLen: 12},
	{kind: "btrfs", at: 0x10040, want: "_BHRfS_M", label: 0x1012b, labelLen: 256},
	{kind: "f2fs", at: 1024, want: "\x10\x20\xf5\xf2"},
	{kind: "bcachefs", at: 4096 + 24, want: "\xc6\x85\x73\xf6\x66\xce\x90\xa9"},
	{kind: "iso9660", at: 32769, want: "CD001", label: 32808, labelLen: 32},
	{kind: "ntfs", at: 3, want: "NTFS    "},
	{kind: "exfat", at: 3, want: "EXFAT   "},
	{kind: "vfat", at: 82, want: "FAT32   ", label: 71, labelLen: 11},
	{kind: "vfat", at: 54, want: "FAT16   ", label: 43, labelLen: 11},
	{kind: "vfat", at: 54, want: "FAT12   ", label: 43, labelLen: 11},
	{kind: "swap", at: 4096 - 10, want: "SWAPSPACE2", label: 1052, labelLen: 16},
	{kind: "swap", at: 4096 - 10, want: "SWAP-SPACE"},
	{kind: "swap", at: 65536 - 10, want: "SWAPSPACE2", label: 1052, labelLen: 16},
	{kind: "swap", at: 4096 - 10, want: "S1SUSPEND"},
}

// Read looks at size bytes of r. An error is r's own.
func Read(r io.ReaderAt, size int64) (Result, error) {
	p := &reader{r: r, size: size}
	p.head = p.at(0, headSize)
	if p.err != nil {
		return Result{}, p.err
	}
	res := p.look()
	if res.Kind == Empty && !p.zero() {
		res = Result{Kind: Unknown}
	}
	if p.err != nil {
		return Result{}, p.err
	}
	return res, nil
}

// headSize covers every signature of magics.
const headSize = 0x10300

type reader struct {
	r    io.ReaderAt
	size int64
	head []byte // the first headSize bytes, or all there is
	err  error
}

// at reads n bytes, fewer at the end; nothing after an error and outside of the disk.
func (p *reader) at(off int64, n int) []byte {
	if off < 0 || off >= p.size || p.err != nil {
		return nil
	}
	b := make([]byte, min(int64(n), p.size-off))
	if m, err := p.r.ReadAt(b, off); m < len(b) {
		p.err = fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		return nil
	}
	return b
}

// field returns n bytes of the head, zeros where it ends before.
func (p *reader) field(off int64, n int) []byte {
	b := make([]byte, n)
	if off < int64(len(p.head)) {
		copy(b, p.head[off:])
	}
	return b
}

// look asks for one signature after the other; the first counts. The order matters: a GPT's primary header overwrites what most
// others need; a file system leaves a GPT's backup and the boot code of an MBR alone.
func (p *reader) look() Result {
	if string(p.field(512, 8)) == "EFI PART" || string(p.field(4096, 8)) == "EFI PART" {
		return Result{Kind: GPT}
	}
	for _, m := range magics {
		if string(p.field(m.at, len(m.want))) == m.want {
			return Result{Kind: m.kind, Label: label(p.field(m.label, m.labelLen))}
		}
	}
	if r, ok := p.ext(); ok {
		return r
	}
	if p.zfs() {
		return Result{Kind: "zfs"}
	}
	if p.mdraidAtEnd() {
		return Result{Kind: "mdraid"}
	}
	if p.mbr() {
		return Result{Kind: MBR}
	}
	if p.size >= 1024 && string(p.at(p.size/512*512-512, 8)) == "EFI PART" {
		return Result{Kind: GPT} // only the backup copy is left
	}
	return Result{Kind: Empty}
}

var le = binary.LittleEndian

// Feature bits of ext's superblock, from linux/fs/ext4/ext4.h.
const (
	compatJournal = 0x4
	incompat64    = 0x80
	incompatExt4  = 0x40 | 0x80 | 0x200              // extents, 64bit, flex_bg
	roCompatExt4  = 0x8 | 0x10 | 0x20 | 0x40 | 0x400 // huge_file, gdt_csum, dir_nlink, extra_isize, metadata_csum
	stateValid    = 0x1
	stateErrors   = 0x2
)

func (p *reader) ext() (Result, bool) {
	s := p.field(1024, 1024)
	if le.Uint16(s[56:]) != 0xef53 {
		return Result{}, false
	}
	compat, incompat, roCompat := le.Uint32(s[92:]), le.Uint32(s[96:]), le.Uint32(s[100:])
	r := Result{Kind: "ext2", Label: label(s[120:136])}
	switch {
	case incompat&incompatExt4 != 0 || roCompat&roCompatExt4 != 0:
		r.Kind = Ext4
	case compat&compatJournal != 0:
		r.Kind = "ext3"
	}
	blocks := uint64(le.Uint32(s[4:]))
	if incompat&incompat64 != 0 {
		blocks |= uint64(le.Uint32(s[0x150:])) << 32
	}
	if shift := le.Uint32(s[24:]); shift <= 6 && blocks < 1<<46 {
		r.Size = int64(blocks << (10 + shift))
	}
	state := le.Uint16(s[58:])
	r.Dirty = state&stateErrors != 0 || state&stateValid == 0 || le.Uint32(s[0x194:]) != 0 // s_error_count
	return r, true
}

// zfs looks for an uberblock in each of the four labels, two at the start and two at the end.
func (p *reader) zfs() bool {
	const labelSize, ring = 256 << 10, 128 << 10
	end := p.size / labelSize * labelSize
	for _, l := range []int64{0, labelSize, end - 2*labelSize, end - labelSize} {
		if l < 0 {
			continue
		}
		b := p.at(l+ring, ring)
		for ; len(b) >= 1024; b = b[1024:] {
			if v := le.Uint64(b); v == 0x00bab10c || v == 0x0cb1ba0000000000 {
				return true
			}
		}
	}
	return false
}

// mdraidAtEnd looks for the versions 0.90 and 1.0 of the superblock.
func (p *reader) mdraidAtEnd() bool {
	const version0 = 64 << 10
	sectors := p.size / 512
	for _, off := range []int64{p.size/version0*version0 - version0, (sectors - 16) / 8 * 8 * 512} {
		if b := p.at(off, 4); len(b) == 4 && le.Uint32(b) == 0xa92b4efc {
			return true
		}
	}
	return false
}

// mbr wants the signature, and only entries that make sense, at least one of them used.
func (p *reader) mbr() bool {
	if le.Uint16(p.field(510, 2)) != 0xaa55 {
		return false
	}
	used := false
	for e := p.field(446, 64); len(e) > 0; e = e[16:] {
		if e[0]&0x7f != 0 {
			return false
		}
		used = used || e[4] != 0
	}
	return used
}

// zero reports whether the first mebibyte is all zeros.
func (p *reader) zero() bool {
	const step = 64 << 10
	zeros := make([]byte, step)
	for off := int64(0); off < min(blank, p.size); off += step {
		if b := p.at(off, step); !bytes.Equal(b, zeros[:len(b)]) {
			return false
		}
	}
	return true
}

// label makes bytes from a disk, which may be anything, printable.
func label(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(string(b), "?")))
}
