package bundle

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// Context stands before what is signed, so that a signature over something else can never pass for one over a manifest.
const Context = "bulkhead-update-v1\n"

// maxKeys bounds the keys of one file.
const maxKeys = 8

// Keys are the release keys that a node trusts: more than one while a key is being replaced by the next.
type Keys []ed25519.PublicKey

// ParseKeys reads release.pub: PEM blocks "PUBLIC KEY" (PKIX) with Ed25519 keys, at least one, at most 8, and nothing else.
func ParseKeys(text []byte) (Keys, error) {
	var keys Keys
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("release keys: a block %q is no public key", block.Type)
		}
		k, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("release keys: %w", err)
		}
		public, ok := k.(ed25519.PublicKey)
		if !ok {
			return nil, fmt.Errorf("release keys: a key is %T, want Ed25519", k)
		}
		if keys = append(keys, public); len(keys) > maxKeys {
			return nil, fmt.Errorf("release keys: more than %d", maxKeys)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("release keys: there is none (want PEM blocks PUBLIC KEY)")
	}
	return keys, nil
}

// MarshalKeys writes keys as ParseKeys reads them.
func MarshalKeys(keys Keys) ([]byte, error) {
	var out []byte
	for _, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			return nil, err
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})...)
	}
	return out, nil
}

// KeyID names a key in messages: the first 8 bytes of its SHA-256, in hexadecimal digits.
func KeyID(k ed25519.PublicKey) string {
	sum := sha256.Sum256(k)
	return hex.EncodeToString(sum[:8])
}

// Sign signs the bytes of a manifest. The signer's key must be Ed25519, which gives equal input equal signatures.
func Sign(signer crypto.Signer, manifest []byte) ([]byte, error) {
	public, ok := signer.Public().(ed25519.PublicKey)
	if !ok {
		return nil, fmt.Errorf("sign the manifest: the key is %T, want Ed25519", signer.Public())
	}
	message := append([]byte(Context), manifest...)
	sig, err := signer.Sign(rand.Reader, message, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("sign the manifest: %w", err)
	}
	if len(sig) != SignatureSize || !ed25519.Verify(public, message, sig) { // a key store that signs something else
		return nil, errors.New("sign the manifest: the signer's answer is no signature of its key")
	}
	return sig, nil
}

// Verify checks the signature over the bytes of a manifest and, only then, reads it. The error is or wraps ErrUnsigned, ErrForeign or
// ErrTampered where one of these is the reason.
func (k Keys) Verify(manifest, signature []byte) (Manifest, error) {
	if len(manifest) > MaxManifest {
		return Manifest{}, fmt.Errorf("manifest of %d bytes: at most %d are allowed", len(manifest), MaxManifest)
	}
	if len(signature) == 0 {
		return Manifest{}, ErrUnsigned
	}
	message := append([]byte(Context), manifest...)
	for _, key := range k {
		if len(signature) == SignatureSize && ed25519.Verify(key, message, signature) {
			return Parse(manifest)
		}
	}
	var names []string
	for _, key := range k {
		names = append(names, KeyID(key))
	}
	trusted := strings.Join(names, ", ")
	// What an unverified manifest claims is good for one thing: to say which mistake it probably is.
	claim, err := Parse(manifest)
	if err != nil {
		return Manifest{}, fmt.Errorf("%w (%s)", ErrTampered, err)
	}
	for _, n := range names {
		if n == claim.Key {
			return Manifest{}, fmt.Errorf("%w: the signature is not that of key %s over this manifest", ErrTampered, n)
		}
	}
	return Manifest{}, fmt.Errorf("%w: it claims key %.16q, this node trusts %s", ErrForeign, claim.Key, trusted)
}
