package attest

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// Credential is a secret that one TPM with one attestation key can read (TPM2_MakeCredential).
type Credential struct {
	Blob   []byte // TPM2B_ID_OBJECT, without its length
	Secret []byte // TPM2B_ENCRYPTED_SECRET, without its length
}

// AK is an attestation key that is made as it must be; whose it is shows Challenge.
type AK struct {
	name []byte
	key  *ecdsa.PublicKey
}

// ParseAK reads Device.AK.
func ParseAK(raw []byte) (AK, error) {
	if len(raw) > MaxKey {
		return AK{}, fmt.Errorf("the attestation key has %d bytes; allowed are %d", len(raw), MaxKey)
	}
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](raw)
	if err != nil {
		return AK{}, errTemplate
	}
	point, err := p.Unique.ECC()
	if err != nil {
		return AK{}, errTemplate
	}
	want := akTemplate // all but the key itself must be as in the template
	want.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, point)
	if !bytes.Equal(tpm2.Marshal(want), raw) {
		return AK{}, errTemplate
	}
	key, err := onCurve(point)
	if err != nil {
		return AK{}, errTemplate
	}
	name, err := tpm2.ObjectName(p)
	if err != nil {
		return AK{}, errTemplate
	}
	return AK{name.Buffer, key}, nil
}

// onCurve makes a key of a point; one that is none of P-256 is an error.
func onCurve(p *tpm2.TPMSECCPoint) (*ecdsa.PublicKey, error) {
	const size = 32
	if len(p.X.Buffer) > size || len(p.Y.Buffer) > size {
		return nil, errors.New("no point of P-256")
	}
	raw := make([]byte, 1+2*size)
	raw[0] = 4
	copy(raw[1+size-len(p.X.Buffer):], p.X.Buffer)
	copy(raw[1+2*size-len(p.Y.Buffer):], p.Y.Buffer)
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
}

// Challenge encrypts a new secret to the TPM that has this endorsement key, and in it this attestation key.
func Challenge(random io.Reader, ek []byte, ak AK) (secret []byte, c Credential, err error) {
	public, err := endorsement(ek)
	if err != nil {
		return nil, c, err
	}
	to, err := tpm2.ImportEncapsulationKey(public)
	if err != nil {
		return nil, c, fmt.Errorf("the endorsement key: %w", err)
	}
	secret = make([]byte, SecretSize)
	if _, err := io.ReadFull(random, secret); err != nil {
		return nil, c, err
	}
	c.Blob, c.Secret, err = tpm2.CreateCredential(random, to, ak.name, secret)
	return secret, c, err
}

// endorsement is TCG's template with this key: whatever else a machine might say about it does not count.
func endorsement(spki []byte) (*tpm2.TPMTPublic, error) {
	point, err := endorsementPoint(spki)
	if err != nil {
		return nil, err
	}
	raw := point.Bytes()[1:]
	half := len(raw) / 2
	p := tpm2.ECCEKTemplate
	p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: raw[:half]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[half:]}})
	return &p, nil
}

func endorsementPoint(spki []byte) (*ecdh.PublicKey, error) {
	if len(spki) <= MaxKey {
		if k, err := x509.ParsePKIXPublicKey(spki); err == nil {
			if e, ok := k.(*ecdsa.PublicKey); ok && e.Curve == elliptic.P256() {
				if again, err := x509.MarshalPKIXPublicKey(e); err == nil && bytes.Equal(again, spki) { // one key, one fingerprint
					return e.ECDH()
				}
			}
		}
	}
	return nil, errors.New("the endorsement key is none of ECC P-256")
}

// attested is what a TPM has signed.
type attested struct {
	extra  []byte
	digest []byte // of the PCRs
}

func parse(raw []byte) (attested, error) {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](raw)
	if err != nil || a.Magic != tpm2.TPMGeneratedValue || a.Type != tpm2.TPMSTAttestQuote {
		return attested{}, errors.New("the TPM's word is no quote of PCRs")
	}
	q, err := a.Attested.Quote()
	if err != nil || !bytes.Equal(tpm2.Marshal(q.PCRSelect), tpm2.Marshal(selection())) {
		return attested{}, fmt.Errorf("the quote is not of PCRs %d of SHA-256", PCRs)
	}
	return attested{a.ExtraData.Buffer, q.PCRDigest.Buffer}, nil
}

func (a attested) agrees(v Values) bool {
	h := sha256.New()
	for _, d := range v {
		h.Write(d[:])
	}
	return bytes.Equal(h.Sum(nil), a.digest)
}

// Check says whether a quote is the word of the TPM that has the key, over the qualifier, for the values in it.
func (k AK) Check(q Quote, qualifier []byte) error {
	if len(q.Attest) > MaxQuote || len(q.Signature) > MaxQuote {
		return errors.New("the quote is too long")
	}
	s, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
	if err != nil {
		return errors.New("the quote's signature cannot be read")
	}
	e, err := s.Signature.ECDSA()
	if err != nil || e.Hash != tpm2.TPMAlgSHA256 {
		return errors.New("the quote is not signed with ECDSA and SHA-256")
	}
	d := sha256.Sum256(q.Attest)
	if !ecdsa.Verify(k.key, d[:], new(big.Int).SetBytes(e.SignatureR.Buffer), new(big.Int).SetBytes(e.SignatureS.Buffer)) {
		return errors.New("the quote is signed by another key than the attestation key that was shown")
	}
	a, err := parse(q.Attest)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(a.extra, qualifier):
		return errors.New("the quote is not for this: another nonce, connection, name or key, or an old quote sent again")
	case !a.agrees(q.Values):
		return errors.New("the PCRs that were sent are not those that the TPM has quoted")
	}
	return nil
}

