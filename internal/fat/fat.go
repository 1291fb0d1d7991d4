// Package fat reads and changes FAT32 file systems, as far as it takes to keep boot files on an EFI partition: list, read, create,
// rename, remove. It writes to the partition itself; the kernel's driver is not involved.
//
// It exists for one property that the kernel's driver does not have: whatever the moment of a power cut, a file that is being renamed
// is there under one of its names, and no cluster ever belongs to two files without this package noticing. A change of a directory is
// the write of one sector; what a sector refers to is on the disk before. A cut leaves at worst clusters that belong to nobody, and, for
// files that others made, one file under both names: Reclaim tidies both up.
//
// It is strict: sectors of 512 bytes, FAT32 with its copies mirrored. What is not so, or is damaged, is refused and not touched. A Volume
// is for one goroutine, and nobody else may write to the device while it is in use.
package fat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// A Device is what a file system lies on.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Sync returns when everything written so far survives a power cut.
	Sync() error
}

// Sizes and limits, in bytes.
const (
	sectorSize = 512
	maxTable   = 8 << 20 // of one copy of the allocation table, which is held in memory
	maxDir     = 1 << 20 // of one directory
	// leastClusters is what makes a file system FAT32 for firmware, whatever it calls itself.
	leastClusters = 65525
)

// Values of the allocation table, of which the upper four bits belong to somebody else.
const (
	free    = 0
	bad     = 0x0ffffff7
	last    = 0x0fffffff
	isLast  = 0x0ffffff8 // and above
	keepers = 0xf0000000
)

var le = binary.LittleEndian

// Volume is a file system.
type Volume struct {
	dev       Device
	cluster   int64   // bytes
	copies    []int64 // where those of the allocation table are, in bytes
	data      int64   // where cluster 2 is
	root      uint32  // first cluster of the root directory
	top       uint32  // the highest cluster
	info      int64   // where the sector FSInfo is
	infoFree  uint32  // what it says
	table     []byte  // the first copy, as it is to be
	stale     bool    // the copies differ
	dirty     map[int]bool
	freeCount uint32
}

// Open reads a file system of size bytes. It writes nothing.
func Open(dev Device, size int64) (*Volume, error) {
	b := make([]byte, sectorSize)
	if _, err := dev.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read the boot sector: %w", err)
	}
	perCluster, reserved, copies := int64(b[13]), int64(le.Uint16(b[14:])), int64(b[16])
	total, length := int64(le.Uint32(b[32:])), int64(le.Uint32(b[36:]))
	v := &Volume{dev: dev, cluster: perCluster * sectorSize, root: le.Uint32(b[44:]), info: int64(le.Uint16(b[48:])) * sectorSize, dirty: map[int]bool{}}
	switch {
	case b[510] != 0x55 || b[511] != 0xaa || le.Uint16(b[11:]) != sectorSize || le.Uint16(b[17:]) != 0 || le.Uint16(b[22:]) != 0:
		return nil, errors.New("no FAT32 file system with sectors of 512 bytes")
	case perCluster == 0 || perCluster > 128 || perCluster&(perCluster-1) != 0 || reserved == 0 || copies < 1 || copies > 2 || le.Uint16(b[42:]) != 0:
		return nil, errors.New("boot sector: impossible values")
	case le.Uint16(b[40:])&0x80 != 0:
		return nil, errors.New("boot sector: the copies of the allocation table are not mirrored")
	case total*sectorSize > size || length*sectorSize > maxTable || reserved+copies*length >= total:
		return nil, fmt.Errorf("boot sector: %d sectors with tables of %d do not fit %d bytes", total, length, size)
	case v.info < sectorSize || v.info >= reserved*sectorSize:
		return nil, errors.New("boot sector: no FSInfo")
	}
	for i := range copies {
		v.copies = append(v.copies, (reserved+i*length)*sectorSize)
	}
	v.data = (reserved + copies*length) * sectorSize
	count := (total*sectorSize - v.data) / v.cluster
	if count < leastClusters {
		return nil, fmt.Errorf("%d clusters: firmware takes that for FAT16; FAT32 has at least %d", count, leastClusters)
	}
	if (count+2)*4 > length*sectorSize {
		return nil, errors.New("boot sector: the allocation table is too short")
	}
	v.top = uint32(count + 1)
	if !v.valid(v.root) {
		return nil, errors.New("boot sector: no root directory")
	}
	return v, v.load(length * sectorSize)
}

