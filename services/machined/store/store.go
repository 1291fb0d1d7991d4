// Package store keeps the generations of the document as numbered files, so that a power cut at any moment leaves the old or
// the new one, whole. It knows nothing of what a document means.
//
// A file "<number in 8 digits>.generation" is, in version 1:
//
//	bulkhead-generation 1 <SHA-256 of all that follows this line, hexadecimal>\n
//	{"generation":7,"applied":"…","caller":"…","name":"…"}\n
//	the documents, byte for byte
//
// It is written under another name, synced, renamed, and the folder is synced. The newest file whose sum is right is what counts.
package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strconv"
	"strings"
	"time"
)

// FS is the folder that generations live in. Names have no slash.
type FS interface {
	// Names lists the files.
	Names() ([]string, error)
	// Read returns a file of at most most bytes.
	Read(name string, most int64) ([]byte, error)
	// Write makes or replaces a file and syncs its content, not the folder.
	Write(name string, data []byte) error
	// Rename moves a file over another one, and Remove deletes one; Sync makes both last.
	Rename(from, to string) error
	Remove(name string) error
	Sync() error
}

const (
	// Keep is how many generations are kept.
	Keep = 32
	// MaxDocuments bounds one generation's documents, in bytes.
	MaxDocuments = 1 << 20

	magic     = "bulkhead-generation "
	format    = "1"
	suffix    = ".generation"
	temporary = "new.tmp"
	maxHeader = 4 << 10
	maxFile   = MaxDocuments + 2*maxHeader
)

// Generation is one stored configuration.
type Generation struct {
	Number  uint64    `json:"generation"` // from 1
	Applied time.Time `json:"applied"`
	Caller  string    `json:"caller"` // who applied it
	Name    string    `json:"name"`   // what the caller called the text
	// Hostname is the name that the node gave itself, for documents that have none; each generation hands it on to the next.
	Hostname  string `json:"hostname,omitempty"`
	Documents []byte `json:"-"` // as they were sent; nil in lists
	Sum       string `json:"-"` // SHA-256 of Documents, hexadecimal
}

// A Store reads and writes generations. One goroutine at a time may use it.
type Store struct {
	fs      FS
	numbers []uint64 // of the files there are, damaged ones too, ascending
}

// Open looks at the folder and removes what a power cut left unfinished.
func Open(folder FS) (*Store, error) {
	names, err := folder.Names()
	if err != nil {
		return nil, fmt.Errorf("generations: %w", err)
	}
	s := &Store{fs: folder}
	for _, name := range names {
		if name == temporary {
			if err := folder.Remove(name); err != nil {
				return nil, fmt.Errorf("generations: %w", err)
			}
		}
		if n, ok := number(name); ok {
			s.numbers = append(s.numbers, n)
		}
	}
	sort.Slice(s.numbers, func(i, j int) bool { return s.numbers[i] < s.numbers[j] })
	return s, nil
}

// Close closes the folder, if it is one that can be closed. The store must not be used afterwards.
func (s *Store) Close() error {
	if c, ok := s.fs.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

func fileName(n uint64) string { return fmt.Sprintf("%08d%s", n, suffix) }

func number(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, suffix)
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, ok && err == nil && n > 0 && fileName(n) == name
}

// Next is the number of the generation that Add would make: above every number that was ever seen, damaged files too.
func (s *Store) Next() uint64 {
	if len(s.numbers) == 0 {
		return 1
	}
	return s.numbers[len(s.numbers)-1] + 1
}

// Load reads one generation. The error wraps fs.ErrNotExist if it is not stored.
func (s *Store) Load(n uint64) (Generation, error) {
	data, err := s.fs.Read(fileName(n), maxFile)
	if err != nil {
		return Generation{}, fmt.Errorf("generation %d: %w", n, err)
	}
	g, err := decode(data)
	if err == nil && g.Number != n {
		err = fmt.Errorf("the file says it is generation %d", g.Number)
	}
	if err != nil {
		return Generation{}, fmt.Errorf("generation %d: %w", n, err)
	}
	return g, nil
}

