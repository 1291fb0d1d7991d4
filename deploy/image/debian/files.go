package debian

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
)

// A File is a regular file or a symbolic link of a package, in memory.
type File struct {
	Package string
	Data    []byte
	Link    string // its target, if it is a symbolic link
}

// Files maps absolute paths to files. Folders, owners and modes are left out: the image has rules of its own.
type Files map[string]File

// Read returns the files of all packages of the lock that keep wants, from the cache. Fetch comes first.
func (c Cache) Read(ctx context.Context, l Lock, keep func(path string) bool) (Files, error) {
	files := Files{}
	for _, p := range l.Packages {
		if err := c.verify(p); err != nil {
			return nil, fmt.Errorf("package %s: %w", p.Name, err)
		}
		if err := c.read(ctx, p, keep, files); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", p.Name, err)
		}
	}
	return files, nil
}

// verify looks at the content again: a cache is only a folder that others can write to.
func (c Cache) verify(p Package) error {
	got, _, err := sum(c.Path(p))
	if err != nil {
		return err
	}
	if got != p.SHA256 {
		os.Remove(c.Path(p))
		return fmt.Errorf("the cached file was damaged and is removed (SHA-256 %s): try again", got)
	}
	return nil
}

func (c Cache) read(ctx context.Context, p Package, keep func(string) bool, files Files) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", c.Path(p))
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		return err
	}
	err = readTar(out, p.Name, keep, files)
	io.Copy(io.Discard, out)
	if werr := cmd.Wait(); werr != nil {
		return fmt.Errorf("dpkg-deb: %w: %s", werr, bytes.TrimSpace(errs.Bytes()))
	}
	return err
}

func readTar(r io.Reader, pkg string, keep func(string) bool, files Files) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		if !keep(name) {
			continue
		}
		f := File{Package: pkg}
		switch h.Typeflag {
		case tar.TypeReg:
			if f.Data, err = io.ReadAll(tr); err != nil {
				return err
			}
		case tar.TypeSymlink:
			f.Link = h.Linkname
		case tar.TypeLink:
			f = files[path.Clean("/"+h.Linkname)]
		default:
			continue
		}
		if old, dup := files[name]; dup {
			return fmt.Errorf("%s is also in package %s", name, old.Package)
		}
		files[name] = f
	}
}

// Lookup returns the regular file that name leads to through symbolic links, and its path.
func (f Files) Lookup(name string) (string, File, bool) {
	for range 8 {
		file, ok := f[name]
		if !ok || file.Link == "" {
			return name, file, ok
		}
		if strings.HasPrefix(file.Link, "/") {
			name = path.Clean(file.Link)
		} else {
			name = path.Join(path.Dir(name), file.Link)
		}
	}
	return name, File{}, false
}
