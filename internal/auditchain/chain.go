// Package auditchain is the form of the audit log: lines that each name the hash of the one before, and the check of a whole log.
//
// It is pure. Nodes write with it, and whoever has the lines checks with it. It must not know where lines are kept, nor what a call means.
package auditchain

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// MaxLine bounds a line in bytes, without its newline. What is in a record is bounded by who writes it.
const MaxLine = 40 << 10

// A Kind says what a record is about.
type Kind string

// The kinds of records.
const (
	Call    Kind = "call"    // a call; Entry, or Note if what was said of it is no JSON
	Start   Kind = "start"   // the writer began, or began again
	Torn    Kind = "torn"    // the end of the file was not whole, as after a power cut, and was cut off
	Lost    Kind = "lost"    // calls could not be kept
	Rotated Kind = "rotated" // records before First are deleted, since the log has its size
)

// Record is one line.
type Record struct {
	// Chain is the log's random name: another one says that the log began anew.
	Chain string `json:"chain"`
	// Sequence is 1 for a chain's first record, and grows by one.
	Sequence uint64 `json:"seq"`
	// Boot is the kernel's id of the boot; "" if it is not known.
	Boot string    `json:"boot,omitempty"`
	Kind Kind      `json:"kind"`
	Time time.Time `json:"time"` // by the node's clock, in UTC
	// Entry is what apid said of a call: a JSON object. nil for other kinds.
	Entry json.RawMessage `json:"entry,omitempty"`
	// Note is a sentence for a person; "" if there is nothing to say.
	Note string `json:"note,omitempty"`
	// First is, of Rotated, the oldest record that was kept. 0 for other kinds.
	First uint64 `json:"first,omitempty"`
	// Prev is the hash of the record before, in hexadecimal; "" for the first.
	Prev string `json:"prev"`

	// Hash is that of the line: SHA-256 over a label and all of the line before it, in hexadecimal. Seal sets it.
	Hash string `json:"-"`
}

// Head is the end of a log at one moment. The zero value says that there is none.
type Head struct {
	Chain    string
	Sequence uint64
	Hash     string
}

// label keeps a hash of this log from being one of anything else.
const label = "bulkhead audit 1\n"

const (
	hashStart = `,"hash":"`
	hashEnd   = `"}`
	tailSize  = len(hashStart) + 2*sha256.Size + len(hashEnd)
)

// Next completes a record that follows h, and returns its line without a newline. The error is of an Entry that is no JSON.
func (h Head) Next(r *Record) ([]byte, error) {
	r.Chain, r.Sequence, r.Prev = h.Chain, h.Sequence+1, h.Hash
	content, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	content = content[:len(content)-1] // without the brace, which stands behind the hash
	r.Hash = sum(content)
	return append(append(append(content, hashStart...), r.Hash...), hashEnd...), nil
}

// Head is the end of a log that ends with r.
func (r *Record) Head() Head { return Head{r.Chain, r.Sequence, r.Hash} }

func sum(content []byte) string {
	h := sha256.New()
	h.Write([]byte(label))
	h.Write(content)
	return hex.EncodeToString(h.Sum(nil))
}

// Parse reads a line, without its newline, and checks its own hash: a line of which any byte was changed is an error. That the record follows the one before
// is Verifier's to check. Fields of a later version are passed over.
func Parse(line []byte) (*Record, error) {
	if len(line) > MaxLine {
		return nil, fmt.Errorf("%d bytes; a record has at most %d", len(line), MaxLine)
	}
	cut := len(line) - tailSize
	if cut < 1 || !bytes.HasPrefix(line[cut:], []byte(hashStart)) || !bytes.HasSuffix(line, []byte(hashEnd)) {
		return nil, fmt.Errorf("no record: it does not end with a hash")
	}
	r := &Record{Hash: string(line[cut+len(hashStart) : len(line)-len(hashEnd)])}
	if r.Hash != sum(line[:cut]) {
		return r, fmt.Errorf("its hash is not that of its content")
	}
	if err := json.Unmarshal(append(bytes.Clone(line[:cut]), '}'), r); err != nil {
		return nil, fmt.Errorf("no record: %w", err)
	}
	return r, nil
}
