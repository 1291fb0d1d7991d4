package slots

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/fat"
)

// syncEvery is how much may be written and not yet be on the disk, in bytes: with it, an upgrade takes little memory, and a slow disk is
// seen early.
const syncEvery = 4 << 20

// A session is an upgrade that is being written. It holds nothing that could not be found out again by another Begin.
type session struct {
	number   uint64
	manifest bundle.Manifest
	slot     int // the idle one
	esp      Part
	volume   *fat.Volume
	targets  [3]target
	have     [3][]bool // by file and chunk
	dirty    int64     // bytes written since the last flush
}

// A target is where a file of the image is written.
type target interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Progress is how far a part of an upgrade has come.
type Progress struct {
	Step        string // "compare", "verify"
	Done, Total int64  // bytes
}

// A Range is chunks that are wanted: First, First+1, …, First+Count-1 of a file of the bundle.
type Range struct{ File, First, Count int }

// end closes the session. mu is held.
func (s *Store) end() {
	if s.session == nil {
		return
	}
	for _, t := range s.session.targets {
		if p, ok := t.(Part); ok {
			_ = p.Close() // what must be on the disk was flushed
		}
	}
	_ = s.session.esp.Close()
	s.session = nil
}

// Begin starts to write an image, or goes on with it: it verifies the manifest's signature, refuses what does not fit, makes the idle slot
// free, takes from the disk what is there already, and returns what is missing. A session that is open ends. report, which must not block,
// is told how far it is.
func (s *Store) Begin(ctx context.Context, raw, signature []byte, report func(Progress)) (number uint64, missing []Range, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
	keys, err := s.cfg.Keys()
	if err != nil {
		return 0, nil, err
	}
	m, err := keys.Verify(raw, signature)
	if err != nil {
		return 0, nil, errs.New(errs.Invalid, "%w", err)
	}
	state, layout, err := s.look(ctx)
	if err != nil {
		return 0, nil, err
	}
	floor, _, err := s.cfg.Epochs.Floor(ctx)
	if err != nil {
		return 0, nil, err
	}
	steps, slot, err := planBegin(state)
	if err != nil {
		return 0, nil, err
	}
	n := &session{manifest: m, slot: slot}
	if n.esp, n.volume, err = s.openESP(Write); err != nil {
		return 0, nil, err
	}
	s.session = n
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	node := bundle.Node{Architecture: s.cfg.Architecture, Version: s.cfg.Version, RootHash: layout.Running, Epoch: max(floor, layout.Epoch),
		Room: [3]int64{n.room(steps), layout.Root[slot], layout.Tree[slot]}}
	if err := bundle.CheckUpgrade(node, m); err != nil {
		return 0, nil, errs.New(errs.Precondition, "%w", err)
	}
	// Nothing was written so far.
	if err := s.clear(n, steps); err != nil {
		return 0, nil, err
	}
	if err := s.compare(ctx, n, state, layout, report); err != nil {
		return 0, nil, err
	}
	s.last++
	n.number = s.last
	return n.number, n.missing(), nil
}

// room is how large a kernel may be once these steps are done.
func (n *session) room(steps []Step) int64 {
	room := n.volume.Free()
	names := []string{tempName}
	for _, st := range steps {
		names = append(names, st.File)
	}
	for _, name := range names {
		if f, err := n.volume.Open(kernelDir, name); err == nil {
			room += f.Size
		}
	}
	return room
}

// clear takes the idle slot's kernel away and opens all that is written to.
func (s *Store) clear(n *session, steps []Step) error {
	if err := n.volume.Reclaim(preferred); err != nil {
		return fmt.Errorf("EFI partition: %w", err)
	}
	for _, step := range steps {
		if err := n.volume.Remove(kernelDir, step.File); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
		s.cfg.Log.Info("step done", "step", step.String())
	}
	file, err := n.volume.Open(kernelDir, tempName)
	if size := n.manifest.Files[bundle.Kernel].Size; err == nil && file.Size == size {
		// What an interrupted upgrade left: compare finds out what of it is good.
	} else if err == nil || errors.Is(err, fs.ErrNotExist) {
		if err := n.volume.Remove(kernelDir, tempName); err != nil {
			return fmt.Errorf("EFI partition: %w", err)
		}
		if file, err = n.volume.Create(kernelDir, tempName, size); err != nil {
			if errors.Is(err, fat.ErrFull) {
				return errs.New(errs.Precondition, "EFI partition: %w", err)
			}
			return fmt.Errorf("EFI partition: %w", err)
		}
	} else {
		return fmt.Errorf("EFI partition: %w", err)
	}
	n.targets[bundle.Kernel] = file
	for i, name := range []PartName{bundle.Root: rootName(n.slot), bundle.Tree: treeName(n.slot)} {
		if i == bundle.Kernel {
			continue
		}
		part, err := s.cfg.Disk.Open(name, Write)
		if err != nil {
			return err
		}
		n.targets[i] = part
	}
	return nil
}

