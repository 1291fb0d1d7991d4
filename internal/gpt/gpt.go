// Package gpt reads and writes GUID partition tables. It is pure but for Read and WriteTo, which touch only the
// reader or writer they are given; it knows nothing of block devices, the kernel or what partitions hold.
//
// It is strict: 512-byte sectors, 128 entries of 128 bytes at the usual places. A table that does not keep to this
// is refused, never half understood, because the next step may be to write it back.
package gpt

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"unicode/utf16"
	"unicode/utf8"
)

// Sizes of the format.
const (
	SectorSize  = 512
	Entries     = 128                                               // most partitions of a table
	FirstUsable = 2 + EntrySectors                                  // first LBA that a partition may use
	MinSize     = (FirstUsable + 1 + EntrySectors + 1) * SectorSize // smallest disk, in bytes: one usable sector

	entrySize    = 128
	EntrySectors = Entries * entrySize / SectorSize
	maxName      = 36 // UTF-16 code units
)

// Attribute bits that mean something to us. The upper ones are from the Discoverable Partitions Specification.
const (
	AttrRequired    uint64 = 1 << 0
	AttrGrowFS      uint64 = 1 << 59
	AttrReadOnly    uint64 = 1 << 60
	AttrNoAutoMount uint64 = 1 << 63
)

// ErrNone says that the disk carries no partition table at all, neither a GPT nor an MBR: it may be given one.
// Any other error of Read means that something is there which must not be overwritten unasked.
var ErrNone = errors.New("no partition table")

// A Table is the whole content of a GPT. Partitions are in the order of their numbers.
type Table struct {
	DiskGUID   GUID
	Partitions []Partition
}

// A Partition is one used entry. First and Last are LBAs of 512 bytes and both belong to the partition.
type Partition struct {
	Number      int // 1 to 128, as in /dev/vda1
	Type        GUID
	GUID        GUID // unique
	First, Last uint64
	Attributes  uint64
	Name        string // at most 36 UTF-16 units
}

// Start returns the offset of the partition's first byte.
func (p Partition) Start() int64 { return int64(p.First) * SectorSize }

// Size returns the partition's length in bytes.
func (p Partition) Size() int64 { return int64(p.Last-p.First+1) * SectorSize }

// LastUsable returns the last LBA that a partition may use on a disk of size bytes, 0 if the disk is too small.
func LastUsable(size int64) uint64 {
	if size < MinSize {
		return 0
	}
	return uint64(size/SectorSize) - 1 - EntrySectors - 1
}

// ByName returns the first partition of that name.
func (t Table) ByName(name string) (Partition, bool) {
	i := slices.IndexFunc(t.Partitions, func(p Partition) bool { return p.Name == name })
	if i < 0 {
		return Partition{}, false
	}
	return t.Partitions[i], true
}

// ByGUID returns the partition with that unique GUID.
func (t Table) ByGUID(g GUID) (Partition, bool) {
	i := slices.IndexFunc(t.Partitions, func(p Partition) bool { return p.GUID == g })
	if i < 0 {
		return Partition{}, false
	}
	return t.Partitions[i], true
}

// Validate says what is wrong with the table for a disk of size bytes, or nil.
func (t Table) Validate(size int64) error {
	if size < MinSize {
		return fmt.Errorf("disk of %d bytes: a partition table needs at least %d", size, MinSize)
	}
	if t.DiskGUID == (GUID{}) {
		return errors.New("disk GUID is zero")
	}
	last, number := LastUsable(size), 0
	seen := map[GUID]int{}
	for _, p := range t.Partitions {
		if err := p.validate(last); err != nil {
			return fmt.Errorf("partition %d: %w", p.Number, err)
		}
		if p.Number <= number {
			return fmt.Errorf("partition %d: stands behind partition %d", p.Number, number)
		}
		number = p.Number
		if other, dup := seen[p.GUID]; dup {
			return fmt.Errorf("partition %d: same GUID %s as partition %d", p.Number, p.GUID, other)
		}
		seen[p.GUID] = p.Number
	}
	byPlace := slices.SortedFunc(slices.Values(t.Partitions), func(a, b Partition) int { return cmp.Compare(a.First, b.First) })
	for i := 1; i < len(byPlace); i++ {
		if a, b := byPlace[i-1], byPlace[i]; b.First <= a.Last {
			return fmt.Errorf("partition %d: starts at sector %d, inside partition %d", b.Number, b.First, a.Number)
		}
	}
	return nil
}

func (p Partition) validate(last uint64) error {
	switch {
	case p.Number < 1 || p.Number > Entries:
		return fmt.Errorf("number is not in 1 to %d", Entries)
	case p.Type == GUID{}:
		return errors.New("type is zero")
	case p.GUID == GUID{}:
		return errors.New("GUID is zero")
	case p.First < FirstUsable:
		return fmt.Errorf("first sector %d is below %d", p.First, FirstUsable)
	case p.Last > last:
		return fmt.Errorf("last sector %d is above %d, the last usable of this disk", p.Last, last)
	case p.Last < p.First:
		return fmt.Errorf("last sector %d is before the first, %d", p.Last, p.First)
	case !utf8.ValidString(p.Name) || slices.Contains([]byte(p.Name), 0):
		return fmt.Errorf("name %q: not text", p.Name)
	case len(utf16.Encode([]rune(p.Name))) > maxName:
		return fmt.Errorf("name %q: longer than %d UTF-16 units", p.Name, maxName)
	}
	return nil
}
