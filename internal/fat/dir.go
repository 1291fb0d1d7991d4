package fat

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
)

// A directory is a list of slots of 32 bytes. A file has one slot with its short name, cluster and size, and before it those with
// its long name, 13 characters each, the last part first.
const (
	slotSize  = 32
	perSector = sectorSize / slotSize
	perSlot   = 13

	attrVolume    = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
	attrLong      = 0x0f

	slotEnd     = 0x00 // this slot and all behind it are free
	slotDeleted = 0xe5
)

// firstOfJanuary1980 is FAT's first date: this package knows no clock.
const firstOfJanuary1980 = 0x0021

// MaxName is the longest name that can be created, in characters: all slots of a file fit one sector.
const MaxName = (perSector - 1) * perSlot

// An entry is one file or directory of a directory.
type entry struct {
	name  string
	short [11]byte
	attr  byte
	first uint32 // cluster; 0 for an empty file
	size  int64
	// slots are the numbers of the first and the last slot.
	from, to int
}

func (e entry) isDir() bool { return e.attr&attrDirectory != 0 }

// A dir is a whole directory in memory.
type dir struct {
	chain   []uint32
	sectors []int64 // where each sector is on the device
	data    []byte
	entries []entry
	orphans []int // slots of long names that belong to no file
	end     int   // number of the slot with the end mark; all slots, if there is none
}

func (d *dir) slot(i int) []byte { return d.data[i*slotSize : (i+1)*slotSize] }

func (d *dir) slots() int { return len(d.data) / slotSize }

// readDir reads the directory that starts at a cluster.
func (v *Volume) readDir(first uint32) (*dir, error) {
	chain, err := v.chain(first, maxDir)
	if err != nil {
		return nil, err
	}
	d := &dir{chain: chain, data: make([]byte, int64(len(chain))*v.cluster)}
	for i, c := range chain {
		if _, err := v.dev.ReadAt(d.data[int64(i)*v.cluster:int64(i+1)*v.cluster], v.at(c)); err != nil {
			return nil, err
		}
		for s := int64(0); s < v.cluster; s += sectorSize {
			d.sectors = append(d.sectors, v.at(c)+s)
		}
	}
	d.parse()
	return d, nil
}

// parse finds the entries.
func (d *dir) parse() {
	d.entries, d.orphans, d.end = nil, nil, d.slots()
	var long []int // slots of the long name that is being read
	lose := func() { d.orphans = append(d.orphans, long...); long = nil }
	for i := range d.slots() {
		s := d.slot(i)
		switch {
		case s[0] == slotEnd:
			lose()
			d.end = i
			return
		case s[0] == slotDeleted:
			lose()
		case s[11]&0x3f == attrLong:
			if s[0]&0x40 != 0 {
				lose()
			}
			long = append(long, i)
		default:
			e := entry{short: [11]byte(s[:11]), attr: s[11], from: i, to: i,
				first: (uint32(le.Uint16(s[20:]))<<16 | uint32(le.Uint16(s[26:]))) &^ keepers, size: int64(le.Uint32(s[28:]))}
			if name, ok := d.longName(long, e.short); ok {
				e.name, e.from = name, long[0]
				long = nil
			} else {
				e.name = shortName(s)
			}
			lose()
			d.entries = append(d.entries, e)
		}
	}
	lose()
}

// longName joins the parts of a long name; ok is false if they are not those of this short name.
func (d *dir) longName(parts []int, short [11]byte) (string, bool) {
	if len(parts) == 0 || int(d.slot(parts[0])[0]&0x3f) != len(parts) {
		return "", false
	}
	var units []uint16
	for n, i := range slices.Backward(parts) {
		s := d.slot(i)
		if int(s[0]&0x3f) != len(parts)-n || s[13] != checksum(short) {
			return "", false
		}
		for _, r := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
			for b := s[r[0]:r[1]]; len(b) > 0; b = b[2:] {
				units = append(units, le.Uint16(b))
			}
		}
	}
	if i := slices.Index(units, 0); i >= 0 {
		units = units[:i]
	}
	return string(utf16.Decode(units)), true
}

// shortName is how a file without a long name is called. Bits 3 and 4 of byte 12 say that base and extension are in small letters.
func shortName(s []byte) string {
	base, ext := strings.TrimRight(string(s[:8]), " "), strings.TrimRight(string(s[8:11]), " ")
	if s[12]&8 != 0 {
		base = strings.ToLower(base)
	}
	if s[12]&16 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext != "" {
		return base + "." + ext
	}
	return base
}

func checksum(short [11]byte) (sum byte) {
	for _, c := range short {
		sum = sum>>1 + sum<<7 + c
	}
	return sum
}

// find returns an entry by its name; capitals do not matter.
func (d *dir) find(name string) (entry, bool) {
	for _, e := range d.entries {
		if e.attr&attrVolume == 0 && strings.EqualFold(e.name, name) {
			return e, true
		}
	}
	return entry{}, false
}

