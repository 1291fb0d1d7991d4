package fat

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// What Format makes, in sectors.
const (
	reserved   = 32 // before the first copy of the allocation table
	copies     = 2
	infoSector = 1
	bootBackup = 6
	maxCluster = 8
	rootFirst  = 2 // cluster of the root directory
)

// A shape is how Format lays a file system out, in sectors.
type shape struct {
	total, perCluster, length int64 // length is of one copy of the allocation table
	clusters                  int64
}

// shapeOf finds the largest clusters that leave enough of them for FAT32.
func shapeOf(size int64) (shape, error) {
	s := shape{total: size / sectorSize}
	for s.perCluster = maxCluster; s.perCluster > 0; s.perCluster /= 2 {
		most := (s.total - reserved) / s.perCluster
		s.length = ((most+2)*4 + sectorSize - 1) / sectorSize
		s.clusters = (s.total - reserved - copies*s.length) / s.perCluster
		if s.clusters >= leastClusters {
			if s.length*sectorSize > maxTable || s.total > 1<<32-1 {
				return s, fmt.Errorf("%d bytes are too many", size)
			}
			return s, nil
		}
	}
	return s, fmt.Errorf("%d bytes are too few for FAT32", size)
}

// Format makes an empty file system over size bytes of a device. label has at most 11 capitals. What was there is lost; after a power cut
// in the middle nothing is there that Open would take.
func Format(dev Device, size int64, serial uint32, label string) error {
	s, err := shapeOf(size)
	if err != nil {
		return err
	}
	if len(label) > 11 {
		return fmt.Errorf("label %q: more than 11 characters", label)
	}
	root := make([]byte, s.perCluster*sectorSize)
	copy(root, fmt.Sprintf("%-11s", label))
	root[11] = attrVolume
	le.PutUint16(root[24:], firstOfJanuary1980)
	table := make([]byte, s.length*sectorSize)
	for i, v := range []uint32{0x0ffffff8, last, last} { // the medium's kind, nothing to repair, the root directory
		le.PutUint32(table[4*i:], v)
	}
	boot, info := s.bootSector(serial, label), s.info()
	data := (reserved + copies*s.length) * sectorSize
	for _, step := range [][]struct {
		at int64
		b  []byte
	}{
		{{0, make([]byte, reserved*sectorSize)}},
		{{reserved * sectorSize, table}, {(reserved + s.length) * sectorSize, table}, {data, root},
			{infoSector * sectorSize, info}, {bootBackup * sectorSize, boot}, {(bootBackup + infoSector) * sectorSize, info}},
		{{0, boot}},
	} {
		for _, w := range step {
			if _, err := dev.WriteAt(w.b, w.at); err != nil {
				return fmt.Errorf("write a new file system: %w", err)
			}
		}
		if err := dev.Sync(); err != nil {
			return fmt.Errorf("flush a new file system: %w", err)
		}
	}
	return nil
}

func (s shape) bootSector(serial uint32, label string) []byte {
	b := make([]byte, sectorSize)
	copy(b, "\xeb\x58\x90BULKHEAD")
	le.PutUint16(b[11:], sectorSize)
	b[13], b[16], b[21] = byte(s.perCluster), copies, 0xf8
	le.PutUint16(b[14:], reserved)
	le.PutUint16(b[24:], 32) // sectors and heads, as geometries once had them
	le.PutUint16(b[26:], 64)
	le.PutUint32(b[32:], uint32(s.total))
	le.PutUint32(b[36:], uint32(s.length))
	le.PutUint32(b[44:], rootFirst)
	le.PutUint16(b[48:], infoSector)
	le.PutUint16(b[50:], bootBackup)
	b[64], b[66] = 0x80, 0x29
	le.PutUint32(b[67:], serial)
	copy(b[71:], fmt.Sprintf("%-11sFAT32   ", label))
	b[510], b[511] = 0x55, 0xaa
	return b
}

func (s shape) info() []byte {
	b := make([]byte, sectorSize)
	le.PutUint32(b, 0x41615252)
	le.PutUint32(b[484:], 0x61417272)
	le.PutUint32(b[488:], uint32(s.clusters-1))
	le.PutUint32(b[492:], rootFirst+1)
	le.PutUint32(b[508:], 0xaa550000)
	return b
}

// Mkdir makes a directory and those above it, where they are missing.
func (v *Volume) Mkdir(dir string) error {
	if dir == "" || dir == "." {
		return nil
	}
	_, err := v.walk(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above, name := path.Dir(dir), path.Base(dir)
	if err := v.Mkdir(above); err != nil {
		return err
	}
	d, err := v.walk(strings.TrimPrefix(above, "."))
	if err != nil {
		return err
	}
	if _, ok := d.find(name); ok {
		return fmt.Errorf("%s: %w", dir, fs.ErrExist) // a file
	}
	chain, err := v.allocate(1)
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	up := d.chain[0]
	if up == v.root {
		up = 0 // so it is written
	}
	content := make([]byte, v.cluster)
	for i, c := range []uint32{chain[0], up} {
		s := content[i*slotSize:]
		copy(s, fmt.Sprintf("%-11s", "..."[:i+1]))
		s[11] = attrDirectory
		for _, at := range []int{16, 18, 24} {
			le.PutUint16(s[at:], firstOfJanuary1980)
		}
		le.PutUint16(s[20:], uint16(c>>16))
		le.PutUint16(s[26:], uint16(c))
	}
	if _, err := v.dev.WriteAt(content, v.at(chain[0])); err != nil {
		return fmt.Errorf("write a directory: %w", err)
	}
	if err := v.flush(); err != nil { // before anything refers to it
		return err
	}
	if err := v.add(d, entry{name: name, attr: attrDirectory, first: chain[0]}); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return v.tellFree()
}
