package fat

import (
	"fmt"
	"io"
	"io/fs"
	"strings"
)

// Info is what a directory says of a file.
type Info struct {
	Name string
	Size int64 // bytes
	Dir  bool
}

// A File is an open file. Its size never changes. It is valid until the file is removed.
type File struct {
	Info
	v       *Volume
	extents []extent
}

// An extent is a piece of a file that lies in one place.
type extent struct{ from, at, length int64 }

// walk returns the directory of that path ("EFI/Linux"; "" is the root).
func (v *Volume) walk(path string) (*dir, error) {
	d, err := v.readDir(v.root)
	if err != nil {
		return nil, fmt.Errorf("read the root directory: %w", err)
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		e, ok := d.find(name)
		if !ok || !e.isDir() {
			return nil, fmt.Errorf("%s: %w", path, fs.ErrNotExist)
		}
		if d, err = v.readDir(e.first); err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
	}
	return d, nil
}

// List returns what is in a directory, in no particular order. The error is fs.ErrNotExist if there is no such directory.
func (v *Volume) List(path string) ([]Info, error) {
	d, err := v.walk(path)
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, e := range d.entries {
		if e.attr&attrVolume == 0 && e.name != "." && e.name != ".." {
			out = append(out, Info{e.name, e.size, e.isDir()})
		}
	}
	return out, nil
}

// Open returns a file. The error is fs.ErrNotExist if there is none.
func (v *Volume) Open(path, name string) (*File, error) {
	d, err := v.walk(path)
	if err != nil {
		return nil, err
	}
	e, ok := d.find(name)
	if !ok || e.isDir() {
		return nil, fmt.Errorf("%s/%s: %w", path, name, fs.ErrNotExist)
	}
	f, err := v.file(e)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", path, name, err)
	}
	return f, nil
}

func (v *Volume) file(e entry) (*File, error) {
	f := &File{Info: Info{Name: e.name, Size: e.size}, v: v}
	if e.size == 0 {
		return f, nil
	}
	chain, err := v.chain(e.first, -1)
	if err != nil {
		return nil, err
	}
	if int64(len(chain))*v.cluster < e.size {
		return nil, fmt.Errorf("%d bytes in %d clusters", e.size, len(chain))
	}
	for i, c := range chain {
		if n := len(f.extents); n > 0 && f.extents[n-1].at+f.extents[n-1].length == v.at(c) {
			f.extents[n-1].length += v.cluster
			continue
		}
		f.extents = append(f.extents, extent{int64(i) * v.cluster, v.at(c), v.cluster})
	}
	return f, nil
}

// each calls do for every piece of p, which lies at off of the file, and returns how many bytes were done.
func (f *File) each(p []byte, off int64, do func(p []byte, at int64) (int, error)) (done int, err error) {
	for _, e := range f.extents {
		start := off + int64(done)
		if done == len(p) || start < e.from || start >= e.from+e.length {
			continue
		}
		n := min(len(p)-done, int(e.from+e.length-start))
		n, err = do(p[done:done+n], e.at+start-e.from)
		if done += n; err != nil {
			return done, err
		}
	}
	return done, nil
}

// ReadAt is as in io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	want := len(p)
	if off < 0 || off >= f.Size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), f.Size-off)]
	n, err := f.each(p, off, f.v.dev.ReadAt)
	if err == nil && n < want {
		err = io.EOF
	}
	return n, err
}

// WriteAt changes a part of the file; nothing may be written behind its end. Sync makes it last.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > f.Size {
		return 0, fmt.Errorf("%s: bytes %d to %d of %d", f.Name, off, off+int64(len(p)), f.Size)
	}
	return f.each(p, off, f.v.dev.WriteAt)
}

// Sync returns when everything that was written survives a power cut.
func (f *File) Sync() error { return f.v.sync() }

