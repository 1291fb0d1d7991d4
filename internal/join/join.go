// Package join is how a node and a cluster that it joins recognise each other (trust.v1.Join, trust.v1.Nodes), and the form of join tokens.
//
// Both sides of the network use it, so that there is one definition. It does no I/O.
package join

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	// Label is that of the TLS exporter (RFC 8446 section 7.5) that ties the proofs of Join to one connection; the context is empty.
	Label = "EXPORTER-bulkhead-join"
	// NodeLabel is the one for the calls of nodes that have joined.
	NodeLabel = "EXPORTER-bulkhead-node"
	// ServerName is in the certificates of control planes' apid, and of no other: a node that asks its cluster for certificates, or whom to trust, takes nobody else for one
	// (TLS server name, when the far side's authority is known).
	ServerName = "bulkhead-controlplane"
	// BindingSize is the exporter's length in bytes.
	BindingSize = 32
	// KeySize is the length of a cluster's join key in bytes.
	KeySize = 32
	// SealKeySize is the length of an HPKE public key in bytes.
	SealKeySize = 32
	// InstanceSize is the length in bytes of what tells two runs of a node's trustd apart.
	InstanceSize = 16
	// IDSize is the length of a token's id in characters, SecretSize that of its secret in bytes.
	IDSize     = 10
	SecretSize = 20

	alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ" // Crockford's base32, as claim codes have
	perGroup = 4
)

var encoding = base32.NewEncoding(alphabet).WithPadding(base32.NoPadding)

// NewID draws a token's id: 50 bits, so that two tokens never meet by accident. It is no secret.
func NewID(random io.Reader) (string, error) {
	raw := make([]byte, IDSize)
	if _, err := io.ReadFull(random, raw); err != nil {
		return "", err
	}
	for i, r := range raw {
		raw[i] = alphabet[r%32] // 256 is a multiple of 32: no letter is likelier
	}
	return string(raw), nil
}

// IsID reports whether a text is an id as NewID makes them.
func IsID(id string) bool {
	return len(id) == IDSize && strings.Trim(id, alphabet) == ""
}

// Secret is the secret of the token with that id in the cluster whose join key is key.
func Secret(key []byte, id string) []byte {
	return sum(key, "join", []byte(id))[:SecretSize]
}

// Token is the text that an administrator hands over: the id, a dot, and the secret in groups.
func Token(id string, secret []byte) string {
	var b strings.Builder
	b.WriteString(id)
	for i, c := range encoding.EncodeToString(secret) {
		switch {
		case i == 0:
			b.WriteByte('.')
		case i%perGroup == 0:
			b.WriteByte('-')
		}
		b.WriteRune(c)
	}
	return b.String()
}

// Parse reads a token as people type it: case, spaces and dashes do not count; O is 0, I and L are 1.
func Parse(token string) (id string, secret []byte, err error) {
	if len(token) > 256 {
		return "", nil, fmt.Errorf("join token: %d characters; one has %d", len(token), len(Token(strings.Repeat("0", IDSize), make([]byte, SecretSize))))
	}
	text := strings.NewReplacer("-", "", " ", "", "\t", "", "\r", "", "\n", "", "O", "0", "I", "1", "L", "1").Replace(strings.ToUpper(token))
	id, rest, dot := strings.Cut(text, ".")
	if !dot || !IsID(id) {
		return "", nil, fmt.Errorf("join token: it begins with an id of %d letters and digits and a dot, as it was shown when it was made", IDSize)
	}
	secret, err = encoding.DecodeString(rest)
	if err != nil || len(rest) != encoding.EncodedLen(SecretSize) {
		return "", nil, fmt.Errorf("join token: after the dot it has %d characters without dashes; %d letters and digits (no U) are a secret", len(rest), encoding.EncodedLen(SecretSize))
	}
	return id, secret, nil
}

// Binding returns the value that both ends of one TLS 1.3 connection share under a label, and nobody else.
func Binding(s tls.ConnectionState, label string) ([]byte, error) {
	return s.ExportKeyingMaterial(label, nil, BindingSize)
}

// NodeProof is what the joining node shows.
func NodeProof(secret, binding []byte, name string, csr, sealKey []byte) []byte {
	return sum(secret, "node", binding, []byte(name), []byte{0}, csr, sealKey)
}

// ClusterProof is what the cluster shows in return.
func ClusterProof(secret, binding, osCA, certificate, sealed []byte) []byte {
	return sum(secret, "cluster", binding, osCA, certificate, sealed)
}

