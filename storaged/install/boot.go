package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/storaged/slots"
)

// Where the loader is that a firmware starts which remembers nothing, and limits of what is copied from the medium.
const (
	loaderDir  = "EFI/BOOT"
	seedFile   = "random-seed" // of one machine's boot loader: no other may have it
	maxFiles   = 64
	maxDepth   = 4
	tempSuffix = ".part" // of a file that nothing is to start yet
)

// A file is one of the EFI partition's.
type file struct {
	dir, name string // on the medium
	to        string // name on the disk
	held      bool   // it starts something: it gets its name at the end
	size      int64
	sum       bundle.Digest
}

func (f file) temp() string {
	if f.held {
		return f.to + tempSuffix
	}
	return f.to
}

// list finds what of the medium's EFI partition belongs to the running system: all of it, but for kernels of other roots. The loader in EFI/BOOT is
// the last, the kernel the one before.
func list(ctx context.Context, v *fat.Volume, hash bundle.Digest) (out []file, err error) {
	var kernels, loaders []file
	var walk func(dir string, depth int) error
	walk = func(dir string, depth int) error {
		all, err := v.List(dir)
		if err != nil || depth > maxDepth {
			return errors.Join(err, errTooMuch(depth > maxDepth))
		}
		for _, i := range all {
			if i.Dir {
				if err := walk(path.Join(dir, i.Name), depth+1); err != nil {
					return err
				}
				continue
			}
			f := file{dir: dir, name: i.Name, to: i.Name, size: i.Size}
			if i.Size == 0 || i.Name == seedFile {
				continue
			}
			open, err := v.Open(dir, i.Name)
			if err != nil {
				return err
			}
			if dir == slots.KernelDir {
				n, ours := slots.ParseName(i.Name)
				if root, err := slots.KernelRoot(open, open.Size); !ours || err != nil || root != hash {
					continue
				}
				f.to, f.held = slots.Name{Sequence: 1, Version: n.Version}.String(), true
			}
			if f.sum, err = sum(ctx, open); err != nil {
				return err
			}
			switch {
			case dir == slots.KernelDir:
				kernels = append(kernels, f)
			case dir == loaderDir:
				f.held = true
				loaders = append(loaders, f)
			default:
				out = append(out, f)
			}
		}
		return errTooMuch(len(out)+len(kernels)+len(loaders) > maxFiles)
	}
	if err := walk("", 0); err != nil {
		return nil, fmt.Errorf("the medium's EFI partition: %w", err)
	}
	if len(kernels) == 0 || len(loaders) == 0 {
		return nil, fmt.Errorf("the medium's EFI partition has no kernel of the running system in %s, or no loader in %s", slots.KernelDir, loaderDir)
	}
	return append(append(out, kernels[0]), loaders...), nil
}

func errTooMuch(yes bool) error {
	if yes {
		return fmt.Errorf("more than %d files, or folders deeper than %d", maxFiles, maxDepth)
	}
	return nil
}

// A Boot is what a firmware starts: from the medium's EFI partition to the disk's.
type Boot struct {
	Medium Source
	ESP    Part
	// Again opens the disk's EFI partition for reading what is really there.
	Again func() (Source, func() error, error)
	Hash  bundle.Digest
	// Serial is that of a new file system.
	Serial uint32
}

// files opens the medium's EFI partition and lists what is to be copied.
func (b Boot) files(ctx context.Context) (*fat.Volume, []file, error) {
	from, err := fat.Open(readOnly{b.Medium}, b.Medium.Size())
	if err != nil {
		return nil, nil, fmt.Errorf("the medium's EFI partition: %w", err)
	}
	files, err := list(ctx, from, b.Hash)
	return from, files, err
}