// compare finds every chunk that is in its place, or that the running version has too, and copies the latter.
func (s *Store) compare(ctx context.Context, n *session, state State, layout Layout, report func(Progress)) error {
	total := 2 * n.manifest.Size()
	done := int64(0)
	tell := func(step int64) {
		done += step
		report(Progress{"compare", min(done, total), total})
	}
	for i, f := range n.manifest.Files {
		n.have[i] = make([]bool, len(f.Chunks))
		donor, err := s.donor(ctx, n, i, state, layout, tell)
		if err != nil {
			return err
		}
		err = n.compareFile(ctx, i, donor, tell)
		donor.close()
		if err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	return n.flush()
}

// A donor is a file of the running version: where its chunks are.
type donor struct {
	io.ReaderAt
	at     map[bundle.Digest]int64
	closer io.Closer
}

func (d donor) close() {
	if d.closer != nil {
		_ = d.closer.Close() // only read
	}
}

// donor cuts a file of the running version and notes where the chunks are that are wanted. A donor that cannot be read gives none: then
// more is fetched.
func (s *Store) donor(ctx context.Context, n *session, file int, state State, layout Layout, tell func(int64)) (donor, error) {
	d, size := donor{}, int64(0)
	switch running, slot, err := state.running(); {
	case err != nil || file == bundle.Tree: // nothing of a tree is the same in another version
		return donor{}, nil
	case file == bundle.Kernel:
		f, err := n.volume.Open(kernelDir, running.File)
		if err != nil {
			return donor{}, nil
		}
		d.ReaderAt, size = f, f.Size
	default:
		tree, err := s.cfg.Disk.Open(treeName(slot), Read)
		if err != nil {
			return donor{}, err
		}
		size, err = slotSize(tree)
		if err := errors.Join(err, tree.Close()); err != nil || size > layout.Root[slot] {
			return donor{}, nil
		}
		part, err := s.cfg.Disk.Open(rootName(slot), Read)
		if err != nil {
			return donor{}, err
		}
		d.ReaderAt, d.closer = part, part
	}
	wanted := map[bundle.Digest]bool{}
	for _, c := range n.manifest.Files[file].Chunks {
		wanted[c.SHA256] = true
	}
	d.at = map[bundle.Digest]int64{}
	err := bundle.Split(newReader(ctx, d.ReaderAt, size, nil), func(at int64, b []byte) error {
		if sum := bundle.Sum(b); wanted[sum] {
			d.at[sum] = at
		}
		tell(int64(len(b)))
		return nil
	})
	if ctx.Err() != nil {
		d.close()
		return donor{}, ctx.Err()
	}
	if err != nil {
		s.cfg.Log.Warn("running version not readable", "err", err.Error())
	}
	return d, nil
}

// compareFile does compare's work for one file.
func (n *session) compareFile(ctx context.Context, i int, d donor, tell func(int64)) error {
	buf, at := make([]byte, bundle.MaxChunk), int64(0)
	for j, c := range n.manifest.Files[i].Chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:c.Size]
		if _, err := n.targets[i].ReadAt(b, at); err == nil || errors.Is(err, io.EOF) {
			n.have[i][j] = bundle.Sum(b) == c.SHA256
		} // else the disk cannot be read there: perhaps it can be written
		if from, ok := d.at[c.SHA256]; ok && !n.have[i][j] {
			if _, err := d.ReadAt(b, from); err == nil && bundle.Sum(b) == c.SHA256 {
				if err := n.write(i, b, at); err != nil {
					return err
				}
				n.have[i][j] = true
			}
		}
		at += int64(c.Size)
		tell(int64(c.Size))
	}
	return nil
}

// write writes to a target, and flushes once in a while.
func (n *session) write(file int, b []byte, at int64) error {
	if _, err := n.targets[file].WriteAt(b, at); err != nil {
		return fmt.Errorf("write %s: %w", n.manifest.Files[file].Name, err)
	}
	if n.dirty += int64(len(b)); n.dirty < syncEvery {
		return nil
	}
	return n.flush()
}

func (n *session) flush() error {
	n.dirty = 0
	for i, t := range n.targets {
		if err := t.Sync(); err != nil {
			return fmt.Errorf("flush %s: %w", n.manifest.Files[i].Name, err)
		}
	}
	return nil
}

