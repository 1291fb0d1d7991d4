package image

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
)

// interpreters are programs that turn a file or an argument into something to run. A node has none of them.
var interpreters = regexp.MustCompile(`^(.*sh|busybox|toybox|box|perl|python|ruby|lua|tclsh|awk|[gmn]awk|sed|env|gdb|node|php|expect|vi|vim|ed|make|script|su|sudo|login|sshd?|agetty|getty|telnetd?)[0-9.]*$`)

// check refuses a root that holds a shell, a script, or a program that asks for an interpreter or for libraries that
// are not there. It reads what it needs of every file.
func check(t Tree) error {
	var errs []error
	paths := map[string]bool{}
	for _, e := range t {
		paths[e.Path] = true
	}
	for _, e := range t {
		if err := checkEntry(e, paths); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", e.Path, err))
		}
	}
	return errors.Join(errs...)
}

func checkEntry(e Entry, paths map[string]bool) error {
	if e.Mode.IsDir() {
		return nil
	}
	if interpreters.MatchString(path.Base(e.Path)) {
		return errors.New("a shell or interpreter has no place on a node")
	}
	if e.Mode.Type() == fs.ModeSymlink {
		return nil
	}
	var r io.ReaderAt = bytes.NewReader(e.Data)
	if e.Host != "" {
		f, err := os.Open(e.Host)
		if err != nil {
			return err
		}
		defer f.Close()
		r = f
	}
	head := make([]byte, 4)
	if n, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	} else if head = head[:n]; bytes.HasPrefix(head, []byte("#!")) {
		return errors.New("a script has no place on a node")
	}
	if e.Mode.Perm()&0o111 == 0 {
		return nil
	}
	if string(head) != elf.ELFMAG {
		return errors.New("executable, but not an ELF file")
	}
	return checkLinks(r, paths)
}

func checkLinks(r io.ReaderAt, paths map[string]bool) error {
	libs, interp, err := linksOf(r)
	if err != nil {
		return err
	}
	if interp != "" && (interp != "/lib64/"+linker || !paths[lib64]) {
		return fmt.Errorf("wants the interpreter %s", interp)
	}
	missing := slices.DeleteFunc(libs, func(l string) bool { return paths[path.Join(libDir, l)] })
	if len(missing) > 0 {
		return fmt.Errorf("needs %s", strings.Join(missing, ", "))
	}
	return nil
}