// Copy brings all boot files to the disk and reads them back. What starts something has another name there.
func (b Boot) Copy(ctx context.Context, report Report) error {
	from, files, err := b.files(ctx)
	if err != nil {
		return err
	}
	v, err := fat.Open(b.ESP, b.ESP.Size())
	if err != nil { // the mark in the partition table says that it holds nothing of anybody
		if err := fat.Format(b.ESP, b.ESP.Size(), b.Serial, "ESP"); err != nil {
			return err
		}
		if v, err = fat.Open(b.ESP, b.ESP.Size()); err != nil {
			return err
		}
	}
	if err := v.Reclaim(func(a, _ string) string { return a }); err != nil {
		return err
	}
	total, done := int64(0), int64(0)
	for _, f := range files {
		total += f.size
	}
	for _, f := range files {
		if err := copyFile(ctx, from, v, f, func(n int64) { report(done+n, total) }); err != nil {
			return fmt.Errorf("%s: %w", path.Join(f.dir, f.to), err)
		}
		done += f.size
	}
	return b.check(ctx, files)
}

// copyFile brings one file to the disk, unless it has its last name there already.
func copyFile(ctx context.Context, from, to *fat.Volume, f file, report func(int64)) error {
	if f.held {
		if g, err := to.Open(f.dir, f.to); err == nil {
			if s, err := sum(ctx, g); err == nil && s == f.sum {
				return nil
			}
			if err := to.Remove(f.dir, f.to); err != nil {
				return err
			}
		}
	}
	if err := to.Mkdir(f.dir); err != nil {
		return err
	}
	g, err := to.Open(f.dir, f.temp())
	if err == nil && g.Size != f.size {
		err = errors.Join(to.Remove(f.dir, f.temp()), fs.ErrNotExist)
	}
	if errors.Is(err, fs.ErrNotExist) {
		g, err = to.Create(f.dir, f.temp(), f.size)
	}
	if err != nil {
		return err
	}
	source, err := from.Open(f.dir, f.name)
	if err != nil {
		return err
	}
	w := &writer{ctx: ctx, to: sized{g}, report: report}
	buf := make([]byte, piece)
	for at := int64(0); at < f.size; at += int64(len(buf)) {
		b := buf[:min(piece, f.size-at)]
		if n, err := source.ReadAt(b, at); n < len(b) {
			return fmt.Errorf("read the medium: %w", err)
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return g.Sync()
}

// check reads all files back from the disk.
func (b Boot) check(ctx context.Context, files []file) error {
	part, close, err := b.Again()
	if err != nil {
		return err
	}
	v, err := fat.Open(readOnly{part}, part.Size())
	for _, f := range files {
		if err != nil {
			break
		}
		g, e := v.Open(f.dir, f.temp())
		if errors.Is(e, fs.ErrNotExist) {
			g, e = v.Open(f.dir, f.to)
		}
		if err = e; err != nil {
			break
		}
		var s bundle.Digest
		if s, err = sum(ctx, g); err == nil && s != f.sum {
			err = fmt.Errorf("%s is another file than was written", path.Join(f.dir, f.to))
		}
	}
	if err := errors.Join(err, close()); err != nil {
		return fmt.Errorf("read the EFI partition back: %w", err)
	}
	return nil
}

// Finish gives kernel and loader their names, after which a firmware starts the disk: the loader's is the last.
func (b Boot) Finish(ctx context.Context) error {
	_, files, err := b.files(ctx)
	if err != nil {
		return err
	}
	v, err := fat.Open(b.ESP, b.ESP.Size())
	if err != nil {
		return err
	}
	for _, f := range files {
		if !f.held {
			continue
		}
		if _, err := v.Open(f.dir, f.to); err == nil {
			continue // done
		}
		if err := v.Rename(f.dir, f.temp(), f.to); err != nil {
			return err
		}
	}
	return nil
}

// readOnly is a part that is only read.
type readOnly struct{ Source }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, fs.ErrPermission }
func (readOnly) Sync() error                        { return nil }

// sized is a file as a Part.
type sized struct{ *fat.File }

func (s sized) Size() int64 { return s.File.Size }
