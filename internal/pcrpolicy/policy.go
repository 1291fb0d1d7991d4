package pcrpolicy

import (
	"crypto/rsa"
	"fmt"
)

// Numbers from TPM 2.0, part 2: Structures.
const (
	algRSA, algNull, algRSASSA, algSHA256 = 0x0001, 0x0010, 0x0014, 0x000b

	ccPolicyNV, ccPolicyAuthorize, ccPolicyPCR = 0x149, 0x16a, 0x17f

	// CompareLE is TPM_EO_UNSIGNED_LE: TPM2_PolicyNV wants the index to be at most the operand.
	CompareLE = 0x0009
)

// The TPM's index of the epoch: 64 bits, of which each can be set by everybody and cleared by nobody. In epoch n the lowest n
// are set, so that as a number it only grows.
const (
	// Index is its handle, from the range that the owner of a machine may use (TCG's registry of handles: 01800000 to 01BFFFFF).
	Index = 0x01800b1d
	// IndexSize is in bytes.
	IndexSize = 8
	// IndexAttributes are what the index is made with: AUTHWRITE (2), type BITS (2 << 4), AUTHREAD (18), NO_DA (25). The
	// authorisation is empty: reading and raising the epoch is no secret.
	IndexAttributes = 1<<2 | 2<<4 | 1<<18 | 1<<25
	// IndexWritten (29) is added by the TPM at the first write, even one that sets no bit.
	IndexWritten = 1 << 29
)

// MaxEpoch is the last epoch there can be; the first is 1.
const MaxEpoch = 63

// EpochBits is what the index holds, at most, while images of an epoch may start. An epoch out of 1 to MaxEpoch is an error.
func EpochBits(epoch int) (uint64, error) {
	if epoch < 1 || epoch > MaxEpoch {
		return 0, fmt.Errorf("epoch %d is not within 1 to %d", epoch, MaxEpoch)
	}
	return 1<<epoch - 1, nil
}

// IndexPublic returns the index' public area (TPMS_NV_PUBLIC) once it was written to, as the TPM sends it.
func IndexPublic() []byte {
	b := be.AppendUint32(nil, Index)
	b = be.AppendUint16(b, algSHA256)
	b = be.AppendUint32(b, IndexAttributes|IndexWritten)
	b = be.AppendUint16(b, 0) // no policy of its own
	return be.AppendUint16(b, IndexSize)
}

// IndexName returns the index' Name, which is in every signed policy: an index made otherwise, even at the same place, is another one.
func IndexName() []byte { return name(IndexPublic()) }

// name is the Name of a thing with this public area.
func name(public []byte) []byte {
	d := hash(public)
	return append(be.AppendUint16(nil, algSHA256), d[:]...)
}

// Policy is what is signed about an image.
type Policy struct {
	PCR11 Digest // of PredictPCR11
	Epoch int    // the image's, 1 to MaxEpoch
}

// Digest returns the policy's digest: PolicyPCR of PCR 11, PolicyPCR of PCR 12 as zeros, then PolicyNV of the epoch's index.
func (p Policy) Digest() (Digest, error) {
	bits, err := EpochBits(p.Epoch)
	if err != nil {
		return Digest{}, err
	}
	args := be.AppendUint64(nil, bits)
	args = be.AppendUint16(args, 0) // offset
	args = be.AppendUint16(args, CompareLE)
	nv := hash(args)
	d := policyPCR(policyPCR(Digest{}, PCRImage, p.PCR11), PCRAdded, Digest{})
	return hash(d[:], be.AppendUint32(nil, ccPolicyNV), nv[:], IndexName()), nil
}

// policyPCR extends a policy by one PCR's value in the bank of SHA-256.
func policyPCR(policy Digest, pcr int, value Digest) Digest {
	selection := be.AppendUint32(nil, 1) // one bank
	selection = be.AppendUint16(selection, algSHA256)
	bits := make([]byte, 4)
	bits[0] = 3 // bytes of PCRs, as every PC's TPM has them
	bits[1+pcr/8] = 1 << (pcr % 8)
	values := hash(value[:])
	return hash(policy[:], be.AppendUint32(nil, ccPolicyPCR), append(selection, bits...), values[:])
}

// Seal returns the policy that a disk's key is sealed with: any Policy that the key has signed, and PCR 7 as it is.
func Seal(key *rsa.PublicKey, pcr7 Digest) Digest {
	// PolicyAuthorize starts from nothing: what was asked for before is what is signed.
	d := hash(make([]byte, len(Digest{})), be.AppendUint32(nil, ccPolicyAuthorize), KeyName(key))
	d = hash(d[:]) // policyRef, which is empty
	return policyPCR(d, PCRSecureBoot, pcr7)
}

// KeyPublic returns the public area (TPMT_PUBLIC) under which a TPM must load the key, so that its Name is KeyName.
func KeyPublic(key *rsa.PublicKey) []byte {
	const signEncrypt, userWithAuth = 1 << 18, 1 << 6
	b := be.AppendUint16(nil, algRSA)
	b = be.AppendUint16(b, algSHA256)
	b = be.AppendUint32(b, signEncrypt|userWithAuth)
	b = be.AppendUint16(b, 0)       // no policy
	b = be.AppendUint16(b, algNull) // no symmetric algorithm
	b = be.AppendUint16(b, algRSASSA)
	b = be.AppendUint16(b, algSHA256)
	b = be.AppendUint16(b, uint16(key.N.BitLen()))
	b = be.AppendUint32(b, 0) // the usual exponent, 65537: ParseKey takes no other
	n := key.N.Bytes()
	return append(be.AppendUint16(b, uint16(len(n))), n...)
}

// KeyName returns the Name of a key that signs policies.
func KeyName(key *rsa.PublicKey) []byte { return name(KeyPublic(key)) }