// Create makes a file of size bytes, at least 1, whose content is whatever its place on the disk held before.
func (v *Volume) Create(path, name string, size int64) (*File, error) {
	d, err := v.walk(path)
	if err != nil {
		return nil, err
	}
	if _, ok := d.find(name); ok {
		return nil, fmt.Errorf("%s/%s: %w", path, name, fs.ErrExist)
	}
	if size < 1 || size > 1<<32-1 {
		return nil, fmt.Errorf("%s/%s: a file of %d bytes", path, name, size)
	}
	if err := checkName(name); err != nil {
		return nil, err
	}
	if size > v.Free() {
		return nil, fmt.Errorf("%s/%s: %w: %d bytes are needed, %d are free", path, name, ErrFull, size, v.Free())
	}
	chain, err := v.allocate(int((size + v.cluster - 1) / v.cluster))
	if err != nil {
		return nil, err
	}
	if err := v.flush(); err != nil { // before anything refers to it
		return nil, err
	}
	e := entry{name: name, attr: attrArchive, first: chain[0], size: size}
	if err := v.add(d, e); err != nil {
		return nil, fmt.Errorf("%s/%s: %w", path, name, err)
	}
	f, err := v.file(e)
	if err != nil {
		return nil, err
	}
	return f, v.tellFree()
}

// Remove takes a file away. It is no error if there is none.
func (v *Volume) Remove(path, name string) error {
	d, err := v.walk(path)
	if err != nil {
		return err
	}
	e, ok := d.find(name)
	if !ok {
		return nil
	}
	if e.isDir() {
		return fmt.Errorf("%s/%s is a directory", path, name)
	}
	for _, o := range d.entries {
		if o.first == e.first && o.from != e.from && e.size > 0 {
			return fmt.Errorf("%s/%s and %s are one file; it needs Reclaim first", path, name, o.name)
		}
	}
	var chain []uint32
	if e.size > 0 {
		if chain, err = v.chain(e.first, -1); err != nil {
			return fmt.Errorf("%s/%s: %w", path, name, err)
		}
	}
	if err := v.strike(d, e); err != nil {
		return err
	}
	for _, c := range chain {
		v.link(c, free)
	}
	if err := v.flush(); err != nil {
		return err
	}
	return v.tellFree()
}

// Rename gives a file another name in its directory. A file that Create made is renamed by the write of one sector; another one may be
// there under both names after a power cut.
func (v *Volume) Rename(path, from, to string) error {
	d, err := v.walk(path)
	if err != nil {
		return err
	}
	e, ok := d.find(from)
	if !ok || e.isDir() {
		return fmt.Errorf("%s/%s: %w", path, from, fs.ErrNotExist)
	}
	if _, ok := d.find(to); ok {
		return fmt.Errorf("%s/%s: %w", path, to, fs.ErrExist)
	}
	if err := v.clean(d); err != nil {
		return err
	}
	named := e
	named.name = to
	if b, err := d.encode(named); err != nil {
		return err
	} else if s := e.to / perSector; e.from/perSector == s && d.replace(e, b) {
		d.parse()
		if err := v.writeDir(d, s); err != nil {
			return err
		}
		return v.sync()
	}
	if err := v.add(d, named); err != nil {
		return err
	}
	if err := v.strike(d, e); err != nil { // add moves no slots
		return err
	}
	return v.tellFree()
}

// replace puts slots in the place of an entry, within its sector, if they fit.
func (d *dir) replace(e entry, b []byte) bool {
	base := e.to / perSector * perSector
	isFree := func(i int) bool {
		return i >= d.end || i >= e.from && i <= e.to || d.slot(i)[0] == slotDeleted
	}
	need := len(b) / slotSize
	for at, run := base, 0; at < base+perSector; at++ {
		if run++; !isFree(at) {
			run = 0
		}
		if run < need {
			continue
		}
		for i := e.from; i <= e.to; i++ {
			d.slot(i)[0] = slotDeleted
		}
		copy(d.data[(at-need+1)*slotSize:], b)
		return true
	}
	return false
}
