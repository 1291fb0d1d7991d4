// Package install copies the running system from the medium that it was started from to a disk: the root with its hash tree, and what a
// firmware starts. storaged's plan decides which disk, and makes the partitions before.
//
// It believes nothing that it has written before it has read it back, around the page cache, and nothing of the medium that the root hash of
// the running kernel does not vouch for, but for the boot files, which a firmware checks. It may be interrupted anywhere and begun again: what
// is on the disk already is left as it is. Nothing starts the disk before Finish, whose last write is the one that makes it a system.
package install

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/internal/verity"
)

// A Part is a partition of the target.
type Part interface {
	fat.Device
	Size() int64 // bytes
}

// A Source is a partition of the medium.
type Source interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Report is told how many bytes of how many are done. It must not block.
type Report func(done, total int64)

// piece is how much is copied at once, syncEvery how much may be written and not yet be on the disk; in bytes.
const (
	piece     = 256 << 10
	syncEvery = 4 << 20
)

// A writer writes to a part from its start, and only what the part does not hold already.
type writer struct {
	ctx       context.Context
	to        Part
	at, dirty int64
	have      []byte
	report    func(int64) // told how far it is; may be nil
}

func (w *writer) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	if w.have == nil {
		w.have = make([]byte, piece)
	}
	for done := 0; done < len(b); {
		n := min(len(b)-done, piece)
		if err := w.put(b[done:done+n], w.at); err != nil {
			return done, err
		}
		done, w.at = done+n, w.at+int64(n)
	}
	if w.report != nil {
		w.report(w.at)
	}
	return len(b), nil
}

// put writes one piece, unless it is there. What cannot be read may still be written.
func (w *writer) put(b []byte, at int64) error {
	if n, err := w.to.ReadAt(w.have[:len(b)], at); n == len(b) && (err == nil || errors.Is(err, io.EOF)) && string(w.have[:n]) == string(b) {
		return nil
	}
	if _, err := w.to.WriteAt(b, at); err != nil {
		return err
	}
	if w.dirty += int64(len(b)); w.dirty < syncEvery {
		return nil
	}
	w.dirty = 0
	return w.to.Sync()
}

// A stream reads a part from its start in large pieces, and ends with ctx.
type stream struct {
	ctx    context.Context
	r      io.Reader
	left   []byte
	buf    []byte
	at     int64
	report func(int64) // told how far it is; may be nil
}

func newStream(ctx context.Context, r io.ReaderAt, size int64, report func(int64)) *stream {
	return &stream{ctx: ctx, r: io.NewSectionReader(r, 0, size), buf: make([]byte, piece), report: report}
}

func (s *stream) Read(p []byte) (int, error) {
	if len(s.left) == 0 {
		if err := s.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := io.ReadFull(s.r, s.buf)
		if n == 0 {
			return 0, err
		}
		s.left = s.buf[:n]
		if s.at += int64(n); s.report != nil {
			s.report(s.at)
		}
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

// Root copies the root and its hash tree. The medium is checked against the root hash while it is read, so a damaged one is told from a
// disk that does not keep what it is given: Verify finds that.
func Root(ctx context.Context, root, tree Source, hash bundle.Digest, toRoot, toTree Part, report Report) error {
	first := make([]byte, verity.BlockSize)
	if _, err := tree.ReadAt(first, 0); err != nil {
		return fmt.Errorf("the medium's hash tree: %w", err)
	}
	sb, err := verity.ParseSuperblock(first)
	if err != nil {
		return fmt.Errorf("the medium's hash tree: %w", err)
	}
	size := int64(sb.Blocks) * verity.BlockSize
	if size > root.Size() || size > toRoot.Size() {
		return fmt.Errorf("the root has %d bytes, its partition on the medium %d, on the disk %d", size, root.Size(), toRoot.Size())
	}
	w := &writer{ctx: ctx, to: toRoot, report: func(done int64) { report(done, size) }}
	// What is written is what was read, in the same pieces.
	t, err := verity.Build(&teeReader{newStream(ctx, root, size, nil), w}, sb.Salt, sb.UUID)
	if err != nil {
		return fmt.Errorf("copy the root: %w", err)
	}
	if t.Root != hash {
		return fmt.Errorf("the medium is damaged: its root has the hash %x, the running kernel wants %s", t.Root, hash)
	}
	if t.Size() > toTree.Size() {
		return fmt.Errorf("the hash tree has %d bytes, its partition on the disk %d", t.Size(), toTree.Size())
	}
	if _, err := t.WriteTo(&writer{ctx: ctx, to: toTree}); err != nil {
		return fmt.Errorf("write the hash tree: %w", err)
	}
	return errors.Join(toRoot.Sync(), toTree.Sync())
}

// A teeReader writes what is read, in the pieces in which its stream reads: io.TeeReader would write block by block.
type teeReader struct {
	s *stream
	w *writer
}

func (t *teeReader) Read(p []byte) (int, error) {
	fresh := len(t.s.left) == 0
	n, err := t.s.Read(p)
	if fresh && n > 0 {
		whole := t.s.buf[:n+len(t.s.left)]
		if _, err := t.w.Write(whole); err != nil {
			return 0, err
		}
	}
	return n, err
}

// Verify reads a root and its tree back, whole. The parts must be read from the disk, not from memory.
func Verify(ctx context.Context, root, tree Source, hash bundle.Digest, report Report) error {
	first := make([]byte, verity.BlockSize)
	if _, err := tree.ReadAt(first, 0); err != nil {
		return fmt.Errorf("read the hash tree: %w", err)
	}
	total := root.Size()
	if sb, err := verity.ParseSuperblock(first); err == nil {
		total = int64(sb.Blocks) * verity.BlockSize
	}
	return verity.Verify(newStream(ctx, root, root.Size(), func(done int64) { report(min(done, total), total) }), root.Size(), newStream(ctx, tree, tree.Size(), nil), hash)
}

// sum is the digest of a file.
func sum(ctx context.Context, f *fat.File) (out bundle.Digest, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, newStream(ctx, f, f.Size, nil)); err != nil {
		return out, fmt.Errorf("read %s: %w", f.Name, err)
	}
	return bundle.Digest(h.Sum(nil)), nil
}
