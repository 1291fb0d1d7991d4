package image

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

const (
	libDir = "/usr/lib/x86_64-linux-gnu" // where Debian's dynamic linker looks without being told
	linker = "ld-linux-x86-64.so.2"
	lib64  = "/usr/lib64/" + linker // PT_INTERP says /lib64/..., a link into /usr
)

// linksOf returns what a dynamic executable or library asks the dynamic linker for, and its interpreter. A static
// one asks for nothing.
func linksOf(r io.ReaderAt) (libs []string, interp string, err error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, "", err
	}
	if libs, err = f.ImportedLibraries(); err != nil && !errors.Is(err, elf.ErrNoSymbols) {
		return nil, "", err
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b := make([]byte, min(p.Filesz, 4096))
			if _, err := p.ReadAt(b, 0); err != nil {
				return nil, "", err
			}
			interp = string(bytes.TrimRight(b, "\x00"))
		}
	}
	return libs, interp, nil
}

// closure returns the paths of all libraries that the named files need, directly or through others, in order. Each
// is named by the soname asked for, below libDir.
func closure(files debian.Files, roots []string) ([]string, error) {
	seen := map[string]bool{}
	var libs []string
	for queue := slices.Clone(roots); len(queue) > 0; queue = queue[1:] {
		_, file, ok := files.Lookup(queue[0])
		if !ok {
			return nil, fmt.Errorf("%s is in no package of the lock", queue[0])
		}
		names, interp, err := linksOf(bytes.NewReader(file.Data))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", queue[0], err)
		}
		if interp != "" && interp != "/lib64/"+linker {
			return nil, fmt.Errorf("%s: wants the interpreter %s", queue[0], interp)
		}
		for _, name := range names {
			lib := path.Join(libDir, name)
			if seen[lib] {
				continue
			}
			if _, _, ok := files.Lookup(lib); !ok {
				return nil, fmt.Errorf("%s: needs %s, which is in no package of the lock", queue[0], name)
			}
			seen[lib] = true
			libs, queue = append(libs, lib), append(queue, lib)
		}
	}
	slices.Sort(libs)
	return libs, nil
}
