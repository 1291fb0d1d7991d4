// Package unlock is how a person with a key and a node whose volumes are locked recognise each other (storage.v1.Unlock).
//
// Such a node cannot say who it is: its identity lies on the locked volume. But beside the keyslot it has a verifier, which follows from the key and
// from which the key does not follow. Both prove that they know it, bound to their TLS connection, before the key itself is sent. So somebody
// in between gets no key, and somebody who guesses costs the node next to nothing. Who has a copy of the disk can pretend to be the node.
//
// Both sides of the network use the package, so that there is one definition. It does no I/O.
package unlock

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

// Kinds of keys that people have.
const (
	Recovery   = "recovery"
	Passphrase = "passphrase"
)

const (
	// Label is that of the TLS exporter (RFC 8446 section 7.5) that ties a proof to one connection; the context is empty.
	Label = "EXPORTER-bulkhead-unlock"
	// BindingSize is the exporter's length in bytes.
	BindingSize = 32
	// SaltSize is that of a passphrase's verifier, in bytes.
	SaltSize = 32
	// MinPassphrase and MaxPassphrase are in bytes.
	MinPassphrase = 12
	MaxPassphrase = 512

	alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ" // Crockford's base32
	groups   = 8
	perGroup = 4
)

// NewRecoveryKey draws a key of 160 bits, as people read it and as it opens the keyslot: "7F3K-QM2X-…".
func NewRecoveryKey() []byte {
	raw := make([]byte, groups*perGroup)
	_, _ = rand.Read(raw) // never fails
	out := make([]byte, 0, groups*(perGroup+1))
	for i, r := range raw {
		if i > 0 && i%perGroup == 0 {
			out = append(out, '-')
		}
		out = append(out, alphabet[r%32]) // 256 is a multiple of 32: no letter is likelier
	}
	clear(raw)
	return out
}

// ParseRecoveryKey returns a recovery key as NewRecoveryKey writes it. Case, spaces and dashes do not count; O is 0, I and L are 1.
func ParseRecoveryKey(text string) ([]byte, error) {
	var out []byte
	n := 0
	for _, r := range strings.ToUpper(text) {
		switch r {
		case '-', ' ', '\t', '\r', '\n':
			continue
		case 'O':
			r = '0'
		case 'I', 'L':
			r = '1'
		}
		if !strings.ContainsRune(alphabet, r) {
			return nil, fmt.Errorf("recovery key: %q is in none", r)
		}
		if n > 0 && n%perGroup == 0 && n < groups*perGroup {
			out = append(out, '-')
		}
		out = append(out, byte(r))
		n++
	}
	if n != groups*perGroup {
		return nil, fmt.Errorf("recovery key: it has %d letters and digits, not %d", n, groups*perGroup)
	}
	return out, nil
}

// Normalize returns the bytes that open the keyslot of a kind.
func Normalize(kind, text string) ([]byte, error) {
	switch kind {
	case Recovery:
		return ParseRecoveryKey(text)
	case Passphrase:
		if len(text) < MinPassphrase || len(text) > MaxPassphrase {
			return nil, fmt.Errorf("passphrase: %d bytes; allowed are %d to %d", len(text), MinPassphrase, MaxPassphrase)
		}
		return []byte(text), nil
	}
	return nil, fmt.Errorf("%.32q is no kind of key that a person has", kind)
}

// Verifier returns what a node keeps of a key: from a passphrase by argon2id, with the cost of the keyslot, so that it is no easier to guess
// by. That takes about a second. A recovery key cannot be guessed at all.
func Verifier(kind string, key, salt []byte) []byte {
	if kind == Passphrase {
		return argon2.IDKey(key, append([]byte("bulkhead unlock verifier "), salt...), 4, 64<<10, 2, sha256.Size)
	}
	m := hmac.New(sha256.New, key)
	m.Write([]byte("bulkhead unlock verifier"))
	return m.Sum(nil)
}

// NewSalt draws a salt for a passphrase's verifier.
func NewSalt() []byte {
	b := make([]byte, SaltSize)
	_, _ = rand.Read(b) // never fails
	return b
}

// Binding returns the value that both ends of one TLS 1.3 connection share, and nobody else.
func Binding(s tls.ConnectionState) ([]byte, error) {
	return s.ExportKeyingMaterial(Label, nil, BindingSize)
}

// NodeProof is what the node shows first.
func NodeProof(verifier, binding []byte) []byte { return sum(verifier, "node", binding) }

// CallerProof is what comes with the key.
func CallerProof(verifier, binding []byte) []byte { return sum(verifier, "caller", binding) }

// Equal compares two proofs in constant time.
func Equal(a, b []byte) bool { return hmac.Equal(a, b) }

func sum(verifier []byte, who string, binding []byte) []byte {
	m := hmac.New(sha256.New, verifier)
	m.Write([]byte(who))
	m.Write(binding)
	return m.Sum(nil)
}
