// Package claim is the proof by which a node and its first administrator recognise each other (trust.v1.Claim).
//
// Both sides of the network use it, so that there is one definition. It does no I/O.
package claim

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"io"
	"strings"
)

const (
	// Label is that of the TLS exporter (RFC 8446 section 7.5) that ties a proof to one connection; the context is empty.
	Label = "EXPORTER-bulkhead-claim"
	// BindingSize is the exporter's length in bytes.
	BindingSize = 32
	// MinKey is the least length of a code or key after Normalize: 80 bits if it is Crockford's base32.
	MinKey = 16
	// MaxKey bounds it.
	MaxKey = 256

	alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ" // Crockford's base32
	groups   = 4
	perGroup = 5
)

// NewCode draws a code of 100 bits, as people read it: "7F3KQ-M2X9T-…".
func NewCode(random io.Reader) (string, error) {
	raw := make([]byte, groups*perGroup)
	if _, err := io.ReadFull(random, raw); err != nil {
		return "", err
	}
	var b strings.Builder
	for i, r := range raw {
		if i > 0 && i%perGroup == 0 {
			b.WriteByte('-')
		}
		b.WriteByte(alphabet[r%32]) // 256 is a multiple of 32: no letter is likelier
	}
	return b.String(), nil
}

// Normalize returns the form of a code or key that proofs are made with: what people mistake for each other is one.
// Case, spaces and dashes do not count; O is 0, I and L are 1. It is an error if the rest is too short or too long.
func Normalize(code string) (string, error) {
	var b strings.Builder
	for _, r := range strings.ToUpper(code) {
		switch r {
		case '-', ' ', '\t', '\r', '\n':
			continue
		case 'O':
			r = '0'
		case 'I', 'L':
			r = '1'
		}
		b.WriteRune(r)
	}
	if b.Len() < MinKey || b.Len() > MaxKey {
		return "", fmt.Errorf("claim code: it has %d characters without spaces and dashes; allowed are %d to %d, a code from a console has %d",
			b.Len(), MinKey, MaxKey, groups*perGroup)
	}
	return b.String(), nil
}

// Binding returns the value that both ends of one TLS 1.3 connection share, and nobody else.
func Binding(s tls.ConnectionState) ([]byte, error) {
	return s.ExportKeyingMaterial(Label, nil, BindingSize)
}

// ClientProof is what the administrator shows. code must be normalized.
func ClientProof(code string, binding, csr []byte) []byte { return sum(code, "client", binding, csr) }

// ServerProof is what the node shows in return. code must be normalized.
func ServerProof(code string, binding, ca, certificate []byte) []byte {
	return sum(code, "server", binding, ca, certificate)
}

// JoinProof is what the administrator shows who makes the node a member of a cluster; sealed is from SealToken. code must be normalized.
func JoinProof(code string, binding []byte, name string, sealed []byte, endpoints []string) []byte {
	return sum(code, "join", binding, request(name, endpoints), sealed)
}

// JoinedProof is what the node shows in return. code must be normalized.
func JoinedProof(code string, binding, ca []byte, role string) []byte {
	return sum(code, "joined", binding, []byte(role), []byte{0}, ca)
}

// SealToken encrypts a join token for the node that knows the code: whoever else answers under the node's address does not get it.
// code must be normalized.
func SealToken(code string, binding []byte, name string, endpoints []string, token string, random io.Reader) ([]byte, error) {
	gcm, err := tokenKey(code, binding)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, gcm.NonceSize())
	if _, err := io.ReadFull(random, nonce); err != nil {
		return nil, err
	}
	return gcm.Seal(nonce, nonce, []byte(token), request(name, endpoints)), nil
}

// OpenToken decrypts what SealToken made.
func OpenToken(code string, binding []byte, name string, endpoints []string, sealed []byte) (string, error) {
	gcm, err := tokenKey(code, binding)
	if err != nil {
		return "", err
	}
	n := gcm.NonceSize()
	if len(sealed) < n {
		return "", fmt.Errorf("join token: %d bytes are no sealed one", len(sealed))
	}
	plain, err := gcm.Open(nil, sealed[:n], sealed[n:], request(name, endpoints))
	return string(plain), err
}

// tokenKey is of one code and one connection.
func tokenKey(code string, binding []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(sum(code, "join token", binding))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// request is what else is asked for, without ambiguity.
func request(name string, endpoints []string) []byte {
	return []byte(name + "\x00" + strings.Join(endpoints, "\x00") + "\x00")
}

// Equal compares two proofs in constant time.
func Equal(a, b []byte) bool { return hmac.Equal(a, b) }

func sum(code, who string, parts ...[]byte) []byte {
	m := hmac.New(sha256.New, []byte(code))
	m.Write([]byte(who))
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}
