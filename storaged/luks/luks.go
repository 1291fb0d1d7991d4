// Package luks reads and writes LUKS2, the on-disk format of encrypted volumes, as Linux' cryptsetup has it.
//
// A volume has one random key, the volume key. The header holds it once for each keyslot, encrypted with what opens that slot: a
// passphrase, or bytes that come from a TPM, a file or a server. Which of them it is, a token says. The header lies on the disk twice; each change
// goes to one copy after the other, so that a power cut leaves at least one that is whole (Read takes the newer one).
//
// The package knows one cipher, aes-xts-plain64, and refuses all else that a header may ask for: what is not encrypted is not
// trusted. It does no more I/O than on the Device that it is given, and knows nothing of device-mapper.
//
// The format: "LUKS2 On-Disk Format Specification", version 1.1.3, in cryptsetup's docs.
package luks

import (
	"errors"
	"io"
)

// Device is the partition, or a file.
type Device interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

const (
	// DataOffset is where data begin in volumes that Format makes, in bytes: cryptsetup's own, which leaves it room for everything it can do.
	DataOffset = 16 << 20
	// KeySize is that of the volume keys that Format makes, in bytes: two AES-256 keys.
	KeySize = 64
	// MaxKeyslots is how many a header may have.
	MaxKeyslots = 32

	cipher = "aes-xts-plain64"

	// headerSize is that of one copy in volumes that Format makes: 4 KiB, and room for tokens.
	headerSize = 32 << 10
	// maxHeader is the largest that the format allows.
	maxHeader  = 4 << 20
	binarySize = 4096
	maxTokens  = 32

	sectorSize = 512  // of keyslot areas
	areaAlign  = 4096 // of keyslot areas
	stripes    = 4000 // the only number that LUKS2 uses
)

// Errors that callers tell apart.
var (
	// ErrNone: there is no LUKS2 header, in neither place.
	ErrNone = errors.New("there is no LUKS2 header")
	// ErrKey: no keyslot that was tried opens with this key.
	ErrKey = errors.New("the key does not open it")
	// ErrLast: the last keyslot cannot be removed, because the data would be lost.
	ErrLast = errors.New("it is the last keyslot")
)

// Header is what both copies say. It is the caller's; its methods change the disk first and then itself.
type Header struct {
	UUID      string // "01234567-89ab-…"
	Label     string
	Subsystem string
	Sequence  uint64 // grows with each change
	Size      int64  // of one copy, in bytes

	Keyslots map[int]Keyslot
	Tokens   map[int]Token
	Segment  Segment

	digest   digest
	flags    []string // of the config object, kept as they are
	area     int64    // bytes of all keyslot areas together
	priority map[int]int
}

// Segment is the encrypted data.
type Segment struct {
	Offset     int64 // bytes from the start of the device
	Length     int64 // bytes; 0: to the end of the device
	IVTweak    uint64
	SectorSize int // bytes, 512 to 4096
}

// Keyslot is one way to the volume key.
type Keyslot struct {
	KeySize      int   // of the volume key, in bytes
	Offset, Size int64 // of its area on the device, in bytes
	Hash         string
	KDF          KDF
}

// KDF makes a key out of a passphrase.
type KDF struct {
	Type       string // "pbkdf2" or "argon2id"
	Salt       []byte
	Hash       string // pbkdf2
	Iterations int    // pbkdf2
	Time       int    // argon2id
	Memory     int    // argon2id, in KiB
	CPUs       int    // argon2id
}

// What opening a keyslot may cost at most: the numbers stand on the disk, where anybody may have written them.
const (
	maxIterations = 20_000_000
	maxTime       = 64
	maxMemory     = 256 << 10 // KiB
	maxCPUs       = 8
)

var (
	// Random is for keys that are random themselves, of 16 bytes or more: nothing need be stretched.
	Random = KDF{Type: "pbkdf2", Hash: "sha256", Iterations: 1000}
	// Human is for passphrases that people remember.
	Human = KDF{Type: "argon2id", Time: 4, Memory: 64 << 10, CPUs: 2}
)
