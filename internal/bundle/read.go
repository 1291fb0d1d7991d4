package bundle

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
)

// A Reader reads a bundle from its start to its end, once. It trusts nothing: the manifest is verified before anything else is looked at,
// and no chunk is handed out that is not the one that the manifest names.
type Reader struct {
	Head
	tar *tar.Reader
}

// ErrNotBundle says that what was read does not start as a bundle does.
var ErrNotBundle = errors.New("not an update bundle: it does not start with " + ManifestName)

// NewReader reads and verifies the head of a bundle. Further chunks are read by Each.
func NewReader(r io.Reader, keys Keys) (*Reader, error) {
	raw, sig, tr, err := readHead(r)
	if err != nil {
		return nil, err
	}
	m, err := keys.Verify(raw, sig)
	if err != nil {
		return nil, err
	}
	return &Reader{Head{m, raw, sig}, tr}, nil
}

// ReadHead returns the manifest's bytes and the signature at the start of a bundle, without judging them: Keys.Verify does. It may read
// up to a tar's block further. The signature is empty if the bundle has none.
func ReadHead(r io.Reader) (manifest, signature []byte, err error) {
	manifest, signature, _, err = readHead(r)
	return manifest, signature, err
}

func readHead(r io.Reader) (manifest, signature []byte, tr *tar.Reader, err error) {
	tr = tar.NewReader(r)
	h, err := tr.Next()
	if err != nil || h.Name != ManifestName {
		if err != nil && !errors.Is(err, tar.ErrHeader) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, nil, nil, fmt.Errorf("read the bundle: %w", err)
		}
		return nil, nil, nil, ErrNotBundle
	}
	if manifest, err = readSmall(tr, h, MaxManifest); err != nil {
		return nil, nil, nil, err
	}
	h, err = next(tr, "")
	if err != nil {
		return nil, nil, nil, err
	}
	if h.Name == KernelName {
		return manifest, nil, tr, nil // nobody signed it; Verify says so
	}
	if h.Name != SignatureName {
		return nil, nil, nil, fmt.Errorf("bundle: found %.40q where %s must be", h.Name, SignatureName)
	}
	signature, err = readSmall(tr, h, SignatureSize)
	return manifest, signature, tr, err
}

// next moves to the next file, which must be of that name unless name is "".
func next(tr *tar.Reader, name string) (*tar.Header, error) {
	h, err := tr.Next()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fmt.Errorf("%w: %s is missing", ErrTruncated, or(name, "what comes behind "+ManifestName))
	case err != nil:
		return nil, fmt.Errorf("read the bundle: %w", err)
	case h.Typeflag != tar.TypeReg || len(h.PAXRecords) > 0:
		return nil, fmt.Errorf("bundle: %.40q is no plain file", h.Name)
	case name != "" && h.Name != name:
		return nil, fmt.Errorf("bundle: found %.40q where %s must be", h.Name, name)
	}
	return h, nil
}

func or(s, standard string) string {
	if s == "" {
		return standard
	}
	return s
}

func readSmall(tr *tar.Reader, h *tar.Header, limit int64) ([]byte, error) {
	if h.Size > limit || h.Size < 0 {
		return nil, fmt.Errorf("bundle: %s has %d bytes; at most %d are allowed", h.Name, h.Size, limit)
	}
	b := make([]byte, h.Size)
	if _, err := io.ReadFull(tr, b); err != nil {
		return nil, cutOff(err, h.Name, 0, h.Size)
	}
	return b, nil
}

// cutOff gives the end of the data its own reason.
func cutOff(err error, name string, at, size int64) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends in %s, at byte %d of %d", ErrTruncated, name, at, size)
	}
	return fmt.Errorf("read %s: %w", name, err)
}

// Each calls f with every chunk of every file, in order, after its digest was checked. The bytes are valid until f returns. It ends with
// f's error, with one that says what is wrong, or with nil when the bundle is whole. It may be called once.
func (r *Reader) Each(f func(file, chunk int, data []byte) error) error {
	buf := make([]byte, MaxChunk)
	for i, file := range r.Manifest.Files {
		h, err := next(r.tar, file.Name)
		if err != nil {
			return err
		}
		if h.Size != file.Size {
			return fmt.Errorf("%w: %s has %d bytes, the manifest says %d", ErrTampered, file.Name, h.Size, file.Size)
		}
		at := int64(0)
		for j, c := range file.Chunks {
			data := buf[:c.Size]
			if _, err := io.ReadFull(r.tar, data); err != nil {
				return cutOff(err, file.Name, at, file.Size)
			}
			if err := file.Check(j, data); err != nil {
				return err
			}
			if err := f(i, j, data); err != nil {
				return err
			}
			at += int64(c.Size)
		}
	}
	if h, err := r.tar.Next(); err == nil {
		return fmt.Errorf("bundle: found %.40q behind its last file", h.Name)
	} else if !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the bundle's end: %w", err)
	}
	return nil
}

// Check reports whether data is the file's chunk of that number. The error wraps ErrTampered.
func (f File) Check(chunk int, data []byte) error {
	if chunk < 0 || chunk >= len(f.Chunks) {
		return fmt.Errorf("%s has no chunk %d", f.Name, chunk)
	}
	if c := f.Chunks[chunk]; len(data) != c.Size || Sum(data) != c.SHA256 {
		return fmt.Errorf("%w: chunk %d of %s is not the one that the manifest names", ErrTampered, chunk, f.Name)
	}
	return nil
}

// Start returns where a chunk starts in its file, in bytes; for the number of chunks, the file's size.
func (f File) Start(chunk int) (at int64) {
	for _, c := range f.Chunks[:chunk] {
		at += int64(c.Size)
	}
	return at
}