// missing returns what is still wanted, in the order of the bundle.
func (n *session) missing() (out []Range) {
	for i, chunks := range n.have {
		for j, have := range chunks {
			if have {
				continue
			}
			if l := len(out) - 1; l >= 0 && out[l].File == i && out[l].First+out[l].Count == j {
				out[l].Count++
				continue
			}
			out = append(out, Range{i, j, 1})
		}
	}
	return out
}

// current returns the session of a number. mu is held.
func (s *Store) current(number uint64) (*session, error) {
	if s.session == nil || s.session.number != number || number == 0 {
		return nil, errs.New(errs.Conflict, "no upgrade %d is being written; begin again", number)
	}
	return s.session, nil
}

// WriteChunks writes chunks that follow one another, joined in data. Each is checked before any is written.
func (s *Store) WriteChunks(number uint64, file, first int, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.current(number)
	if err != nil {
		return err
	}
	if file < 0 || file >= len(n.manifest.Files) || first < 0 || first >= len(n.have[file]) || len(data) == 0 {
		return errs.New(errs.Invalid, "file %d has no chunk %d", file, first)
	}
	f := n.manifest.Files[file]
	last := first
	for rest := data; len(rest) > 0; last++ {
		if last == len(f.Chunks) || len(rest) < f.Chunks[last].Size {
			return errs.New(errs.Invalid, "%s: %d bytes are not whole chunks from %d on", f.Name, len(data), first)
		}
		if err := f.Check(last, rest[:f.Chunks[last].Size]); err != nil {
			return errs.New(errs.Invalid, "%w", err)
		}
		rest = rest[f.Chunks[last].Size:]
	}
	if err := n.write(file, data, f.Start(first)); err != nil {
		return err
	}
	for j := first; j < last; j++ {
		n.have[file][j] = true
	}
	return nil
}

// Commit reads back what was written, and then, and only if all of it is right, lets the next boot try it. It returns the version that
// will be tried. The session ends.
func (s *Store) Commit(ctx context.Context, number uint64, report func(Progress)) (version string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.current(number)
	if err != nil {
		return "", err
	}
	defer s.end()
	if miss := n.missing(); len(miss) > 0 {
		return "", errs.New(errs.Precondition, "%d ranges of chunks are missing, the first in %s", len(miss), n.manifest.Files[miss[0].File].Name)
	}
	if err := n.flush(); err != nil {
		return "", err
	}
	if err := s.check(ctx, n, report); err != nil {
		return "", fmt.Errorf("what was written is not what was sent, and nothing starts it: %w", err)
	}
	state, _, err := s.look(ctx)
	if err != nil {
		return "", err
	}
	steps, name := planCommit(state, n.slot, n.manifest)
	for _, step := range steps {
		if step.Op == opLabel {
			err = s.cfg.Disk.Label(step.Slot, step.Root)
		} else {
			err = n.volume.Rename(kernelDir, step.File, step.To)
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", step, err)
		}
		s.cfg.Log.Info("step done", "step", step.String())
	}
	return name.Version, nil
}

// check reads slot and kernel back from the disk.
func (s *Store) check(ctx context.Context, n *session, report func(Progress)) error {
	layout, err := s.cfg.Disk.Look(ctx)
	if err != nil {
		return err
	}
	total := n.manifest.Files[bundle.Root].Size
	if err := s.verify(ctx, n.slot, layout, n.manifest.RootHash, func(done int64) { report(Progress{"verify", min(done, total), total}) }); err != nil {
		return fmt.Errorf("slot %s: %w", Label(n.slot), err)
	}
	part, volume, err := s.openESP(Direct)
	if err != nil {
		return err
	}
	defer part.Close()
	file, err := volume.Open(kernelDir, tempName)
	if err != nil {
		return err
	}
	want, h := n.manifest.Files[bundle.Kernel], sha256.New()
	if _, err := io.Copy(h, newReader(ctx, file, file.Size, nil)); err != nil {
		return fmt.Errorf("read the kernel: %w", err)
	}
	if file.Size != want.Size || bundle.Digest(h.Sum(nil)) != want.SHA256 {
		return errors.New("the kernel is another one")
	}
	k, err := readKernel(file, file.Size)
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	if k.root != n.manifest.RootHash || k.epoch != 0 && k.epoch != n.manifest.Epoch {
		return fmt.Errorf("the kernel starts root %s of epoch %d, the manifest says %s and %d", k.root, k.epoch, n.manifest.RootHash, n.manifest.Epoch)
	}
	return nil
}

// Abort ends the session of that number, if it is open. What was written stays, for a later Begin.
func (s *Store) Abort(number uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.session != nil && s.session.number == number {
		s.end()
	}
}
