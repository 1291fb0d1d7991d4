package gpt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"unicode/utf16"
)

const (
	signature  = "EFI PART"
	revision   = 0x00010000
	headerSize = 92
)

var le = binary.LittleEndian

// Health tells which of a table's two copies are good. The zero value is a table in order.
type Health struct {
	Primary error // why the copy at the start cannot be used
	Backup  error // why the copy at the end cannot be used, or that it is not at the end because the disk grew
	// Stale is the sector of the backup header where the disk once ended, by the primary copy's word; 0 if the disk did not grow. The
	// header and the EntrySectors before it are remains of this table and nobody's data, unless a partition has them.
	Stale uint64
}

// OK reports whether nothing needs repair; WriteTo repairs.
func (h Health) OK() bool { return h.Primary == nil && h.Backup == nil }

// A Chunk is a piece of an encoded table and where it goes, in bytes.
type Chunk struct {
	Offset int64
	Data   []byte
}

// Encode returns the table for a disk of size bytes as two chunks, to be written in this order with a sync after
// each: the backup copy, then protective MBR and primary copy. Whenever the power fails, one of them is whole.
func (t Table) Encode(size int64) ([2]Chunk, error) {
	if err := t.Validate(size); err != nil {
		return [2]Chunk{}, err
	}
	end := uint64(size/SectorSize) - 1
	entries := t.entries()
	primary := append(protectiveMBR(end), t.header(1, end, 2, end, entries)...)
	primary = append(primary, entries...)
	backup := append([]byte{}, entries...)
	backup = append(backup, t.header(end, 1, end-EntrySectors, end, entries)...)
	return [2]Chunk{{int64(end-EntrySectors) * SectorSize, backup}, {0, primary}}, nil
}

// WriteTo writes the table to a disk of size bytes, in the order of Encode. If w has a method Sync() error, as
// files have, it is called after each copy.
func (t Table) WriteTo(w io.WriterAt, size int64) error {
	chunks, err := t.Encode(size)
	if err != nil {
		return err
	}
	for _, c := range chunks {
		if _, err := w.WriteAt(c.Data, c.Offset); err != nil {
			return fmt.Errorf("write partition table: %w", err)
		}
		if s, ok := w.(interface{ Sync() error }); ok {
			if err := s.Sync(); err != nil {
				return fmt.Errorf("write partition table: %w", err)
			}
		}
	}
	return nil
}

func (t Table) entries() []byte {
	b := make([]byte, Entries*entrySize)
	for _, p := range t.Partitions {
		e := b[(p.Number-1)*entrySize:]
		typ, id := p.Type.swapped(), p.GUID.swapped()
		copy(e[0:], typ[:])
		copy(e[16:], id[:])
		le.PutUint64(e[32:], p.First)
		le.PutUint64(e[40:], p.Last)
		le.PutUint64(e[48:], p.Attributes)
		for i, u := range utf16.Encode([]rune(p.Name)) {
			le.PutUint16(e[56+2*i:], u)
		}
	}
	return b
}

func (t Table) header(my, other, entryLBA, end uint64, entries []byte) []byte {
	h := make([]byte, SectorSize)
	id := t.DiskGUID.swapped()
	copy(h, signature)
	le.PutUint32(h[8:], revision)
	le.PutUint32(h[12:], headerSize)
	le.PutUint64(h[24:], my)
	le.PutUint64(h[32:], other)
	le.PutUint64(h[40:], FirstUsable)
	le.PutUint64(h[48:], end-EntrySectors-1)
	copy(h[56:], id[:])
	le.PutUint64(h[72:], entryLBA)
	le.PutUint32(h[80:], Entries)
	le.PutUint32(h[84:], entrySize)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:headerSize]))
	return h
}

