package storaged

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
)

// An ext4 superblock has 1024 bytes: two sectors, the second of which ends with a checksum over both. The kernel writes it without the journal
// when it mounts and unmounts. A disk that loses its power between the two sectors leaves one that neither the kernel nor e2fsck -p takes, though
// each sector is right by itself. What e2fsck offers, to take the copy in the second group (-b), is no way out: that copy does not say that the journal is to be
// replayed, and if the power fails again before e2fsck is done, the kernel throws the journal away, and with it what was promised.
const (
	superAt     = 1024
	superSize   = 1024
	superSector = 512
	checksumAt  = superSize - 4

	incompatAt, needsRecovery = 0x60, 0x4
	roCompatAt, orphanPresent = 0x64, 0x10000
)

// geometry is where the superblock says what must be the same in its copy: sizes, features, UUID, label, journal, seeds. From linux/fs/ext4/ext4.h.
var geometry = [][2]int{{0x00, 0x08}, {0x14, 0x2c}, {0x38, 0x3a}, {0x54, 0x5a}, {0x5c, 0x88}, {0xe0, 0xe4}, {0xec, 0x100}, {0x150, 0x154}, {0x174, 0x178}, {0x270, 0x274}, {0x280, 0x284}}

// superSum is the checksum that a superblock should have.
func superSum(b []byte) uint32 {
	return ^crc32.Checksum(b[:checksumAt], crc32.MakeTable(crc32.Castagnoli))
}

// mended returns a torn superblock with the right checksum. copied is its copy, which must be whole and of the same file system: a superblock
// that is damaged in another way is left to a person.
func mended(torn, copied []byte) ([]byte, error) {
	fixed := func(b []byte) []byte { // without what a mount changes
		b = bytes.Clone(b)
		le := binary.LittleEndian
		le.PutUint32(b[incompatAt:], le.Uint32(b[incompatAt:])&^needsRecovery)
		le.PutUint32(b[roCompatAt:], le.Uint32(b[roCompatAt:])&^orphanPresent)
		return b
	}
	if binary.LittleEndian.Uint32(copied[checksumAt:]) != superSum(copied) {
		return nil, errors.New("the copy of the superblock is damaged too")
	}
	a, b := fixed(torn), fixed(copied)
	for _, r := range geometry {
		if !bytes.Equal(a[r[0]:r[1]], b[r[0]:r[1]]) {
			return nil, fmt.Errorf("the superblock differs from its copy at byte %#x: it was not torn by a power cut", r[0])
		}
	}
	out := bytes.Clone(torn)
	binary.LittleEndian.PutUint32(out[checksumAt:], superSum(out))
	return out, nil
}

// mend makes a torn superblock whole, by the write of its second sector: a power cut leaves it as it was or mended.
func mend(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = func() error {
		torn, copied := make([]byte, superSize), make([]byte, superSize)
		if _, err := f.ReadAt(torn, superAt); err != nil {
			return err
		}
		group := int64(binary.LittleEndian.Uint32(torn[0x20:])) // blocks of a group; the second one starts with the copy
		if group != groupBlocks && group != smallGroup {
			return errors.New("the superblock is not one of ours")
		}
		if _, err := f.ReadAt(copied, group*blockSize); err != nil {
			return err
		}
		whole, err := mended(torn, copied)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(whole[superSector:], superAt+superSector); err != nil {
			return err
		}
		return f.Sync()
	}()
	return errors.Join(err, f.Close())
}