// load reads the allocation table and FSInfo.
func (v *Volume) load(length int64) error {
	v.table = make([]byte, length)
	if _, err := v.dev.ReadAt(v.table, v.copies[0]); err != nil {
		return fmt.Errorf("read the allocation table: %w", err)
	}
	other := make([]byte, 64<<10)
	for at := int64(0); at < length && len(v.copies) > 1; at += int64(len(other)) {
		n := min(length-at, int64(len(other)))
		if _, err := v.dev.ReadAt(other[:n], v.copies[1]+at); err != nil {
			return fmt.Errorf("read the allocation table's copy: %w", err)
		}
		v.stale = v.stale || !slices.Equal(other[:n], v.table[at:at+n])
	}
	for c := uint32(2); c <= v.top; c++ {
		if v.next(c) == free {
			v.freeCount++
		}
	}
	b := make([]byte, sectorSize)
	if _, err := v.dev.ReadAt(b, v.info); err != nil {
		return fmt.Errorf("read FSInfo: %w", err)
	}
	if le.Uint32(b) != 0x41615252 || le.Uint32(b[484:]) != 0x61417272 {
		return errors.New("FSInfo: no signature")
	}
	v.infoFree = le.Uint32(b[488:])
	return nil
}

// Free returns how many bytes new files can have, less a little for the directory.
func (v *Volume) Free() int64 {
	return max(0, int64(v.freeCount)-1) * v.cluster
}

func (v *Volume) valid(c uint32) bool { return c >= 2 && c <= v.top }

func (v *Volume) next(c uint32) uint32 { return le.Uint32(v.table[4*c:]) &^ keepers }

func (v *Volume) at(c uint32) int64 { return v.data + int64(c-2)*v.cluster }

// link changes one value of the table in memory.
func (v *Volume) link(c, to uint32) {
	switch was := v.next(c); {
	case was == free && to != free:
		v.freeCount--
	case was != free && to == free:
		v.freeCount++
	}
	le.PutUint32(v.table[4*c:], le.Uint32(v.table[4*c:])&keepers|to)
	v.dirty[int(4*c)/sectorSize] = true
}

// flush writes what changed of the table to all copies, and syncs.
func (v *Volume) flush() error {
	sectors := make([]int, 0, len(v.dirty))
	for s := range v.dirty {
		sectors = append(sectors, s)
	}
	slices.Sort(sectors)
	for _, base := range v.copies {
		for i := 0; i < len(sectors); {
			j := i + 1
			for j < len(sectors) && sectors[j] == sectors[j-1]+1 {
				j++
			}
			from, to := sectors[i]*sectorSize, (sectors[j-1]+1)*sectorSize
			if _, err := v.dev.WriteAt(v.table[from:to], base+int64(from)); err != nil {
				return fmt.Errorf("write the allocation table: %w", err)
			}
			i = j
		}
	}
	clear(v.dirty)
	return v.sync()
}

func (v *Volume) sync() error {
	if err := v.dev.Sync(); err != nil {
		return fmt.Errorf("flush the file system: %w", err)
	}
	return nil
}

// tellFree writes the number of free clusters into FSInfo, last of all: nobody counts on it.
func (v *Volume) tellFree() error {
	if v.infoFree == v.freeCount {
		return nil
	}
	b := make([]byte, sectorSize)
	if _, err := v.dev.ReadAt(b, v.info); err != nil {
		return fmt.Errorf("read FSInfo: %w", err)
	}
	le.PutUint32(b[488:], v.freeCount)
	if _, err := v.dev.WriteAt(b, v.info); err != nil {
		return fmt.Errorf("write FSInfo: %w", err)
	}
	v.infoFree = v.freeCount
	return v.sync()
}

// chain returns the clusters of a file or directory, at most limit bytes of them. A limit below 0 is none.
func (v *Volume) chain(first uint32, limit int64) ([]uint32, error) {
	var out []uint32
	for c := first; ; c = v.next(c) {
		switch {
		case !v.valid(c):
			return nil, fmt.Errorf("a chain leads to cluster %d, of %d", c, v.top)
		case len(out) > int(v.top):
			return nil, errors.New("a chain leads back to itself")
		case limit >= 0 && int64(len(out))*v.cluster >= limit:
			return nil, fmt.Errorf("a chain is longer than %d bytes", limit)
		}
		out = append(out, c)
		if n := v.next(c); n >= isLast {
			return out, nil
		}
	}
}

// allocate finds n free clusters, in one piece if there is one, and makes a chain of them in memory.
func (v *Volume) allocate(n int) ([]uint32, error) {
	if uint32(n) > v.freeCount {
		return nil, fmt.Errorf("no room: %d bytes are needed, %d are free", int64(n)*v.cluster, int64(v.freeCount)*v.cluster)
	}
	var out []uint32
	for c := uint32(2); c <= v.top && len(out) < n; c++ {
		if v.next(c) == free {
			out = append(out, c)
		} else {
			out = out[:0]
		}
	}
	if len(out) < n {
		out = out[:0]
		for c := uint32(2); c <= v.top && len(out) < n; c++ {
			if v.next(c) == free {
				out = append(out, c)
			}
		}
	}
	for i, c := range out {
		if i+1 < len(out) {
			v.link(c, out[i+1])
		} else {
			v.link(c, last)
		}
	}
	return out, nil
}
