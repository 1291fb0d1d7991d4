package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

// fakeELF returns an ELF file that nobody can run: it asks for an interpreter and libraries, and tells module information.
func fakeELF(interp string, libs []string, modinfo map[string]string) []byte {
	var dynstr, dynamic, info bytes.Buffer
	dynstr.WriteByte(0)
	le := binary.LittleEndian
	for _, lib := range libs {
		binary.Write(&dynamic, le, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: uint64(dynstr.Len())})
		dynstr.WriteString(lib + "\x00")
	}
	binary.Write(&dynamic, le, elf.Dyn64{})
	for _, k := range []string{"name", "depends"} {
		if v, ok := modinfo[k]; ok {
			info.WriteString(k + "=" + v + "\x00")
		}
	}
	names := "\x00.dynstr\x00.dynamic\x00.modinfo\x00.shstrtab\x00"
	nameOf := func(s string) uint32 { return uint32(strings.Index(names, s+"\x00")) }
	const headers = 64 + 56
	var body bytes.Buffer
	body.WriteString(interp + "\x00")
	sections := []elf.Section64{{}}
	for _, s := range []struct {
		name string
		typ  elf.SectionType
		link uint32
		data []byte
	}{{".dynstr", elf.SHT_STRTAB, 0, dynstr.Bytes()}, {".dynamic", elf.SHT_DYNAMIC, 1, dynamic.Bytes()},
		{".modinfo", elf.SHT_PROGBITS, 0, info.Bytes()}, {".shstrtab", elf.SHT_STRTAB, 0, []byte(names)}} {
		sections = append(sections, elf.Section64{Name: nameOf(s.name), Type: uint32(s.typ), Link: s.link, Off: uint64(headers + body.Len()), Size: uint64(len(s.data))})
		body.Write(s.data)
	}
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Shoff: uint64(headers + body.Len()),
		Ehsize: 64, Phentsize: 56, Shentsize: 64, Shnum: uint16(len(sections)), Shstrndx: uint16(len(sections) - 1)}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	if interp != "" {
		h.Phnum = 1
	}
	var out bytes.Buffer
	binary.Write(&out, le, h)
	binary.Write(&out, le, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: headers, Filesz: uint64(len(interp) + 1)})
	out.Write(body.Bytes())
	binary.Write(&out, le, sections)
	return out.Bytes()
}

// fakeDebian is what the plan needs of Debian, in small.
func fakeDebian() debian.Files {
	f := debian.Files{
		libDir + "/libc.so.6":           {Package: "libc6", Data: fakeELF("", []string{linker}, nil)},
		libDir + "/" + linker:           {Package: "libc6", Data: fakeELF("", nil, nil)},
		libDir + "/libunused.so.1":      {Package: "libunused", Data: fakeELF("", nil, nil)},
		libDir + "/libmount.so.1":       {Package: "libmount1", Link: "libmount.so.1.1.0"},
		libDir + "/libmount.so.1.1.0":   {Package: "libmount1", Data: fakeELF("", []string{"libblkid.so.1", "libc.so.6"}, nil)},
		libDir + "/libblkid.so.1":       {Package: "libblkid1", Data: fakeELF("", []string{"libc.so.6"}, nil)},
		libDir + "/xtables/libxt_A.so":  {Package: "iptables", Data: fakeELF("", []string{"libc.so.6"}, nil)},
		libDir + "/xtables/libxt_b.so":  {Package: "iptables", Link: "libxt_A.so"},
		libDir + "/xtables/libebt_c.so": {Package: "iptables", Data: fakeELF("", []string{"libnone.so"}, nil)},
		"/etc/mke2fs.conf":              {Package: "e2fsprogs", Data: []byte("[defaults]\n")},
		authorityDir + "b.crt":          {Package: "ca-certificates", Data: []byte("second\n")},
		authorityDir + "a.crt":          {Package: "ca-certificates", Data: []byte("first\n")},
		"/usr/bin/unwanted":             {Package: "mount", Data: []byte("#!/bin/sh\n")},
	}
	for _, t := range tools {
		f[t.from] = debian.File{Package: "tools", Data: fakeELF("/lib64/"+linker, []string{"libmount.so.1"}, nil)}
	}
	return f
}
