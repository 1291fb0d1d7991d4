package tpm

import (
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Sealed is a key as only its TPM can read it, and what was true when it was sealed. All of it may stand on a disk in the open.
type Sealed struct {
	Public  []byte           `json:"public"`  // TPM2B_PUBLIC
	Private []byte           `json:"private"` // TPM2B_PRIVATE
	SRK     []byte           `json:"srk"`     // Name of the storage root key
	Key     pcrpolicy.Digest `json:"pcr_key"` // Fingerprint of the key that signs PCR policies
	PCR7    pcrpolicy.Digest `json:"pcr7"`
	Events  []Event          `json:"events,omitempty"` // that made PCR 7, to say later what changed
}

// Image is what is known of the running image: only /.extra's two files and the kernel's command line, none of them trusted.
type Image struct {
	Key       *rsa.PublicKey
	Signature pcrpolicy.Signature
	Epoch     int
}

const (
	// maxBlob is more than a sealed key of 128 bytes takes.
	maxBlob = 1 << 10
	// changedTries is how often unsealing begins anew because some PCR was extended while it went on. With Secure Boot the kernel measures each
	// module that it loads into PCR 10, and modules are loaded for many seconds while the machine starts.
	changedTries = 500
)

// Seal seals a key of at most 128 bytes for images that the key has signed, and PCR 7 as it is now. Prepare must have been called.
// events are those of PCR 7 in the firmware's log, for Explain; they may be missing.
func (m *TPM) Seal(key secret.Bytes, signer *rsa.PublicKey, events []Event) (Sealed, error) {
	srk, err := m.srk()
	if err != nil {
		return Sealed{}, err
	}
	pcr7, err := m.PCR(pcrpolicy.PCRSecureBoot)
	if err != nil {
		return Sealed{}, err
	}
	policy := pcrpolicy.Seal(signer, pcr7)
	r, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: srk.handle, Name: srk.name, Auth: srk.session(encryptIn)},
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: key.Expose()})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: tpm2.TPM2BDigest{Buffer: policy[:]},
			// Not userWithAuth: the policy is the only way. noDA: who makes wrong guesses about other objects must not lock us out.
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		}),
	}.Execute(m.t)
	if err != nil {
		return Sealed{}, fmt.Errorf("seal a key: %w", err)
	}
	return Sealed{
		Public: tpm2.Marshal(r.OutPublic), Private: tpm2.Marshal(r.OutPrivate), SRK: srk.name.Buffer, Key: pcrpolicy.Fingerprint(signer), PCR7: pcr7, Events: events,
	}, nil
}

// Unseal returns the key. If the TPM refuses, the error is a *Refusal that says what is not as it must be; log is the firmware's, for the words.
func (m *TPM) Unseal(s Sealed, image Image, log []byte) (secret.Bytes, error) {
	key, err := m.unseal(s, image)
	if err == nil {
		return key, nil
	}
	if why := m.Explain(s, image, log); why != nil {
		why.err = err
		return secret.Bytes{}, why
	}
	return secret.Bytes{}, err
}

func (m *TPM) unseal(s Sealed, image Image) (secret.Bytes, error) {
	if image.Key == nil {
		return secret.Bytes{}, errors.New("the image has no signed PCR policy")
	}
	if len(s.Public) > maxBlob || len(s.Private) > maxBlob {
		return secret.Bytes{}, errors.New("the sealed key is too long")
	}
	srk, err := m.srk()
	if err != nil {
		return secret.Bytes{}, err
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](s.Public)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("the sealed key cannot be read: %w", err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](s.Private)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("the sealed key cannot be read: %w", err)
	}
	item, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: srk.handle, Name: srk.name, Auth: tpm2.PasswordAuth(nil)}, InPrivate: *private, InPublic: *public,
	}.Execute(m.t)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("load the sealed key: %w", err)
	}
	defer m.flush(item.ObjectHandle) // if not, the resource manager does it
	ticket, err := image.verify(m.t)
	if err != nil {
		return secret.Bytes{}, err
	}
	for range changedTries {
		key, err := m.open(srk, tpm2.NamedHandle{Handle: item.ObjectHandle, Name: item.Name}, image, ticket)
		if !errors.Is(err, tpm2.TPMRCPCRChanged) {
			return key, err
		}
	}
	return secret.Bytes{}, fmt.Errorf("unseal the key: other PCRs changed each time: %w", tpm2.TPMRCPCRChanged)
}

