package uki

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

var le = binary.LittleEndian

const (
	maxImage      = 1 << 30 // most bytes of an image: offsets stay far from where 32 bits end
	sectionHeader = 40      // bytes of an entry in the table of sections
	certEntry     = 4       // of the data directory: the only one whose place is an offset in the file
)

// A pe is what a PE32+ file says about itself, with every offset and size checked against the file. Offsets are the file's.
type pe struct {
	coff, optional  int // where the headers are
	table           int // of sections
	checksum        int // the field of the optional header
	certDirectory   int // likewise, eight bytes
	headers         int // SizeOfHeaders: where the first section's data starts
	align, fileStep int // SectionAlignment and FileAlignment, powers of two
	sections        []section
	end             int // of the sections' data
	certificates    int // where the certificate table starts; the length of the file if there is none
}

// A section is an entry of the table of sections.
type section struct {
	name        string
	va, virtual int // address and length when loaded
	raw, size   int // offset and length in the file
}

// parse reads the headers of a file that anybody may have made. It takes only what has one meaning: sections in order and without
// gaps, in the file and in memory, and a certificate table at the end or none.
func parse(b []byte) (pe, error) {
	var p pe
	if len(b) > maxImage {
		return p, fmt.Errorf("image: %d bytes are more than %d", len(b), maxImage)
	}
	if len(b) < 0x40 || string(b[:2]) != "MZ" {
		return p, errors.New("not a PE file")
	}
	// Compared as wide numbers: a field may have any value.
	start := uint64(le.Uint32(b[0x3c:]))
	if start+24+112 > uint64(len(b)) || string(b[start:start+4]) != "PE\x00\x00" {
		return p, errors.New("not a PE file: no PE header")
	}
	p.coff = int(start) + 4
	p.optional = p.coff + 20
	length := int(le.Uint16(b[p.coff+16:]))
	p.table = p.optional + length
	if magic := le.Uint16(b[p.optional:]); magic != 0x20b {
		return p, fmt.Errorf("PE: magic number is %#x, want 0x20b of a 64-bit image", magic)
	}
	directories := le.Uint32(b[p.optional+108:])
	if directories <= certEntry || uint64(length) < 112+8*uint64(directories) {
		return p, fmt.Errorf("PE: optional header of %d bytes with %d data directories", length, directories)
	}
	p.checksum, p.certDirectory = p.optional+64, p.optional+112+8*certEntry
	p.headers = int(le.Uint32(b[p.optional+60:]))
	p.align, p.fileStep = int(le.Uint32(b[p.optional+32:])), int(le.Uint32(b[p.optional+36:]))
	if !power(p.align) || !power(p.fileStep) || p.fileStep < 8 || p.align < p.fileStep || p.align > 1<<20 {
		return p, fmt.Errorf("PE: alignments %d in memory and %d in the file", p.align, p.fileStep)
	}
	n := int(le.Uint16(b[p.coff+2:]))
	if p.headers%p.fileStep != 0 {
		return p, fmt.Errorf("PE: headers of %d bytes, not a multiple of %d", p.headers, p.fileStep)
	}
	if p.headers > len(b) || p.table+n*sectionHeader > p.headers {
		return p, fmt.Errorf("PE: %d sections do not fit into headers of %d bytes in a file of %d", n, p.headers, len(b))
	}
	if err := p.readSections(b, n); err != nil {
		return p, err
	}
	return p, p.readCertificates(b)
}

func power(n int) bool { return n > 0 && n&(n-1) == 0 }

func (p *pe) readSections(b []byte, n int) error {
	p.end = p.headers
	memory := p.headers
	for i := range n {
		h := b[p.table+i*sectionHeader:][:sectionHeader]
		name, _, _ := strings.Cut(string(h[:8]), "\x00")
		s := section{name, int(le.Uint32(h[12:])), int(le.Uint32(h[8:])), int(le.Uint32(h[20:])), int(le.Uint32(h[16:]))}
		if s.size == 0 {
			s.raw = p.end // one of zeros only may name any place
		}
		switch {
		case s.raw != p.end:
			return fmt.Errorf("PE: section %q starts at %d, not where what stands before it ends, at %d", name, s.raw, p.end)
		case s.size%p.fileStep != 0:
			return fmt.Errorf("PE: section %q has %d bytes, not a multiple of %d", name, s.size, p.fileStep)
		case s.size > len(b)-s.raw:
			return fmt.Errorf("PE: section %q of %d bytes at %d is longer than the file of %d", name, s.size, s.raw, len(b))
		case s.va < memory || s.va%p.align != 0 || s.va+s.virtual > maxImage:
			return fmt.Errorf("PE: section %q is loaded at %#x: not behind the one before, or not aligned", name, s.va)
		}
		p.end, memory = s.raw+s.size, s.va+s.virtual
		p.sections = append(p.sections, s)
	}
	return nil
}

func (p *pe) readCertificates(b []byte) error {
	offset, size := uint64(le.Uint32(b[p.certDirectory:])), uint64(le.Uint32(b[p.certDirectory+4:]))
	p.certificates = len(b)
	if offset == 0 && size == 0 {
		return nil
	}
	if offset < uint64(p.end) || offset%8 != 0 || size < 8 || offset+size != uint64(len(b)) {
		return fmt.Errorf("PE: certificate table of %d bytes at %d, sections end at %d and the file at %d", size, offset, p.end, len(b))
	}
	p.certificates = int(offset)
	return nil
}

// memoryEnd returns the first address behind all sections.
func (p *pe) memoryEnd() int {
	if len(p.sections) == 0 {
		return p.headers
	}
	last := p.sections[len(p.sections)-1]
	return last.va + last.virtual
}

// up rounds n up to a multiple of step, a power of two.
func up(n, step int) int { return (n + step - 1) &^ (step - 1) }