// Newest returns the newest generation that is whole, and why newer ones are not. Number is 0 if there is none.
func (s *Store) Newest() (g Generation, damaged []error) {
	for i := len(s.numbers) - 1; i >= 0; i-- {
		g, err := s.Load(s.numbers[i])
		if err == nil {
			return g, damaged
		}
		damaged = append(damaged, err)
	}
	return Generation{}, damaged
}

// List returns the whole generations without their documents, newest first.
func (s *Store) List() []Generation {
	var out []Generation
	for i := len(s.numbers) - 1; i >= 0; i-- {
		if g, err := s.Load(s.numbers[i]); err == nil {
			g.Documents = nil
			out = append(out, g)
		}
	}
	return out
}

// Add stores the next generation; its number and sum are set by Add. After an error the old one is still the newest.
// Old generations beyond Keep are removed.
func (s *Store) Add(g Generation) (Generation, error) {
	g.Number = s.Next()
	data, err := encode(g)
	if err != nil {
		return Generation{}, fmt.Errorf("generation %d: %w", g.Number, err)
	}
	g.Sum = sum(g.Documents)
	name := fileName(g.Number)
	err = s.fs.Write(temporary, data)
	if err == nil {
		if err = s.fs.Rename(temporary, name); err == nil {
			if err = s.fs.Sync(); err != nil {
				// It may or may not be there after a power cut. Take it away, so that what we say is what comes back.
				err = errors.Join(err, s.fs.Remove(name), s.fs.Sync())
			}
		}
	}
	if err != nil {
		if e := s.fs.Remove(temporary); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		return Generation{}, fmt.Errorf("store generation %d: %w", g.Number, err)
	}
	s.numbers = append(s.numbers, g.Number)
	for len(s.numbers) > Keep {
		if err := s.fs.Remove(fileName(s.numbers[0])); err != nil && !errors.Is(err, fs.ErrNotExist) {
			break // an old file too many does no harm; the next Add tries again
		}
		s.numbers = s.numbers[1:]
	}
	return g, nil
}

func sum(data []byte) string {
	h := sha256.Sum256(data)
	return hex.EncodeToString(h[:])
}

func encode(g Generation) ([]byte, error) {
	if len(g.Documents) > MaxDocuments {
		return nil, fmt.Errorf("%d bytes of documents; at most %d are allowed", len(g.Documents), MaxDocuments)
	}
	header, err := json.Marshal(g)
	if err != nil {
		return nil, err
	}
	if len(header) > maxHeader {
		return nil, fmt.Errorf("%d bytes of header; at most %d are allowed", len(header), maxHeader)
	}
	body := append(append(header, '\n'), g.Documents...)
	return append([]byte(magic+format+" "+sum(body)+"\n"), body...), nil
}

func decode(data []byte) (Generation, error) {
	first, body, ok := bytes.Cut(data, []byte{'\n'})
	rest, ok2 := strings.CutPrefix(string(first[:min(len(first), 256)]), magic)
	version, want, ok3 := strings.Cut(rest, " ")
	if !ok || !ok2 || !ok3 {
		return Generation{}, errors.New("damaged: no header")
	}
	if version != format {
		return Generation{}, fmt.Errorf("format %q is not known, only %q is; a newer image wrote it", version, format)
	}
	if got := sum(body); got != want {
		return Generation{}, fmt.Errorf("damaged: its sum is %s, must be %s", got, want)
	}
	header, documents, ok := bytes.Cut(body, []byte{'\n'})
	var g Generation
	if err := json.Unmarshal(header, &g); err != nil || !ok || g.Number == 0 {
		return Generation{}, fmt.Errorf("damaged: header %.80q", header)
	}
	g.Documents, g.Sum = documents, sum(documents)
	return g, nil
}