// open goes through the policy and takes the key out. No PCR may change meanwhile, so nothing is in here that could be before it.
func (m *TPM) open(srk key, item tpm2.NamedHandle, image Image, ticket verified) (secret.Bytes, error) {
	// Not tpm2.Policy with a callback: it leaves the session in the TPM if that fails.
	policy, end, err := tpm2.PolicySession(m.t, tpm2.TPMAlgSHA256, 16, encryptOut, tpm2.Salted(srk.handle, srk.public))
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("start a session with the TPM: %w", err)
	}
	defer end() // if not, the resource manager does it
	if err := image.satisfy(m.t, policy.Handle(), ticket); err != nil {
		return secret.Bytes{}, err
	}
	r, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: item.Handle, Name: item.Name, Auth: policy}}.Execute(m.t)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("unseal the key: %w", err)
	}
	return secret.From(r.OutData.Buffer), nil
}

// verified is a TPM's word that a signature is right.
type verified struct {
	key    tpm2.TPM2BName
	ticket tpm2.TPMTTKVerified
}

// verify lets the TPM verify the signature of the policy.
func (i Image) verify(t transport.TPM) (verified, error) {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](pcrpolicy.KeyPublic(i.Key))
	if err != nil {
		return verified{}, err
	}
	key, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHOwner}.Execute(t)
	if err != nil {
		return verified{}, fmt.Errorf("load the key of the PCR policy: %w", err)
	}
	defer tpm2.FlushContext{FlushHandle: key.ObjectHandle}.Execute(t) // if not, the resource manager does it
	hashed := sha256.Sum256(i.Signature.Policy[:])
	r, err := tpm2.VerifySignature{
		KeyHandle: key.ObjectHandle, Digest: tpm2.TPM2BDigest{Buffer: hashed[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{
			Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: i.Signature.Signature},
		})},
	}.Execute(t)
	if err != nil {
		return verified{}, fmt.Errorf("verify the PCR policy's signature: %w", err)
	}
	return verified{key.Name, r.Validation}, nil
}

// satisfy goes through the policy of package pcrpolicy in a session.
func (i Image) satisfy(t transport.TPM, session tpm2.TPMISHPolicy, signature verified) error {
	bits, err := pcrpolicy.EpochBits(i.Epoch)
	if err != nil {
		return err
	}
	for _, pcr := range []uint{pcrpolicy.PCRImage, pcrpolicy.PCRAdded} {
		if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(pcr)}).Execute(t); err != nil {
			return fmt.Errorf("policy of PCR %d: %w", pcr, err)
		}
	}
	if _, err := (tpm2.PolicyNV{
		AuthHandle: index(), NVIndex: indexNamed(), PolicySession: session,
		OperandB: tpm2.TPM2BOperand{Buffer: be.AppendUint64(nil, bits)}, Operation: pcrpolicy.CompareLE,
	}).Execute(t); err != nil {
		return fmt.Errorf("policy of the epoch: %w", err)
	}
	if _, err := (tpm2.PolicyAuthorize{
		PolicySession: session, ApprovedPolicy: tpm2.TPM2BDigest{Buffer: i.Signature.Policy[:]}, KeySign: signature.key, CheckTicket: signature.ticket,
	}).Execute(t); err != nil {
		return fmt.Errorf("the signed PCR policy is not what the TPM finds: %w", err)
	}
	if _, err := (tpm2.PolicyPCR{PolicySession: session, Pcrs: selection(pcrpolicy.PCRSecureBoot)}).Execute(t); err != nil {
		return fmt.Errorf("policy of PCR %d: %w", pcrpolicy.PCRSecureBoot, err)
	}
	return nil
}
