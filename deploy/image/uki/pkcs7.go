package uki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// The messages of RFC 2315 that Authenticode and UEFI use: SignedData with one signer, SHA-256 and RSA. The structures serve for
// writing and for reading.

var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidRSA           = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidIndirectData  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 4}
	oidPEImageData   = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 1, 15}

	algorithmSHA256 = pkix.AlgorithmIdentifier{Algorithm: oidSHA256, Parameters: asn1.NullRawValue}
	algorithmRSA    = pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue}
)

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"optional,explicit,tag:0"` // encoding/asn1 writes and reads it with its outer tag
}

type signedData struct {
	Version      int
	Digests      []pkix.AlgorithmIdentifier `asn1:"set"`
	Content      contentInfo
	Certificates asn1.RawValue `asn1:"optional,tag:0"`
	Revocations  asn1.RawValue `asn1:"optional,tag:1"`
	Signers      []signerInfo  `asn1:"set"`
}

type signerInfo struct {
	Version    int
	By         issuerAndSerial
	Digest     pkix.AlgorithmIdentifier
	Attributes asn1.RawValue `asn1:"optional,tag:0"`
	Algorithm  pkix.AlgorithmIdentifier
	Signature  []byte
	Unsigned   asn1.RawValue `asn1:"optional,tag:1"`
}

type issuerAndSerial struct {
	Issuer asn1.RawValue
	Serial *big.Int
}

type attribute struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue // a set
}

// indirectData is what Authenticode signs in place of the image: SpcIndirectDataContent.
type indirectData struct {
	Data struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	Digest struct {
		Algorithm pkix.AlgorithmIdentifier
		Digest    []byte
	}
}

// peImageData is SpcPeImageData with no flags and an empty file name: what it says is of no use to anybody, but it must be there.
var peImageData = asn1.RawValue{FullBytes: []byte{0x30, 0x09, 0x03, 0x01, 0x00, 0xa0, 0x04, 0xa2, 0x02, 0x80, 0x00}}

// wrap makes a constructed value around content that is encoded already.
func wrap(class, tag int, content []byte) asn1.RawValue {
	b, err := asn1.Marshal(asn1.RawValue{Class: class, Tag: tag, IsCompound: true, Bytes: content})
	if err != nil {
		panic(err) // cannot be: there is nothing to refuse
	}
	return asn1.RawValue{FullBytes: b}
}

// authenticode returns the signature of an image with that digest.
func authenticode(digest [sha256.Size]byte, s Signer, at time.Time) ([]byte, error) {
	var ind indirectData
	ind.Data.Type, ind.Data.Value = oidPEImageData, peImageData
	ind.Digest.Algorithm, ind.Digest.Digest = algorithmSHA256, digest[:]
	content, err := asn1.Marshal(ind)
	if err != nil {
		return nil, err
	}
	var inner asn1.RawValue
	if _, err := asn1.Unmarshal(content, &inner); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(inner.Bytes) // without the outermost tag and length, as RFC 2315 wants it
	attributes, err := signedAttributes(sum, at)
	if err != nil {
		return nil, err
	}
	// Signed is the set as such; in the message it has another tag.
	signature, err := sign(s, wrap(asn1.ClassUniversal, asn1.TagSet, attributes).FullBytes)
	if err != nil {
		return nil, err
	}
	return message(s, contentInfo{oidIndirectData, wrap(asn1.ClassContextSpecific, 0, content)}, wrap(asn1.ClassContextSpecific, 0, attributes), signature, true)
}

func signedAttributes(digest [sha256.Size]byte, at time.Time) ([]byte, error) {
	var all []byte
	for _, a := range []struct { // in the order of their encodings, as a set must be
		oid   asn1.ObjectIdentifier
		value any
	}{{oidContentType, oidIndirectData}, {oidSigningTime, at.UTC()}, {oidMessageDigest, digest[:]}} {
		value, err := asn1.Marshal(a.value)
		if err != nil {
			return nil, err
		}
		b, err := asn1.Marshal(attribute{a.oid, wrap(asn1.ClassUniversal, asn1.TagSet, value)})
		if err != nil {
			return nil, err
		}
		all = append(all, b...)
	}
	return all, nil
}

func sign(s Signer, text []byte) ([]byte, error) {
	sum := sha256.Sum256(text)
	signature, err := s.Key.Sign(rand.Reader, sum[:], crypto.SHA256) // randomness only blinds
	if err != nil {
		return nil, fmt.Errorf("sign with the key of %q: %w", s.Certificate.Subject.CommonName, err)
	}
	return signature, nil
}

// message encodes a SignedData with one signer; outer says whether it stands in a ContentInfo of its own.
func message(s Signer, content contentInfo, attributes asn1.RawValue, signature []byte, outer bool) ([]byte, error) {
	b, err := asn1.Marshal(signedData{
		Version: 1, Digests: []pkix.AlgorithmIdentifier{algorithmSHA256}, Content: content,
		Certificates: wrap(asn1.ClassContextSpecific, 0, s.Certificate.Raw),
		Signers: []signerInfo{{
			Version: 1, By: issuerAndSerial{asn1.RawValue{FullBytes: s.Certificate.RawIssuer}, s.Certificate.SerialNumber},
			Digest: algorithmSHA256, Attributes: attributes, Algorithm: algorithmRSA, Signature: signature,
		}},
	})
	if err != nil || !outer {
		return b, err
	}
	return asn1.Marshal(contentInfo{oidSignedData, wrap(asn1.ClassContextSpecific, 0, b)})
}

// checkAuthenticode says what is wrong with a signature of an image with that digest, which may be followed by padding.
func checkAuthenticode(der []byte, digest [sha256.Size]byte, by *x509.Certificate) error {
	var outer contentInfo
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	var data signedData
	if !outer.Type.Equal(oidSignedData) {
		return fmt.Errorf("signature: is a %v", outer.Type)
	} else if err := exactly(outer.Content.Bytes, &data); err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	var ind indirectData
	if !data.Content.Type.Equal(oidIndirectData) {
		return fmt.Errorf("signature: is of a %v", data.Content.Type)
	} else if err := exactly(data.Content.Content.Bytes, &ind); err != nil {
		return fmt.Errorf("signature: content: %w", err)
	}
	if !ind.Digest.Algorithm.Algorithm.Equal(oidSHA256) || !bytes.Equal(ind.Digest.Digest, digest[:]) {
		return errors.New("the image was changed after it was signed")
	}
	var inner asn1.RawValue
	if err := exactly(data.Content.Content.Bytes, &inner); err != nil {
		return err
	}
	for _, s := range data.Signers {
		if bytes.Equal(s.By.Issuer.FullBytes, by.RawIssuer) && s.By.Serial != nil && s.By.Serial.Cmp(by.SerialNumber) == 0 {
			return s.check(sha256.Sum256(inner.Bytes), by)
		}
	}
	return fmt.Errorf("signed by somebody else than %q", by.Subject.CommonName)
}

// exactly decodes one value that has nothing behind it.
func exactly(der []byte, to any) error {
	rest, err := asn1.Unmarshal(der, to)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%d bytes are left", len(rest))
	}
	return err
}

func (s signerInfo) check(digest [sha256.Size]byte, by *x509.Certificate) error {
	var found bool
	for rest := s.Attributes.Bytes; len(rest) > 0; {
		var a attribute
		var err error
		if rest, err = asn1.Unmarshal(rest, &a); err != nil {
			return fmt.Errorf("signature: attributes: %w", err)
		}
		if !a.Type.Equal(oidMessageDigest) {
			continue
		}
		var d []byte
		if err := exactly(a.Value.Bytes, &d); err != nil || !bytes.Equal(d, digest[:]) {
			return errors.New("signature: its digest is of other content")
		}
		found = true
	}
	key, ok := by.PublicKey.(*rsa.PublicKey)
	if !found || !ok || !s.Digest.Algorithm.Equal(oidSHA256) {
		return errors.New("signature: not one of RSA and SHA-256 over a digest")
	}
	sum := sha256.Sum256(wrap(asn1.ClassUniversal, asn1.TagSet, s.Attributes.Bytes).FullBytes)
	if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], s.Signature); err != nil {
		return fmt.Errorf("signature of %q: %w", by.Subject.CommonName, err)
	}
	return nil
}
