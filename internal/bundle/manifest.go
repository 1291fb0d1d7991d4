package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Format is the only version of manifests that this package reads.
const Format = 1

// MaxEpoch is the highest epoch: the TPM's index has that many bits to set, and one that is never set.
const MaxEpoch = 63

// A Manifest says what an image is. Parse and Encode are inverse to each other, byte for byte.
type Manifest struct {
	Format  int    `json:"format"`
	Version string `json:"version"` // see ValidVersion
	// Epoch, 1 to MaxEpoch, rises when older images must not start any more because of a hole in them.
	Epoch int `json:"epoch"`
	// Minimum is the oldest version that this one may be installed from, "" for any.
	Minimum      string `json:"minimum"`
	Architecture string `json:"architecture"` // as Go writes it: "amd64"
	RootHash     Digest `json:"root_hash"`    // of dm-verity
	// Key tells by which key the manifest claims to be signed (KeyID). It is a help for messages and proves nothing.
	Key   string `json:"key"`
	Files []File `json:"files"` // Kernel, Root, Tree
}

// A File is one of the image's files. Its chunks follow each other without gaps.
type File struct {
	Name   string  `json:"name"`
	Size   int64   `json:"size"` // bytes, at least 1
	SHA256 Digest  `json:"sha256"`
	Chunks []Chunk `json:"chunks"`
}

// A Chunk is a piece of a file.
type Chunk struct {
	Size   int    `json:"size"` // bytes, 1 to MaxChunk
	SHA256 Digest `json:"sha256"`
}

// Encode returns the manifest as it is signed: JSON without blanks, and a newline.
func (m Manifest) Encode() ([]byte, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(b) >= MaxManifest {
		return nil, fmt.Errorf("manifest of %d bytes: at most %d are allowed", len(b)+1, MaxManifest)
	}
	return append(b, '\n'), nil
}

// Parse reads a manifest. It takes nothing but what Encode writes: no unknown, missing or repeated field, no other order, no blanks.
// So equal manifests have equal bytes, and nobody can read into one what another reader does not see.
func Parse(b []byte) (Manifest, error) {
	if len(b) > MaxManifest {
		return Manifest{}, fmt.Errorf("manifest of %d bytes: at most %d are allowed", len(b), MaxManifest)
	}
	var m Manifest
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&m); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends too early")
		}
		return Manifest{}, fmt.Errorf("manifest: %w", err)
	}
	again, err := m.Encode()
	if err != nil {
		return Manifest{}, err
	}
	if !bytes.Equal(b, again) {
		return Manifest{}, errors.New("manifest: not written in its canonical form")
	}
	return m, nil
}

func (m Manifest) validate() error {
	switch {
	case m.Format != Format:
		return fmt.Errorf("manifest.format: %d is not known, only %d is; a newer image may need a version in between", m.Format, Format)
	case !ValidVersion(m.Version):
		return fmt.Errorf("manifest.version: %.80q is not a version like 1.2.3 or 1.2.3-rc.1", m.Version)
	case m.Minimum != "" && !ValidVersion(m.Minimum):
		return fmt.Errorf("manifest.minimum: %.80q is not a version like 1.2.3 or 1.2.3-rc.1", m.Minimum)
	case m.Epoch < 1 || m.Epoch > MaxEpoch:
		return fmt.Errorf("manifest.epoch: %d is not within 1 and %d", m.Epoch, MaxEpoch)
	case !isWord(m.Architecture):
		return fmt.Errorf("manifest.architecture: %.80q is no name of an architecture", m.Architecture)
	case m.RootHash == Digest{}:
		return errors.New("manifest.root_hash: missing")
	case len(m.Key) > maxName:
		return fmt.Errorf("manifest.key: longer than %d", maxName)
	case len(m.Files) != fileCount:
		return fmt.Errorf("manifest.files: %d entries, want %d", len(m.Files), fileCount)
	}
	for i, f := range m.Files {
		if f.Name != fileNames[i] {
			return fmt.Errorf("manifest.files[%d].name: %.80q, want %q", i, f.Name, fileNames[i])
		}
		if err := f.validate(); err != nil {
			return fmt.Errorf("manifest.files: %s: %w", f.Name, err)
		}
	}
	return nil
}

func (f File) validate() error {
	if f.Size < 1 || f.Size > MaxFile {
		return fmt.Errorf("size: %d is not within 1 and %d", f.Size, int64(MaxFile))
	}
	if f.SHA256 == (Digest{}) {
		return errors.New("sha256: missing")
	}
	total := int64(0)
	for i, c := range f.Chunks {
		if c.Size < 1 || c.Size > MaxChunk {
			return fmt.Errorf("chunks[%d].size: %d is not within 1 and %d", i, c.Size, MaxChunk)
		}
		if c.SHA256 == (Digest{}) {
			return fmt.Errorf("chunks[%d].sha256: missing", i)
		}
		total += int64(c.Size)
	}
	if total != f.Size {
		return fmt.Errorf("chunks: %d bytes together, the file has %d", total, f.Size)
	}
	return nil
}

// Size returns how many bytes the three files have together.
func (m Manifest) Size() (n int64) {
	for _, f := range m.Files {
		n += f.Size
	}
	return n
}

func isWord(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return len(s) > 0 && len(s) <= 16
}
