package slots

import (
	"context"
	"fmt"
	"io"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

// readSize is how much is read at once, in bytes.
const readSize = 256 << 10

// Verify reads a slot from the disk, whole, and checks it against the root hash that its partitions' GUIDs spell: whether it can be started.
func (s *Store) Verify(ctx context.Context, slot int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	layout, err := s.cfg.Disk.Look(ctx)
	if err != nil {
		return err
	}
	return s.verify(ctx, slot, layout, layout.Slots[slot], nil)
}

// verify reads a slot from the disk, whole, and checks it against a root hash. report, which may be nil, is told how many bytes were read.
func (s *Store) verify(ctx context.Context, slot int, layout Layout, root bundle.Digest, report func(int64)) error {
	data, err := s.cfg.Disk.Open(rootName(slot), Direct)
	if err != nil {
		return err
	}
	defer data.Close()
	tree, err := s.cfg.Disk.Open(treeName(slot), Direct)
	if err != nil {
		return err
	}
	defer tree.Close()
	return verity.Verify(newReader(ctx, data, layout.Root[slot], report), layout.Root[slot], newReader(ctx, tree, layout.Tree[slot], nil), root)
}

// A reader reads a part from its start in large pieces, and ends with ctx.
type reader struct {
	ctx    context.Context
	r      io.Reader
	buf    []byte
	left   []byte // of buf
	at     int64
	report func(int64)
}

func newReader(ctx context.Context, r io.ReaderAt, size int64, report func(int64)) *reader {
	return &reader{ctx: ctx, r: io.NewSectionReader(r, 0, size), buf: make([]byte, readSize), report: report}
}

func (r *reader) Read(p []byte) (int, error) {
	if len(r.left) == 0 {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := io.ReadFull(r.r, r.buf)
		if n == 0 {
			return 0, err
		}
		r.left = r.buf[:n]
		r.at += int64(n)
		if r.report != nil {
			r.report(r.at)
		}
	}
	n := copy(p, r.left)
	r.left = r.left[n:]
	return n, nil
}

// slotSize returns how many bytes of a slot's ROOT partition are its file system, by its hash tree.
func slotSize(tree Part) (int64, error) {
	b := make([]byte, verity.BlockSize)
	if _, err := tree.ReadAt(b, 0); err != nil {
		return 0, fmt.Errorf("read the superblock: %w", err)
	}
	sb, err := verity.ParseSuperblock(b)
	return int64(sb.Blocks) * verity.BlockSize, err
}
