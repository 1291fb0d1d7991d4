package boot

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// A guid has its bytes in the order of its text; a disk has the first three groups the other way round.
type guid [16]byte

func (g guid) String() string {
	return toHex(g[:4]) + "-" + toHex(g[4:6]) + "-" + toHex(g[6:8]) + "-" + toHex(g[8:10]) + "-" + toHex(g[10:])
}

func (g guid) onDisk() guid {
	return guid{g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]}
}

const gptMaximum = 1 << 20 // most bytes of all entries; usual are 16 KiB

// locate returns the numbers, from 1, of the partitions with these unique GUIDs, of which the third need not be there. If the first table is damaged it reads the one at
// the disk's end. block is the size of the disk's blocks, blocks their number.
func locate(disk io.ReaderAt, block, blocks uint64, want [3]guid) (numbers [3]int, err error) {
	if block < 512 || block > 65536 || block&(block-1) != 0 || blocks < 3 {
		return numbers, errors.New("not a disk")
	}
	entries, size, err := readTable(disk, block, blocks, 1)
	if err != nil {
		entries, size, err = readTable(disk, block, blocks, blocks-1)
	}
	for i := 0; err == nil && i < len(entries); i += size {
		for w := range want {
			if guid(entries[i+16:i+32]) == want[w].onDisk() && want[w] != (guid{}) {
				if numbers[w] != 0 {
					return numbers, errors.New("two partitions are " + want[w].String())
				}
				numbers[w] = i/size + 1
			}
		}
	}
	if err == nil && (numbers[0] == 0 || numbers[1] == 0) {
		err = errors.New("the disk has other partitions")
	}
	return numbers, err
}

// readTable reads the entries that belong to the header at the block number at, and checks all that the format lets it check.
func readTable(disk io.ReaderAt, block, blocks, at uint64) (entries []byte, size int, err error) {
	h := make([]byte, block)
	if _, err := disk.ReadAt(h, int64(at*block)); err != nil {
		return nil, 0, err
	}
	le := binary.LittleEndian
	length, sum := le.Uint32(h[12:]), le.Uint32(h[16:])
	if string(h[:8]) != "EFI PART" || le.Uint32(h[8:]) != 0x10000 || length < 92 || uint64(length) > block {
		return nil, 0, errors.New("no GPT header")
	}
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:length]) != sum {
		return nil, 0, errors.New("GPT header: wrong checksum")
	}
	first, count, each := le.Uint64(h[72:]), uint64(le.Uint32(h[80:])), uint64(le.Uint32(h[84:]))
	if le.Uint64(h[24:]) != at || each < 128 || each%128 != 0 || count == 0 || count > gptMaximum/each || first < 2 || first >= blocks {
		return nil, 0, errors.New("GPT header: impossible values")
	}
	entries = make([]byte, count*each)
	if _, err := disk.ReadAt(entries, int64(first*block)); err != nil {
		return nil, 0, err
	}
	if crc32.ChecksumIEEE(entries) != le.Uint32(h[88:]) {
		return nil, 0, errors.New("GPT entries: wrong checksum")
	}
	return entries, int(each), nil
}
