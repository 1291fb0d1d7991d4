package bundle

import (
	"archive/tar"
	"crypto"
	"crypto/ed25519"
	"fmt"
	"io"
	"os"
)

// An Image is what a bundle is made of.
type Image struct {
	Version, Minimum, Architecture string // as in Manifest
	Epoch                          int
	RootHash                       Digest
	// Files are the paths of bulkhead.efi, root.squashfs and root.verity. They are read twice and must not change meanwhile.
	Files [fileCount]string
}

// Head is the signed part of a bundle.
type Head struct {
	Manifest  Manifest
	Raw       []byte // the manifest's exact bytes
	Signature []byte
}

// Seal describes an image and signs the description.
func Seal(img Image, signer crypto.Signer) (Head, error) {
	m := Manifest{Format: Format, Version: img.Version, Epoch: img.Epoch, Minimum: img.Minimum, Architecture: img.Architecture, RootHash: img.RootHash}
	public, ok := signer.Public().(ed25519.PublicKey)
	if !ok {
		return Head{}, fmt.Errorf("sign the manifest: the key is %T, want Ed25519", signer.Public())
	}
	m.Key = KeyID(public)
	for i, path := range img.Files {
		f, err := describe(fileNames[i], path)
		if err != nil {
			return Head{}, err
		}
		m.Files = append(m.Files, f)
	}
	raw, err := m.Encode()
	if err != nil {
		return Head{}, err
	}
	sig, err := Sign(signer, raw)
	return Head{m, raw, sig}, err
}

func describe(name, path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	return Describe(name, f)
}

// Write seals an image and writes its bundle. Equal input gives equal bytes.
func Write(w io.Writer, img Image, signer crypto.Signer) (Head, error) {
	head, err := Seal(img, signer)
	if err != nil {
		return Head{}, err
	}
	tw := tar.NewWriter(w)
	for _, part := range []struct {
		name string
		data []byte
	}{{ManifestName, head.Raw}, {SignatureName, head.Signature}} {
		if err := tw.WriteHeader(header(part.name, int64(len(part.data)))); err != nil {
			return Head{}, err
		}
		if _, err := tw.Write(part.data); err != nil {
			return Head{}, err
		}
	}
	for i, path := range img.Files {
		if err := copyFile(tw, head.Manifest.Files[i], path); err != nil {
			return Head{}, fmt.Errorf("%s: %w", path, err)
		}
	}
	return head, tw.Close()
}

// header is plain on purpose: nothing of the machine that wrote it.
func header(name string, size int64) *tar.Header {
	return &tar.Header{Name: name, Size: size, Mode: 0o644, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
}

func copyFile(tw *tar.Writer, f File, path string) error {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	if err := tw.WriteHeader(header(f.Name, f.Size)); err != nil {
		return err
	}
	n, err := io.Copy(tw, in)
	if err == nil && n != f.Size {
		err = fmt.Errorf("%d bytes, it had %d a moment ago", n, f.Size)
	}
	return err
}

// tarBlock is the unit of a tar, in bytes: headers have one, contents are padded to it.
const tarBlock = 512

func padded(n int64) int64 { return (n + tarBlock - 1) / tarBlock * tarBlock }

// HeadSize returns how many bytes at a bundle's start hold the manifest of that size and its signature, with their headers.
func HeadSize(manifest int) int64 {
	return tarBlock + padded(int64(manifest)) + tarBlock + tarBlock
}

// Offsets returns where the content of each of the three files starts in the bundle, in bytes.
func (h Head) Offsets() (at [fileCount]int64) {
	next := HeadSize(len(h.Raw))
	for i, f := range h.Manifest.Files {
		at[i] = next + tarBlock
		next = at[i] + padded(f.Size)
	}
	return at
}
