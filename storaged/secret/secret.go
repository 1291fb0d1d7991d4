// Package secret holds keys such that they are not printed by mistake, and can be wiped.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"log/slog"
)

// hidden is all that anybody sees of a secret in a text.
const hidden = "[secret]"

// Bytes is a secret. However it is printed, logged or encoded, it reads "[secret]". Copies share the bytes: Wipe wipes them all.
// The zero value is an empty secret. Wiping reaches the bytes that it holds, not copies that others made of them.
type Bytes struct{ b []byte }

// From takes over b, which the caller must not use any more.
func From(b []byte) Bytes { return Bytes{b} }

// New draws n random bytes.
func New(n int) Bytes {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return Bytes{b}
}

// Expose returns the secret itself. It is valid until Wipe.
func (s Bytes) Expose() []byte { return s.b }

// Len is in bytes.
func (s Bytes) Len() int { return len(s.b) }

// Copy returns the same secret in bytes of its own.
func (s Bytes) Copy() Bytes { return Bytes{append([]byte(nil), s.b...)} }

// Equal compares in a time that depends on the lengths only.
func (s Bytes) Equal(o Bytes) bool { return subtle.ConstantTimeCompare(s.b, o.b) == 1 }

// Wipe overwrites the secret with zeros. It may be called more than once.
func (s Bytes) Wipe() { clear(s.b) }

// Format answers every verb of package fmt.
func (Bytes) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(hidden)) }

// String is for those who ask without fmt.
func (Bytes) String() string { return hidden }

// LogValue is for log/slog.
func (Bytes) LogValue() slog.Value { return slog.StringValue(hidden) }

// MarshalText is for encoding/json and the like.
func (Bytes) MarshalText() ([]byte, error) { return []byte(hidden), nil }