// encode returns the slots of an entry: its long name and, last, the short one, which is made up and unique in the directory.
func (d *dir) encode(e entry) ([]byte, error) {
	if err := checkName(e.name); err != nil {
		return nil, err
	}
	_, ext, _ := strings.Cut(e.name[max(0, len(e.name)-4):], ".")
	used := map[[11]byte]bool{}
	for _, o := range d.entries {
		used[o.short] = true
	}
	for n := 1; ; n++ {
		copy(e.short[:], fmt.Sprintf("%-8.8s%-3.3s", fmt.Sprintf("BH~%d", n), strings.ToUpper(ext)))
		if !used[e.short] {
			break
		}
	}
	units := utf16.Encode([]rune(e.name))
	parts := (len(units) + perSlot - 1) / perSlot
	units = append(units, 0)
	out := make([]byte, 0, (parts+1)*slotSize)
	for p := parts; p >= 1; p-- {
		s := make([]byte, slotSize)
		s[0], s[11], s[13] = byte(p), attrLong, checksum(e.short)
		if p == parts {
			s[0] |= 0x40
		}
		at := (p - 1) * perSlot
		for _, r := range [][2]int{{1, 11}, {14, 26}, {28, 32}} {
			for i := r[0]; i < r[1]; i += 2 {
				u := uint16(0xffff)
				if at < len(units) {
					u = units[at]
				}
				le.PutUint16(s[i:], u)
				at++
			}
		}
		out = append(out, s...)
	}
	s := make([]byte, slotSize)
	copy(s, e.short[:])
	s[11] = e.attr
	for _, at := range []int{16, 18, 24} { // made, read, written
		le.PutUint16(s[at:], firstOfJanuary1980)
	}
	le.PutUint16(s[20:], uint16(e.first>>16))
	le.PutUint16(s[26:], uint16(e.first))
	le.PutUint32(s[28:], uint32(e.size))
	return append(out, s...), nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName || strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".") {
		return fmt.Errorf("name %.80q: want 1 to %d characters, no dot at its ends", name, MaxName)
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c > '~' || strings.IndexByte(`"*/:<>?\|`, c) >= 0 {
			return fmt.Errorf("name %.80q: %q is not allowed", name, c)
		}
	}
	return nil
}

// write writes one sector of the directory.
func (v *Volume) writeDir(d *dir, sector int) error {
	if _, err := v.dev.WriteAt(d.data[sector*sectorSize:(sector+1)*sectorSize], d.sectors[sector]); err != nil {
		return fmt.Errorf("write a directory: %w", err)
	}
	return nil
}

// clean makes sure that nothing but zeros lies behind the end mark: else what lies there would come to life when the mark moves.
func (v *Volume) clean(d *dir) error {
	changed := false
	for s := d.end / perSector; s < len(d.sectors); s++ {
		rest := d.data[max(s*sectorSize, d.end*slotSize) : (s+1)*sectorSize]
		if bytes.Equal(rest, make([]byte, len(rest))) {
			continue
		}
		clear(rest)
		changed = true
		if err := v.writeDir(d, s); err != nil {
			return err
		}
	}
	if changed {
		return v.sync()
	}
	return nil
}

// add makes an entry visible, in a sector that it has to itself, so that it can be renamed by one write. Nothing of it is seen before
// the last write. Everything that it refers to must be on the disk.
func (v *Volume) add(d *dir, e entry) error {
	b, err := d.encode(e)
	if err != nil {
		return err
	}
	if err := v.clean(d); err != nil {
		return err
	}
	sector := -1
	for s := range d.sectors {
		if d.unused(s) {
			sector = s
			break
		}
	}
	if sector < 0 {
		sector = len(d.sectors)
		if err := v.grow(d); err != nil {
			return err
		}
	}
	copy(d.data[sector*sectorSize:], b)
	if err := v.writeDir(d, sector); err != nil {
		return err
	}
	if d.end < sector*perSector { // it lies behind the end mark, which goes away now
		if err := v.sync(); err != nil {
			return err
		}
		for i := d.end; i < sector*perSector; i++ {
			d.slot(i)[0] = slotDeleted
		}
		if err := v.writeDir(d, sector-1); err != nil {
			return err
		}
	}
	d.parse()
	return v.sync()
}

// unused reports whether a sector has no slot in use, and can be reached: the end mark is in the sector before it at the earliest.
func (d *dir) unused(sector int) bool {
	for i := sector * perSector; i < (sector+1)*perSector; i++ {
		if i < d.end && d.slot(i)[0] != slotDeleted {
			return false
		}
	}
	return d.end > (sector-1)*perSector
}

// grow adds an empty cluster to a directory.
func (v *Volume) grow(d *dir) error {
	if int64(len(d.data))+v.cluster > maxDir {
		return fmt.Errorf("a directory is full: %d bytes", len(d.data))
	}
	more, err := v.allocate(1)
	if err != nil {
		return err
	}
	if _, err := v.dev.WriteAt(make([]byte, v.cluster), v.at(more[0])); err != nil {
		return fmt.Errorf("write a directory: %w", err)
	}
	if err := v.flush(); err != nil { // the new end of the chain before anything leads there
		return err
	}
	v.link(d.chain[len(d.chain)-1], more[0])
	if err := v.flush(); err != nil {
		return err
	}
	full := d.end == d.slots()
	d.chain = append(d.chain, more[0])
	d.data = append(d.data, make([]byte, v.cluster)...)
	for s := int64(0); s < v.cluster; s += sectorSize {
		d.sectors = append(d.sectors, v.at(more[0])+s)
	}
	if full {
		d.parse()
	}
	return nil
}

// strike takes slots out of use: that with the short name first, without which the others mean nothing. It syncs.
func (v *Volume) strike(d *dir, e entry) error {
	for i := e.from; i <= e.to; i++ {
		d.slot(i)[0] = slotDeleted
	}
	for s := e.to / perSector; s >= e.from/perSector; s-- {
		if err := v.writeDir(d, s); err != nil {
			return err
		}
		if err := v.sync(); err != nil {
			return err
		}
	}
	d.parse()
	return nil
}