// Equal compares two proofs in constant time.
func Equal(a, b []byte) bool { return hmac.Equal(a, b) }

func sum(key []byte, who string, parts ...[]byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(who))
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}

// SignPayload is the payload under a node's signature for SignForNode; instance has InstanceSize bytes.
func SignPayload(instance []byte, profile string, csr []byte) []byte {
	return slices.Concat(instance, []byte(profile), []byte{0}, csr)
}

// WatchPayload is the one for WatchCluster.
func WatchPayload(instance []byte) []byte { return instance }

// RotationPayload is the one for ConfirmRotation.
func RotationPayload(instance []byte, id, stage string) []byte {
	return slices.Concat(instance, []byte("rotation\x00"+id+"\x00"+stage))
}

// SignWant is how a control plane shows that it is the one to which new keys are to be sealed.
func SignWant(key *ecdsa.PrivateKey, random io.Reader, id, name string, seal []byte) ([]byte, error) {
	return ecdsa.SignASN1(random, key, rotationDigest("want", id, name, seal))
}

// VerifyWant checks what SignWant made.
func VerifyWant(key *ecdsa.PublicKey, id, name string, seal, signature []byte) bool {
	return ecdsa.VerifyASN1(key, rotationDigest("want", id, name, seal), signature)
}

// SignGiven is how the cluster's authority shows that what is sealed to a control plane is from one that has it.
func SignGiven(key *ecdsa.PrivateKey, random io.Reader, id, name string, sealed []byte) ([]byte, error) {
	return ecdsa.SignASN1(random, key, rotationDigest("given", id, name, sealed))
}

// VerifyGiven checks what SignGiven made.
func VerifyGiven(key *ecdsa.PublicKey, id, name string, sealed, signature []byte) bool {
	return ecdsa.VerifyASN1(key, rotationDigest("given", id, name, sealed), signature)
}

func rotationDigest(what, id, name string, data []byte) []byte {
	p := sha256.Sum256(data)
	d := sha256.Sum256(bytes.Join([][]byte{[]byte("bulkhead rotation"), []byte(what), []byte(id), []byte(name), p[:]}, []byte{0}))
	return d[:]
}

func digest(binding, payload []byte) []byte {
	p := sha256.Sum256(payload)
	d := sha256.Sum256(bytes.Join([][]byte{[]byte("bulkhead node\x00"), binding, p[:]}, nil))
	return d[:]
}

// Sign is how a node shows that it holds the key it joined with.
func Sign(key *ecdsa.PrivateKey, random io.Reader, binding, payload []byte) ([]byte, error) {
	return ecdsa.SignASN1(random, key, digest(binding, payload))
}

// Verify checks what Sign made.
func Verify(key *ecdsa.PublicKey, binding, payload, signature []byte) bool {
	return len(binding) == BindingSize && ecdsa.VerifyASN1(key, digest(binding, payload), signature)
}

// Digest names a node's key: the SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
func Digest(spki []byte) string {
	d := sha256.Sum256(spki)
	return hex.EncodeToString(d[:])
}

// ParseKey reads a node's public key; nodes have ECDSA P-256 and nothing else.
func ParseKey(spki []byte) (*ecdsa.PublicKey, error) {
	k, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, err
	}
	p, ok := k.(*ecdsa.PublicKey)
	if !ok || p.Curve != elliptic.P256() {
		return nil, errors.New("a node's key is ECDSA P-256")
	}
	return p, nil
}

// NewSealKey makes the key to which the cluster seals its keys.
func NewSealKey() (hpke.PrivateKey, error) { return kem().GenerateKey() }

// ParseSealKey makes a key from what its Bytes returned.
func ParseSealKey(raw []byte) (hpke.PrivateKey, error) { return kem().NewPrivateKey(raw) }

// Seal encrypts a cluster's keys for a node that joined with a token, or under another label that is no token's id: the encapsulated key and the ciphertext (RFC 9180).
func Seal(sealKey []byte, tokenID string, plain []byte) ([]byte, error) {
	k, err := kem().NewPublicKey(sealKey)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	sealed, err := hpke.Seal(k, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), info(tokenID), plain)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	return sealed, nil
}

// Open decrypts what Seal made.
func Open(key hpke.PrivateKey, tokenID string, sealed []byte) ([]byte, error) {
	return hpke.Open(key, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), info(tokenID), sealed)
}

func kem() hpke.KEM { return hpke.DHKEM(ecdh.X25519()) }

func info(tokenID string) []byte { return []byte("bulkhead join" + tokenID) }
