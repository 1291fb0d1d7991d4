// Package pcrpolicy computes what a TPM will think of an image before the image was ever started, and puts a signature under it: who
// holds the key says which images may open a node's disk.
//
// A disk's key is sealed with the policy of Seal: a policy signed by the image's maker, then PCR 7 as it is. What is signed
// (Policy) is PCR 11, into which systemd's stub measures the parts of the image, that nothing was added to its command line from
// outside (PCR 12: by SMBIOS, for one, Secure Boot or not), and that the TPM has not seen a newer epoch of images (Index). So a new image opens the disk without anything being sealed again, an old one with a known hole does not.
//
// The package is pure and touches no TPM: the image's builder and storaged both use it. All hashes are SHA-256.
package pcrpolicy

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
)

// Digest is a SHA-256 digest: of a PCR's bank or of a policy. A PCR is all zeros when the machine starts; so is a policy session.
type Digest [sha256.Size]byte

// String is hex.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText writes a digest as String does, for JSON.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads it.
func (d *Digest) UnmarshalText(b []byte) error {
	raw, err := hex.DecodeString(string(b))
	if err != nil || len(raw) != len(d) {
		return fmt.Errorf("%q is not a digest of %d bytes in hex", b, len(d))
	}
	*d = Digest(raw)
	return nil
}

// The PCRs that take part.
const (
	PCRSecureBoot = 7  // the firmware measures the keys of Secure Boot
	PCRImage      = 11 // the stub measures the image; nobody else uses it before the root runs
	PCRAdded      = 12 // the stub measures words and files that others add to what the image says; it must be as when the machine started
)

// A Section is one part of a unified kernel image (UKI).
type Section struct {
	Name string // with the dot: ".linux"
	Data []byte // as long as the section's VirtualSize
}

// measured are the sections that systemd-stub 257 measures, in its order, whatever their order in the file.
var measured = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey"}

// unmeasured is what may lie in an image besides: the signature cannot be part of what it signs.
const unmeasured = ".pcrsig"

// PredictPCR11 returns what PCR 11 will be when systemd-stub 257 has started an image of these sections. Their order does not matter. An
// empty section is as none. A section that stands there twice, or that the stub may not know, is an error.
func PredictPCR11(sections []Section) (Digest, error) {
	data := map[string][]byte{}
	for _, s := range sections {
		if _, twice := data[s.Name]; twice {
			return Digest{}, fmt.Errorf("section %s stands there twice", s.Name)
		}
		if s.Name != unmeasured && !slices.Contains(measured, s.Name) {
			return Digest{}, fmt.Errorf("section %q: it is not known whether the stub measures it", s.Name)
		}
		data[s.Name] = s.Data
	}
	var pcr Digest
	for _, name := range measured {
		if len(data[name]) > 0 {
			pcr = Extend(pcr, sha256.Sum256(append([]byte(name), 0)))
			pcr = Extend(pcr, sha256.Sum256(data[name]))
		}
	}
	return pcr, nil
}

// Extend returns a PCR after a digest was extended into it.
func Extend(pcr, digest Digest) Digest { return hash(pcr[:], digest[:]) }

func hash(parts ...[]byte) Digest { return sha256.Sum256(bytes.Join(parts, nil)) }

var be = binary.BigEndian
