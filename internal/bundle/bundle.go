// Package bundle is the format of updates: a signed manifest and the three files of an image, cut into chunks that a node can
// fetch one by one. It is pure: it reads and writes what it is given, and knows neither networks nor disks nor clocks.
//
// A bundle is one tar (ustar, no compression, no extensions) with these files in this order:
//
//	manifest.json   what the image is, and the SHA-256 of every chunk of the files behind it
//	manifest.sig    64 bytes: Ed25519 over Context and the exact bytes of manifest.json
//	bulkhead.efi    the signed unified kernel image
//	root.squashfs   the root's file system
//	root.verity     its dm-verity superblock and hash tree
//
// Where a file starts follows from the sizes in the manifest (Offsets), so that any part of a bundle can be fetched by itself. The
// same five files are the layers of an OCI artifact (WriteLayout). Nothing but the manifest is signed, and nothing else needs to be:
// whoever has verified it can tell for each chunk whether it is the right one, wherever it comes from.
package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
)

// Names of a bundle's files.
const (
	ManifestName  = "manifest.json"
	SignatureName = "manifest.sig"
	KernelName    = "bulkhead.efi"
	RootName      = "root.squashfs"
	TreeName      = "root.verity"
)

// The files that a manifest describes, by their place in Manifest.Files.
const (
	Kernel = iota
	Root
	Tree
	fileCount
)

var fileNames = [fileCount]string{KernelName, RootName, TreeName}

// Limits, in bytes. They bound the memory of whoever reads what a stranger wrote.
const (
	MaxManifest   = 2 << 20
	MaxFile       = 4 << 30
	SignatureSize = 64
	maxName       = 64
)

// A Digest is a SHA-256. Its text form is 64 hexadecimal digits in small letters. The zero value means "none".
type Digest [sha256.Size]byte

// Sum returns the digest of b.
func Sum(b []byte) Digest { return sha256.Sum256(b) }

// ParseDigest reads the text form; capitals are refused, so that a digest has one form only.
func ParseDigest(s string) (d Digest, err error) {
	if len(s) != 2*len(d) {
		return Digest{}, fmt.Errorf("%.80q is not a digest: want 64 hexadecimal digits", s)
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Digest{}, fmt.Errorf("%q is not a digest: want 64 hexadecimal digits in small letters", s)
		}
	}
	_, err = hex.Decode(d[:], []byte(s))
	return d, err
}

// String returns the text form.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText makes a digest a string in JSON.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (d *Digest) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDigest(string(b))
	return err
}

// Why a bundle is not to be trusted, for errors.Is. The texts around them say more.
var (
	ErrUnsigned  = errors.New("the bundle is not signed")
	ErrForeign   = errors.New("the bundle is signed by somebody else")
	ErrTampered  = errors.New("the bundle was changed after it was signed")
	ErrTruncated = errors.New("the bundle is cut off")
)
