package updated

import (
	"context"
	"fmt"
	"io"

	slotv1 "github.com/bulkhead-os/bulkhead/api/slot/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

const (
	maxWrite = 1 << 20   // bytes handed to storaged at once
	maxGap   = 128 << 10 // bytes that are rather fetched in vain than asked around
)

// A run is chunks of one file that are fetched by one request: from inclusive, to exclusive.
type run struct{ file, from, to int }

// runs plans the requests. With pieces, what lies between two parts that are wanted is left out unless it is small; without, each file is read
// in one go, from the first chunk that is wanted to the last.
func runs(m bundle.Manifest, missing []*slotv1.Range, pieces bool) (out []run) {
	for _, r := range missing {
		next := run{int(r.GetFile()), int(r.GetFirst()), int(r.GetFirst() + r.GetCount())}
		if l := len(out) - 1; l >= 0 && out[l].file == next.file {
			f := m.Files[next.file]
			if !pieces || f.Start(next.from)-f.Start(out[l].to) <= maxGap {
				out[l].to = next.to
				continue
			}
		}
		out = append(out, next)
	}
	return out
}

// checkMissing refuses what storaged cannot mean.
func checkMissing(m bundle.Manifest, missing []*slotv1.Range) error {
	for _, r := range missing {
		if int(r.GetFile()) >= len(m.Files) || uint64(r.GetFirst())+uint64(r.GetCount()) > uint64(len(m.Files[r.GetFile()].Chunks)) || r.GetCount() == 0 {
			return fmt.Errorf("storaged wants chunks %d to %d of file %d, which there are not", r.GetFirst(), r.GetFirst()+r.GetCount(), r.GetFile())
		}
	}
	return nil
}

// bytesOf returns how many bytes the ranges have together.
func bytesOf(m bundle.Manifest, missing []*slotv1.Range) (n int64) {
	for _, r := range missing {
		f := m.Files[r.GetFile()]
		n += f.Start(int(r.GetFirst()+r.GetCount())) - f.Start(int(r.GetFirst()))
	}
	return n
}

// A fetcher brings storaged what it misses.
type fetcher struct {
	src     source
	head    bundle.Head
	slots   slotv1.SlotsClient
	session uint64
	limits  limits
	note    func(string)
	done    func(int64) // told how many bytes more are with storaged

	credit int
	earned int64
	batch  slotv1.WriteChunksRequest // chunks that follow one another
}

// fetch fetches all that is missing. It holds about 2 MiB.
func (f *fetcher) fetch(ctx context.Context, missing []*slotv1.Range) error {
	f.credit = f.limits.credit
	f.batch.Data = make([]byte, 0, maxWrite)
	wanted := map[[2]int]bool{}
	for _, r := range missing {
		for c := r.GetFirst(); c < r.GetFirst()+r.GetCount(); c++ {
			wanted[[2]int{int(r.GetFile()), int(c)}] = true
		}
	}
	for _, r := range runs(f.head.Manifest, missing, f.src.pieces(ctx)) {
		if err := f.run(ctx, r, wanted); err != nil {
			return err
		}
	}
	return f.flush(ctx)
}

func (f *fetcher) run(ctx context.Context, r run, wanted map[[2]int]bool) error {
	file := f.head.Manifest.Files[r.file]
	in := &resumer{ctx: ctx, src: f.src, limits: f.limits, head: f.head, file: r.file, at: file.Start(r.from), end: file.Start(r.to), note: f.note, credit: &f.credit, earned: &f.earned}
	defer in.close()
	buf := make([]byte, bundle.MaxChunk)
	for c := r.from; c < r.to; c++ {
		data := buf[:file.Chunks[c].Size]
		if _, err := io.ReadFull(in, data); err != nil {
			return sourceError{err}
		}
		if !wanted[[2]int{r.file, c}] {
			continue
		}
		if err := file.Check(c, data); err != nil {
			return errs.New(errs.Invalid, "%s: %w", f.src, err)
		}
		if err := f.add(ctx, r.file, c, data); err != nil {
			return err
		}
	}
	return nil
}

// add puts a chunk into the batch, which is sent when another one would not fit or would not follow.
func (f *fetcher) add(ctx context.Context, file, chunk int, data []byte) error {
	b := &f.batch
	next := int(b.First)
	for n := 0; n < len(b.Data); next++ {
		n += f.head.Manifest.Files[b.File].Chunks[next].Size
	}
	if len(b.Data) > 0 && (int(b.File) != file || next != chunk || len(b.Data)+len(data) > maxWrite) {
		if err := f.flush(ctx); err != nil {
			return err
		}
	}
	if len(b.Data) == 0 {
		b.File, b.First = uint32(file), uint32(chunk)
	}
	b.Data = append(b.Data, data...)
	return nil
}

func (f *fetcher) flush(ctx context.Context) error {
	if len(f.batch.Data) == 0 {
		return nil
	}
	f.batch.Session = f.session
	if _, err := f.slots.WriteChunks(ctx, &f.batch); err != nil {
		return err
	}
	f.done(int64(len(f.batch.Data)))
	f.batch.Data = f.batch.Data[:0]
	return nil
}
