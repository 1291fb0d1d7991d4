package pcrpolicy

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
)

// Limits of what is read: both come from a disk that anybody may have written.
const (
	maxSignature = 4 << 10 // bytes of JSON
	maxKey       = 4 << 10 // bytes of PEM
	keyBits      = 2048    // all that every TPM can verify
	exponent     = 65537
)

// Signature is a signed policy.
type Signature struct {
	Fingerprint Digest // of the key; see Fingerprint
	Policy      Digest // of Policy.Digest
	Signature   []byte // RSA PKCS #1 v1.5 with SHA-256 over Policy
}

// document is systemd's form (systemd-measure(1)): a list of entries for each bank of PCRs.
type document struct {
	SHA256 []entry `json:"sha256"`
}

type entry struct {
	PCRs []int  `json:"pcrs"`
	Pkfp string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  string `json:"sig"`
}

// Sign returns the section .pcrsig for an image: JSON in systemd's form. The signer's key must be RSA with 2048 bits and the exponent
// 65537. Equal inputs give equal bytes.
func Sign(signer crypto.Signer, p Policy) ([]byte, error) {
	key, ok := signer.Public().(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("the key that signs policies is a %T, not an RSA key", signer.Public())
	}
	if err := checkKey(key); err != nil {
		return nil, err
	}
	digest, err := p.Digest()
	if err != nil {
		return nil, err
	}
	hashed := sha256.Sum256(digest[:])
	sig, err := signer.Sign(rand.Reader, hashed[:], crypto.SHA256) // PKCS #1 v1.5 needs no randomness but for blinding
	if err != nil {
		return nil, fmt.Errorf("sign the PCR policy: %w", err)
	}
	print := Fingerprint(key)
	s := Signature{print, digest, sig}
	if err := s.Verify(key); err != nil {
		return nil, fmt.Errorf("sign the PCR policy: the key's own signature: %w", err)
	}
	return json.Marshal(document{[]entry{{
		PCRs: []int{PCRImage}, Pkfp: hex.EncodeToString(print[:]), Pol: hex.EncodeToString(digest[:]), Sig: base64.StdEncoding.EncodeToString(sig),
	}}})
}

// ParseSignature reads what Sign wrote; NUL bytes and blanks behind it are left out. It wants exactly one entry, and that for
// PCR 11 of the SHA-256 bank. That the signature is right is for Verify, and in the end for the TPM.
func ParseSignature(data []byte) (Signature, error) {
	bad := func(format string, args ...any) (Signature, error) {
		return Signature{}, fmt.Errorf("PCR signature: "+format, args...)
	}
	if len(data) > maxSignature {
		return bad("%d bytes, more than %d", len(data), maxSignature)
	}
	d := json.NewDecoder(bytes.NewReader(bytes.TrimRight(data, "\x00 \r\n")))
	d.DisallowUnknownFields()
	var doc document
	if err := d.Decode(&doc); err != nil {
		return bad("%w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("there is something behind it")
	}
	if n := len(doc.SHA256); n != 1 {
		return bad("%d entries for SHA-256, want one", n)
	}
	e := doc.SHA256[0]
	if len(e.PCRs) != 1 || e.PCRs[0] != PCRImage {
		return bad("it is for the PCRs %v, want %d", e.PCRs, PCRImage)
	}
	var s Signature
	for _, f := range []struct {
		name, text string
		to         *Digest
	}{{"pkfp", e.Pkfp, &s.Fingerprint}, {"pol", e.Pol, &s.Policy}} {
		b, err := hex.DecodeString(f.text)
		if err != nil || len(b) != len(f.to) {
			return bad("%s is not %d bytes in hex", f.name, len(f.to))
		}
		copy(f.to[:], b)
	}
	var err error
	if s.Signature, err = base64.StdEncoding.Strict().DecodeString(e.Sig); err != nil || len(s.Signature) != keyBits/8 {
		return bad("sig is not %d bytes in base64", keyBits/8)
	}
	return s, nil
}

// Verify reports why the signature is not the key's; nil if it is.
func (s Signature) Verify(key *rsa.PublicKey) error {
	if Fingerprint(key) != s.Fingerprint {
		return errors.New("it is of another key")
	}
	hashed := sha256.Sum256(s.Policy[:])
	return rsa.VerifyPKCS1v15(key, crypto.SHA256, hashed[:], s.Signature)
}

// Fingerprint names a key as systemd does: the digest of its PKCS #1 form.
func Fingerprint(key *rsa.PublicKey) Digest { return sha256.Sum256(x509.MarshalPKCS1PublicKey(key)) }

// ParseKey reads a public key (section .pcrpkey): one PEM block "PUBLIC KEY" with an RSA key of 2048 bits and the exponent 65537; NUL
// bytes behind it are left out.
func ParseKey(data []byte) (*rsa.PublicKey, error) {
	if len(data) > maxKey {
		return nil, fmt.Errorf("PCR key: %d bytes, more than %d", len(data), maxKey)
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.Trim(rest, "\x00 \r\n")) > 0 {
		return nil, errors.New(`PCR key: want one PEM block "PUBLIC KEY"`)
	}
	any, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("PCR key: %w", err)
	}
	key, ok := any.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("PCR key: it is a %T, not an RSA key", any)
	}
	return key, checkKey(key)
}

// EncodeKey writes a public key as ParseKey reads it.
func EncodeKey(key *rsa.PublicKey) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("PCR key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), nil
}

func checkKey(key *rsa.PublicKey) error {
	if key.N.BitLen() != keyBits || key.E != exponent {
		return fmt.Errorf("PCR key: RSA with %d bits and exponent %d; only %d and %d can be used", key.N.BitLen(), key.E, keyBits, exponent)
	}
	return nil
}
