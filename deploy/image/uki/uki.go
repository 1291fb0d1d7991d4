// Package uki makes what a UEFI firmware boots and trusts: unified kernel images (systemd's stub with a kernel, an initramfs, a
// command line and more as sections), Authenticode signatures, and the signed variables that tell a firmware whose signatures count.
//
// It is pure: bytes in, bytes out. Keys are crypto.Signers, so that they may live in a file, a token or a key service. Equal inputs
// give equal bytes, signatures included: RSA with PKCS#1 v1.5 has no randomness, and signing times are the caller's.
// What it reads may be anybody's: see parse.
package uki

import (
	"bytes"
	"fmt"
	"strings"
)

// A Section is a named part of a unified kernel image, such as ".linux". The stub measures name and data.
type Section struct {
	Name string // of at most 8 bytes, starting with a dot
	Data []byte // not empty
}

// characteristics of a section: initialised data that may only be read.
const characteristics = 0x40000040

// Build appends sections to systemd's stub, which must be unsigned. Addresses follow from the lengths, so that nothing overlaps
// however large a kernel gets. A section's length in memory is the data's exactly: that is what the stub measures.
func Build(stub []byte, sections []Section) ([]byte, error) {
	p, err := parse(stub)
	if err != nil {
		return nil, fmt.Errorf("stub: %w", err)
	}
	if p.certificates != p.end || p.end != len(stub) {
		return nil, fmt.Errorf("stub: has %d bytes behind its sections: a signature?", len(stub)-p.end)
	}
	if room := (p.headers - p.table) / sectionHeader; len(p.sections)+len(sections) > room {
		return nil, fmt.Errorf("stub: its headers have room for %d sections, it has %d and %d are to be added", room, len(p.sections), len(sections))
	}
	out := bytes.Clone(stub)
	grown := le.Uint32(out[p.optional+8:])
	for _, s := range sections {
		if err := p.check(s); err != nil {
			return nil, fmt.Errorf("section %q: %w", s.Name, err)
		}
		added := section{name: s.Name, va: up(p.memoryEnd(), max(p.align, 4096)), virtual: len(s.Data), raw: up(len(out), p.fileStep), size: up(len(s.Data), p.fileStep)}
		h := out[p.table+len(p.sections)*sectionHeader:][:sectionHeader]
		clear(h)
		copy(h[:8], s.Name)
		le.PutUint32(h[8:], uint32(added.virtual))
		le.PutUint32(h[12:], uint32(added.va))
		le.PutUint32(h[16:], uint32(added.size))
		le.PutUint32(h[20:], uint32(added.raw))
		le.PutUint32(h[36:], characteristics)
		grown += uint32(added.size)
		out = append(out, make([]byte, added.raw-len(out))...)
		out = append(out, s.Data...)
		out = append(out, make([]byte, added.size-len(s.Data))...)
		p.sections = append(p.sections, added)
		if added.va+added.virtual > maxImage || len(out) > maxImage {
			return nil, fmt.Errorf("section %q: the image grows beyond %d bytes", s.Name, maxImage)
		}
	}
	le.PutUint16(out[p.coff+2:], uint16(len(p.sections)))
	le.PutUint32(out[p.optional+8:], grown) // SizeOfInitializedData
	le.PutUint32(out[p.optional+56:], uint32(up(p.memoryEnd(), p.align)))
	clear(out[p.coff+8 : p.coff+16]) // the symbol table, which would lie between sections
	clear(out[p.checksum : p.checksum+4])
	return out, nil
}

func (p *pe) check(s Section) error {
	if len(s.Name) < 2 || len(s.Name) > 8 || s.Name[0] != '.' || strings.ContainsRune(s.Name, 0) {
		return fmt.Errorf("a name is a dot and 1 to 7 bytes")
	}
	if len(s.Data) == 0 || len(s.Data) > maxImage {
		return fmt.Errorf("%d bytes are not 1 to %d", len(s.Data), maxImage)
	}
	for _, old := range p.sections {
		if old.name == s.Name {
			return fmt.Errorf("is there already")
		}
	}
	return nil
}

// Sections returns the sections of an image as they are loaded, in their order: what lies behind the file's part is zero and left
// out, what the file has for alignment only is cut off. The data is part of image.
func Sections(image []byte) ([]Section, error) {
	p, err := parse(image)
	if err != nil {
		return nil, err
	}
	var out []Section
	for _, s := range p.sections {
		out = append(out, Section{s.name, image[s.raw : s.raw+min(s.size, s.virtual)]})
	}
	return out, nil
}