// capped: storaged extends PCR 11 when the volumes are open. What runs from then on, a pod with root that has reached the TPM for one, must not pass for a machine that has just started.
const capped = "if the machine's volumes are open already, restart it before it joins"

// Policy is what a machine must have been started with. Empty fields do not count.
type Policy struct {
	// PCR7 and PCR11 are values, hexadecimal; see package pcrpolicy. PCR 11 is another one as soon as the volumes are open.
	PCR7  string `json:"pcr7,omitempty"`
	PCR11 string `json:"pcr11,omitempty"`
	// ImageKey is the Fingerprint of the key that signs PCR policies of images, hexadecimal: any image that it has signed will do.
	ImageKey string `json:"image_key,omitempty"`
}

// Image is the signed policy that the machine's image brought. It counts only as far as it fits the quote.
type Image struct {
	Key       []byte // PEM
	Policy    pcrpolicy.Digest
	Signature []byte
	Epoch     int
}

// Check says what is not as the policy wants it. The values must be those of a quote that was checked.
func (p Policy) Check(v Values, i Image) error {
	if p.PCR7 != "" && v[0].String() != p.PCR7 {
		return fmt.Errorf("PCR 7 (Secure Boot) is %s; allowed is %s", v[0], p.PCR7)
	}
	if p.PCR11 != "" && v[1].String() != p.PCR11 {
		return fmt.Errorf("PCR 11 (the image) is %s; allowed is %s; "+capped, v[1], p.PCR11)
	}
	if p.PCR11 != "" || p.ImageKey != "" {
		if v[2] != (pcrpolicy.Digest{}) {
			return fmt.Errorf("PCR 12 is %s and must be zeros: something was added to what the image says", v[2])
		}
	}
	if p.ImageKey == "" {
		return nil
	}
	return i.check(p.ImageKey, v[1])
}

// check says whether the image that PCR 11 shows is signed by the key.
func (i Image) check(fingerprint string, pcr11 pcrpolicy.Digest) error {
	if len(i.Key) == 0 {
		return errors.New("the machine was not started with a signed image")
	}
	key, err := pcrpolicy.ParseKey(i.Key)
	if err != nil {
		return fmt.Errorf("the image's key: %w", err)
	}
	if got := pcrpolicy.Fingerprint(key).String(); got != fingerprint {
		return fmt.Errorf("the image is signed with key %s; allowed is %s", got, fingerprint)
	}
	if err := (pcrpolicy.Signature{Fingerprint: pcrpolicy.Fingerprint(key), Policy: i.Policy, Signature: i.Signature}).Verify(key); err != nil {
		return fmt.Errorf("the image's signature: %w", err)
	}
	want, err := pcrpolicy.Policy{PCR11: pcr11, Epoch: i.Epoch}.Digest()
	if err != nil {
		return fmt.Errorf("the image: %w", err)
	}
	if want != i.Policy {
		return fmt.Errorf("PCR 11 is %s, which is not that of the image whose signature was sent; "+capped, pcr11)
	}
	return nil
}

// Vouched says whether one of the authorities (PEM: roots and those between, all of them believed) has signed the certificate of this endorsement key. A TPM's certificate
// has no end that counts: the TPM outlives it.
func Vouched(authorities string, certificate, ek []byte) error {
	if len(certificate) == 0 {
		return errors.New("its TPM has no certificate of its maker")
	}
	if len(certificate) > MaxCertificate {
		return fmt.Errorf("its TPM's certificate has %d bytes; allowed are %d", len(certificate), MaxCertificate)
	}
	c, err := x509.ParseCertificate(certificate)
	if err != nil {
		return errors.New("its TPM's certificate cannot be read")
	}
	if !bytes.Equal(c.RawSubjectPublicKeyInfo, ek) {
		return errors.New("its TPM's certificate is for another endorsement key")
	}
	all, err := ParseAuthorities(authorities)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(a *x509.Certificate) bool {
		return bytes.Equal(a.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(a) == nil
	}) {
		return fmt.Errorf("its TPM's certificate is signed by %.200q, which is none of the authorities that are allowed", c.Issuer)
	}
	return nil
}

// ParseAuthorities reads the certificates of makers of TPMs.
func ParseAuthorities(text string) ([]*x509.Certificate, error) {
	const most = 16
	var out []*x509.Certificate
	for rest := []byte(text); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			if len(bytes.TrimSpace(rest)) > 0 || len(out) == 0 || len(out) > most {
				return nil, fmt.Errorf("%d certificates in PEM, and %d bytes of something else: give 1 to %d, and nothing else", len(out), len(bytes.TrimSpace(rest)), most)
			}
			return out, nil
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("certificate %d (%.100q) is no authority's", len(out)+1, c.Subject)
		}
		out = append(out, c)
	}
}

// TicketLife is how long a machine may take from the challenge to the proof.
const TicketLife = 2 * time.Minute