// protectiveMBR covers the disk with one partition of type 0xEE, so that old tools see no free space.
func protectiveMBR(end uint64) []byte {
	b := make([]byte, SectorSize)
	e := b[446:]
	copy(e, []byte{0, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	le.PutUint32(e[8:], 1)
	le.PutUint32(e[12:], uint32(min(end, 0xffffffff)))
	b[510], b[511] = 0x55, 0xaa
	return b
}

// Read reads the table of a disk of size bytes. If only one of its copies is good it is used, and Health says what
// is wrong with the other. On a disk that grew, the backup copy is where the disk once ended; Health says so too.
// The error is ErrNone if the disk has no partition table of any kind.
func Read(r io.ReaderAt, size int64) (Table, Health, error) {
	if size < MinSize {
		return Table{}, Health{}, ErrNone
	}
	end := uint64(size/SectorSize) - 1
	mbr, err := readMBR(r)
	if err != nil {
		return Table{}, Health{}, err
	}
	first, errFirst := readCopy(r, 1, end)
	last, errLast := readCopy(r, end, end)
	switch {
	case errors.As(errFirst, new(ioError)):
		return Table{}, Health{}, errFirst
	case mbr == noMBR && errors.Is(errFirst, errSignature) && errors.Is(errLast, errSignature):
		return Table{}, Health{}, ErrNone
	case mbr == foreignMBR:
		return Table{}, Health{}, errors.New("the disk has an MBR, not a GPT")
	case errFirst != nil && errLast != nil:
		return Table{}, Health{}, fmt.Errorf("partition table: primary: %w; backup: %w", errFirst, errLast)
	case errFirst != nil:
		return last.Table, Health{Primary: errFirst}, nil
	}
	h := Health{}
	if mbr == noMBR {
		h.Primary = errors.New("protective MBR is missing")
	}
	switch {
	case first.other != end:
		h.Backup = fmt.Errorf("backup copy is at sector %d, the disk ends at %d", first.other, end)
		if first.other < end {
			h.Stale = first.other
		}
	case errLast != nil:
		h.Backup = errLast
	case last.id != first.id:
		h.Backup = errors.New("backup copy differs from the primary")
	}
	return first.Table, h, nil
}

type mbrKind int

const (
	noMBR mbrKind = iota
	protective
	foreignMBR
)

// An ioError is the disk's own: nothing may be concluded from it about what the disk holds.
type ioError struct{ error }

func (e ioError) Unwrap() error { return e.error }

func readMBR(r io.ReaderAt) (mbrKind, error) {
	b := make([]byte, SectorSize)
	if _, err := r.ReadAt(b, 0); err != nil {
		return 0, ioError{fmt.Errorf("read sector 0: %w", err)}
	}
	if b[510] != 0x55 || b[511] != 0xaa {
		return noMBR, nil
	}
	kind := noMBR // some boot sectors carry the signature and no partition
	for e := b[446:510]; len(e) > 0; e = e[16:] {
		switch e[4] {
		case 0:
		case 0xee:
			return protective, nil
		default:
			kind = foreignMBR
		}
	}
	return kind, nil
}

var errSignature = errors.New("no signature")

// decoded is one copy: the table, the LBA of the other copy, and what must be equal in both copies.
type decoded struct {
	Table
	other uint64
	id    struct {
		disk GUID
		crc  uint32
		last uint64
	}
}

func readCopy(r io.ReaderAt, lba, end uint64) (decoded, error) {
	h := make([]byte, SectorSize)
	if _, err := r.ReadAt(h, int64(lba)*SectorSize); err != nil {
		return decoded{}, ioError{fmt.Errorf("read sector %d: %w", lba, err)}
	}
	entryLBA, err := checkHeader(h, lba, end)
	if err != nil {
		return decoded{}, fmt.Errorf("header in sector %d: %w", lba, err)
	}
	b := make([]byte, Entries*entrySize)
	if _, err := r.ReadAt(b, int64(entryLBA)*SectorSize); err != nil {
		return decoded{}, ioError{fmt.Errorf("read sector %d: %w", entryLBA, err)}
	}
	if got, want := crc32.ChecksumIEEE(b), le.Uint32(h[88:]); got != want {
		return decoded{}, fmt.Errorf("entries in sector %d: checksum is %08x, header says %08x", entryLBA, got, want)
	}
	d := decoded{other: le.Uint64(h[32:])}
	d.DiskGUID = GUID(h[56:72]).swapped()
	d.id.disk, d.id.crc, d.id.last = d.DiskGUID, le.Uint32(h[88:]), le.Uint64(h[48:])
	for i := range Entries {
		if p, used := decodeEntry(i+1, b[i*entrySize:][:entrySize]); used {
			d.Partitions = append(d.Partitions, p)
		}
	}
	return d, d.Validate(int64(end+1) * SectorSize)
}

// checkHeader returns where the entries are.
func checkHeader(h []byte, lba, end uint64) (entryLBA uint64, err error) {
	if string(h[:8]) != signature {
		return 0, errSignature
	}
	if v := le.Uint32(h[8:]); v != revision {
		return 0, fmt.Errorf("revision is %#x, want %#x", v, revision)
	}
	if v := le.Uint32(h[12:]); v != headerSize {
		return 0, fmt.Errorf("length is %d, want %d", v, headerSize)
	}
	sum := append([]byte{}, h[:headerSize]...)
	clear(sum[16:20])
	if got, want := crc32.ChecksumIEEE(sum), le.Uint32(h[16:]); got != want {
		return 0, fmt.Errorf("checksum is %08x, header says %08x", got, want)
	}
	if v := le.Uint64(h[24:]); v != lba {
		return 0, fmt.Errorf("says that it is in sector %d", v)
	}
	if n, s := le.Uint32(h[80:]), le.Uint32(h[84:]); n != Entries || s != entrySize {
		return 0, fmt.Errorf("%d entries of %d bytes, want %d of %d", n, s, Entries, entrySize)
	}
	other, first, last := le.Uint64(h[32:]), le.Uint64(h[40:]), le.Uint64(h[48:])
	entryLBA = le.Uint64(h[72:])
	backup, wantEntries, wantOther := other, uint64(2), other
	if lba != 1 {
		backup, wantEntries, wantOther = lba, lba-EntrySectors, 1
	}
	switch {
	case backup > end:
		return 0, fmt.Errorf("the disk ends at sector %d, before the backup copy at %d", end, backup)
	case other != wantOther:
		return 0, fmt.Errorf("other copy is in sector %d, want %d", other, wantOther)
	case entryLBA != wantEntries:
		return 0, fmt.Errorf("entries are in sector %d, want %d", entryLBA, wantEntries)
	case first < FirstUsable || last >= backup-min(backup, EntrySectors) || first > last:
		return 0, fmt.Errorf("usable sectors are %d to %d on a disk that ends at %d", first, last, backup)
	}
	return entryLBA, nil
}

func decodeEntry(number int, b []byte) (p Partition, used bool) {
	if GUID(b[:16]) == (GUID{}) {
		return p, false
	}
	var name []uint16
	for n := b[56:]; len(n) > 0 && le.Uint16(n) != 0; n = n[2:] {
		name = append(name, le.Uint16(n))
	}
	p = Partition{
		Number: number, Type: GUID(b[:16]).swapped(), GUID: GUID(b[16:32]).swapped(),
		First: le.Uint64(b[32:]), Last: le.Uint64(b[40:]), Attributes: le.Uint64(b[48:]),
		Name: string(utf16.Decode(name)),
	}
	return p, true
}
