// Package attest is how a machine shows a cluster, by its TPM 2.0, which machine it is and what it was started with (trust.v1.Join/Challenge and
// JoinAttested): there is no secret that both have.
//
// The cluster encrypts a secret to the machine's endorsement key such that only the TPM that has that key, and in it the attestation key, can read it
// (TPM2_ActivateCredential); the attestation key signs PCRs together with a hash of the cluster's nonce, the TLS connection and all that the machine asks for
// (TPM2_Quote). Both sides are here, so that there is one definition. Describe and Prove talk to a TPM; the rest is pure.
package attest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

const (
	// Label is that of the TLS exporter (RFC 8446 section 7.5) that ties JoinAttested to one connection; the context is empty.
	Label = "EXPORTER-bulkhead-attest"
	// NonceSize and SecretSize are in bytes: of what the machine must quote, and of what it must decrypt.
	NonceSize, SecretSize = 32, 32

	// MaxKey, MaxCertificate, MaxQuote and MaxImage bound what a stranger can send, in bytes.
	MaxKey, MaxCertificate, MaxQuote, MaxImage = 1 << 10, 8 << 10, 2 << 10, 16 << 10
)

// PCRs are those that are quoted, in this order, of the bank of SHA-256.
var PCRs = [3]uint{pcrpolicy.PCRSecureBoot, pcrpolicy.PCRImage, pcrpolicy.PCRAdded}

// Values are those of PCRs.
type Values [len(PCRs)]pcrpolicy.Digest

// Device is what a machine says of its TPM. Nothing of it is secret.
type Device struct {
	// EK is the endorsement key, SubjectPublicKeyInfo: ECC P-256, of TCG's template.
	EK []byte
	// Certificate is the TPM's maker's word for EK, DER; nil if the TPM has none.
	Certificate []byte
	// AK is the attestation key, TPMT_PUBLIC.
	AK []byte
}

// Quote is the TPM's word for its PCRs.
type Quote struct {
	Attest    []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
	Values    Values
}

// Fingerprint names an endorsement key: the SHA-256 of its SubjectPublicKeyInfo, hexadecimal.
func Fingerprint(ek []byte) string {
	d := sha256.Sum256(ek)
	return hex.EncodeToString(d[:])
}

// ParseDigest reads a SHA-256 as people write it: hexadecimal, in either case, with or without colons, "sha256:" before it or not.
func ParseDigest(text string) (string, error) {
	t := strings.ReplaceAll(strings.TrimPrefix(strings.ToLower(strings.TrimSpace(text)), "sha256:"), ":", "")
	if raw, err := hex.DecodeString(t); err != nil || len(raw) != sha256.Size {
		return "", fmt.Errorf("%.100q is no SHA-256: allowed are %d hexadecimal digits", text, 2*sha256.Size)
	}
	return t, nil
}

// invitation is what an operator's program sends in a join token's place: there is no secret in it, so it does not look like one.
const invitation = "tpm:"

// Invitation is what a node is told that is to join by its TPM: the SHA-256 of the certificate of the cluster's authority for the Bulkhead API, as ParseDigest returns it; several while
// one authority follows another. Who answers for the cluster must have the key of one of them.
func Invitation(cas ...string) string { return invitation + strings.Join(cas, ",") }

// ParseInvitation returns the authorities' digests; false if the text is no invitation, but a token.
func ParseInvitation(text string) ([]string, bool) {
	const most = 8
	rest, ok := strings.CutPrefix(text, invitation)
	cas := strings.Split(rest, ",")
	if !ok || len(cas) > most {
		return nil, false
	}
	for i, c := range cas {
		d, err := ParseDigest(c)
		if err != nil {
			return nil, false
		}
		cas[i] = d
	}
	return cas, true
}

// Qualifier is what a quote must be over, besides the PCRs: the cluster's nonce, the TLS connection, and what the machine asks for.
func Qualifier(nonce, binding []byte, name string, csr, sealKey []byte) []byte {
	return digest("bulkhead attest", nonce, binding, []byte(name), csr, sealKey)
}

// Word is what the cluster's authority signs in return: an answer (a JoinResponse, as bytes) on one TLS connection. It begins with no byte with which a certificate begins.
func Word(binding, answer []byte) []byte { return digest("bulkhead attested join", binding, answer) }

// digest hashes the digests of parts, so that none can run into the next.
func digest(what string, parts ...[]byte) []byte {
	h := sha256.New()
	h.Write([]byte(what + "\x00"))
	for _, p := range parts {
		d := sha256.Sum256(p)
		h.Write(d[:])
	}
	return h.Sum(nil)
}

// akTemplate is the attestation key: restricted, so that it signs nothing that looks like the TPM's word and is none.
var akTemplate = tpm2.TPMTPublic{
	Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Scheme:  tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256})},
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte("bulkhead attest")}}),
}

// errTemplate: a key that was made otherwise.
var errTemplate = errors.New("the attestation key is not made as Bulkhead makes it (ECC P-256, ECDSA with SHA-256, restricted, fixed to its TPM)")
