package uki

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// A Signer is a key and the certificate by which others know it.
type Signer struct {
	Key         crypto.Signer // RSA: firmware knows nothing else
	Certificate *x509.Certificate
}

func (s Signer) check() error {
	public, ok := s.Key.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("signing key is %T: firmware knows RSA only", s.Key.Public())
	}
	if !public.Equal(s.Certificate.PublicKey) {
		return fmt.Errorf("signing key does not belong to the certificate of %q", s.Certificate.Subject.CommonName)
	}
	return nil
}

// Digest returns the Authenticode SHA-256 of an image. Signatures on it, and where they stand, do not count.
func Digest(image []byte) ([sha256.Size]byte, error) {
	p, err := parse(image)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	h := sha256.New()
	h.Write(image[:p.checksum])
	h.Write(image[p.checksum+4 : p.certDirectory])
	h.Write(image[p.certDirectory+8 : p.certificates])
	if p.certificates == len(image) { // signing pads first
		h.Write(make([]byte, up(len(image), 8)-len(image)))
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}

// An entry of the certificate table is a WIN_CERTIFICATE: length, revision, type, and here a PKCS#7 message.
const (
	winHeader   = 8
	winRevision = 0x0200
	winPKCS7    = 0x0002
)

// Sign returns the image with one more Authenticode signature, made at the given time. The image itself is not changed.
func Sign(image []byte, s Signer, at time.Time) ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	p, err := parse(image)
	if err != nil {
		return nil, err
	}
	digest, err := Digest(image)
	if err != nil {
		return nil, err
	}
	message, err := authenticode(digest, s, at)
	if err != nil {
		return nil, err
	}
	out := bytes.Clone(image)
	out = append(out, make([]byte, up(len(out), 8)-len(out))...)
	start := len(out)
	if p.certificates != len(image) {
		start = p.certificates
	}
	length := up(winHeader+len(message), 8)
	out = le.AppendUint32(out, uint32(length))
	out = le.AppendUint16(out, winRevision)
	out = le.AppendUint16(out, winPKCS7)
	out = append(out, message...)
	out = append(out, make([]byte, length-winHeader-len(message))...)
	le.PutUint32(out[p.certDirectory:], uint32(start))
	le.PutUint32(out[p.certDirectory+4:], uint32(len(out)-start))
	clear(out[p.checksum : p.checksum+4])
	return out, nil
}

// ErrUnsigned says that an image has no signature at all.
var ErrUnsigned = errors.New("not signed")

// Verify says whether one of the image's signatures is of the certificate's key and of these bytes: nil, ErrUnsigned, or what is
// wrong with the last signature. Like firmware, it does not look at the certificate's validity, and it knows no chains.
func Verify(image []byte, by *x509.Certificate) error {
	p, err := parse(image)
	if err != nil {
		return err
	}
	digest, err := Digest(image)
	if err != nil {
		return err
	}
	err = ErrUnsigned
	for rest := image[p.certificates:]; len(rest) > 0; {
		if len(rest) < winHeader {
			return fmt.Errorf("certificate table: %d bytes are left", len(rest))
		}
		length := uint64(le.Uint32(rest))
		if length < winHeader || length > uint64(len(rest)) {
			return fmt.Errorf("certificate table: entry of %d bytes, %d are left", length, len(rest))
		}
		if kind := le.Uint16(rest[6:]); kind != winPKCS7 {
			err = fmt.Errorf("certificate table: entry of type %d", kind)
		} else if err = checkAuthenticode(rest[winHeader:length], digest, by); err == nil {
			return nil
		}
		rest = rest[min(up(int(length), 8), len(rest)):]
	}
	return err
}
