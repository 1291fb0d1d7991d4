package attest

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

const (
	// ekCertificate is where makers of TPMs put the certificate of the ECC P-256 endorsement key (TCG EK Credential Profile, 2.2.1.4).
	ekCertificate = tpm2.TPMHandle(0x01c0000a)
	// nvChunk is in bytes; every TPM reads as many at once.
	nvChunk = 512
	// quoteTries is how often a quote is made anew because a PCR was extended after it was read.
	quoteTries = 16
)

// loaded is a key in the TPM, until flush.
type loaded struct {
	*tpm2.CreatePrimaryResponse
	t transport.TPM
}

func (l loaded) flush() { _, _ = tpm2.FlushContext{FlushHandle: l.ObjectHandle}.Execute(l.t) } // if not, the resource manager does it

// primary makes a key of the endorsement hierarchy: the same one each time, as long as the TPM's owner does not have it draw another seed.
func primary(t transport.TPM, what string, template tpm2.TPMTPublic) (loaded, *tpm2.TPMTPublic, error) {
	r, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template),
	}.Execute(t)
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		err = fmt.Errorf("the TPM's endorsement hierarchy has another system's authorisation: clear the TPM in the firmware's setup (%w)", err)
	}
	if err != nil {
		return loaded{}, nil, fmt.Errorf("make the TPM's %s key: %w", what, err)
	}
	l := loaded{r, t}
	public, err := r.OutPublic.Contents()
	if err != nil {
		l.flush()
		return loaded{}, nil, fmt.Errorf("the TPM's %s key: %w", what, err)
	}
	return l, public, nil
}

// Describe returns which TPM it is. It changes nothing that lasts.
func Describe(t transport.TPM) (Device, error) {
	ek, public, err := primary(t, "endorsement", tpm2.ECCEKTemplate)
	if err != nil {
		return Device{}, err
	}
	ek.flush()
	key, err := tpm2.Pub(*public)
	if err != nil {
		return Device{}, fmt.Errorf("the TPM's endorsement key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return Device{}, fmt.Errorf("the TPM's endorsement key: %w", err)
	}
	ak, public, err := primary(t, "attestation", akTemplate)
	if err != nil {
		return Device{}, err
	}
	ak.flush()
	cert, err := certificate(t)
	return Device{EK: spki, Certificate: cert, AK: tpm2.Marshal(*public)}, err
}

// certificate reads the endorsement key's; nil if there is none.
func certificate(t transport.TPM) ([]byte, error) {
	r, err := tpm2.NVReadPublic{NVIndex: ekCertificate}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("the endorsement key's certificate: %w", err)
	}
	public, err := r.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("the endorsement key's certificate: %w", err)
	}
	if public.DataSize > MaxCertificate {
		return nil, fmt.Errorf("the endorsement key's certificate has %d bytes; allowed are %d", public.DataSize, MaxCertificate)
	}
	var data []byte
	for len(data) < int(public.DataSize) {
		r, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: ekCertificate, Name: r.NVName, Auth: tpm2.PasswordAuth(nil)}, NVIndex: tpm2.NamedHandle{Handle: ekCertificate, Name: r.NVName},
			Size: min(nvChunk, public.DataSize-uint16(len(data))), Offset: uint16(len(data)),
		}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("the endorsement key's certificate: %w", err)
		}
		if len(r.Data.Buffer) == 0 {
			return nil, errors.New("the endorsement key's certificate: the TPM returns nothing")
		}
		data = append(data, r.Data.Buffer...)
	}
	var whole asn1.RawValue // some makers fill the rest of the index up
	if _, err := asn1.Unmarshal(data, &whole); err != nil {
		return nil, fmt.Errorf("the endorsement key's certificate: %w", err)
	}
	return whole.FullBytes, nil
}

// Prove decrypts what Challenge made for this TPM, and quotes the PCRs over a qualifier.
func Prove(t transport.TPM, c Credential, qualifier []byte) ([]byte, Quote, error) {
	ak, _, err := primary(t, "attestation", akTemplate)
	if err != nil {
		return nil, Quote{}, err
	}
	defer ak.flush()
	secret, err := activate(t, ak, c)
	if err != nil {
		return nil, Quote{}, err
	}
	for range quoteTries {
		q, err := quote(t, ak, qualifier)
		if err != nil {
			return nil, Quote{}, err
		}
		if attested, err := parse(q.Attest); err == nil && attested.agrees(q.Values) {
			return secret, q, nil
		}
	}
	return nil, Quote{}, errors.New("quote PCRs: they change all the time")
}

func activate(t transport.TPM, ak loaded, c Credential) ([]byte, error) {
	ek, _, err := primary(t, "endorsement", tpm2.ECCEKTemplate)
	if err != nil {
		return nil, err
	}
	defer ek.flush()
	policy, end, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return nil, fmt.Errorf("start a session with the TPM: %w", err)
	}
	defer end() // if not, the resource manager does it
	if _, err := (tpm2.PolicySecret{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, PolicySession: policy.Handle(), NonceTPM: policy.NonceTPM(),
	}).Execute(t); err != nil {
		return nil, fmt.Errorf("use the TPM's endorsement key: %w", err)
	}
	r, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle:      tpm2.AuthHandle{Handle: ek.ObjectHandle, Name: ek.Name, Auth: policy},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Blob}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("the TPM does not decrypt the cluster's challenge, which is for another TPM or another key: %w", err)
	}
	return r.CertInfo.Buffer, nil
}

func quote(t transport.TPM, ak loaded, qualifier []byte) (Quote, error) {
	read, err := tpm2.PCRRead{PCRSelectionIn: selection()}.Execute(t)
	if err != nil {
		return Quote{}, fmt.Errorf("read PCRs: %w", err)
	}
	var q Quote
	if len(read.PCRValues.Digests) != len(q.Values) {
		return Quote{}, errors.New("read PCRs: the TPM has no bank of SHA-256")
	}
	for i, d := range read.PCRValues.Digests {
		if len(d.Buffer) != len(q.Values[i]) {
			return Quote{}, errors.New("read PCRs: the TPM has no bank of SHA-256")
		}
		q.Values[i] = pcrpolicy.Digest(d.Buffer)
	}
	r, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: qualifier}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selection(),
	}.Execute(t)
	if err != nil {
		return Quote{}, fmt.Errorf("quote PCRs: %w", err)
	}
	q.Attest, q.Signature = r.Quoted.Bytes(), tpm2.Marshal(r.Signature)
	return q, nil
}

func selection() tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(PCRs[:]...)}}}
}
