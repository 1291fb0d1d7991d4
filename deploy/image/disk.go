package image

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	disk "github.com/bulkhead-os/bulkhead/internal/layout"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

const (
	mib = 1 << 20

	slotSize = disk.SlotSize
	treeSize = disk.TreeSize
)

// layout returns the partition table and the size of the disk for an image with that root hash. Pure.
func layout(root [32]byte) (gpt.Table, int64) {
	t := gpt.Table{DiskGUID: derived("disk", root), Partitions: disk.Partitions(func(name string) gpt.GUID {
		switch name {
		case disk.RootA:
			return gpt.GUID(root[:16])
		case disk.TreeA:
			return gpt.GUID(root[16:])
		}
		return derived(name, root)
	})}
	end := t.Partitions[len(t.Partitions)-1]
	return t, end.Start() + end.Size() + mib // room for the backup table
}

// derived makes a GUID that follows from the image, so that builds are reproducible.
func derived(what string, root [32]byte) gpt.GUID {
	sum := sha256.Sum256(append([]byte("bulkhead "+what+" "), root[:]...))
	g := gpt.GUID(sum[:16])
	g[6], g[8] = g[6]&0x0f|0x80, g[8]&0x3f|0x80 // version 8: its own affair
	return g
}

// writeDisk writes the image's disk as a sparse file: the EFI partition, the root's file system and its hash tree in slot A.
func writeDisk(out, esp, squashfs string, tree *verity.Tree) error {
	table, size := layout(tree.Root)
	f, err := os.OpenFile(out, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	for i, file := range []string{esp, squashfs} {
		if err := copyTo(f, table.Partitions[i].Start(), file); err != nil {
			return err
		}
	}
	if _, err := tree.WriteTo(&sparseWriter{f: f, off: table.Partitions[2].Start()}); err != nil {
		return err
	}
	chunks, err := table.Encode(size)
	if err != nil {
		return err
	}
	for _, c := range chunks {
		if _, err := f.WriteAt(c.Data, c.Offset); err != nil {
			return err
		}
	}
	return f.Close()
}

// copyTo copies a file to an offset of another, without its blocks of zeros.
func copyTo(f *os.File, offset int64, file string) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{&sparseWriter{f: f, off: offset}}, struct{ io.Reader }{in}, make([]byte, 1<<20))
	return err
}

// fits says by how much something is too large for its place.
func fits(what string, size, place int64) error {
	if size > place {
		return fmt.Errorf("%s is %d bytes, %d more than its partition of %d MiB holds", what, size, size-place, place/mib)
	}
	return nil
}

// sparseWriter writes from an offset on and leaves holes where whole blocks are zero.
type sparseWriter struct {
	f   *os.File
	off int64
}

var zeros [64 << 10]byte

func (w *sparseWriter) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n := min(len(b)-done, len(zeros))
		if piece := b[done : done+n]; !bytes.Equal(piece, zeros[:n]) {
			if _, err := w.f.WriteAt(piece, w.off); err != nil {
				return done, err
			}
		}
		done, w.off = done+n, w.off+int64(n)
	}
	return done, nil
}
