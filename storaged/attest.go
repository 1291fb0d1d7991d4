package storaged

import (
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// attestationServer lets trustd show which machine this is: storaged has the TPM, and nobody else opens it.
type attestationServer struct {
	storagev1.UnimplementedAttestationServer
	d *Daemon
}

func (s attestationServer) Describe(context.Context, *storagev1.DescribeRequest) (*storagev1.DescribeResponse, error) {
	device, err := s.d.vault.Describe()
	if err != nil {
		return nil, noTPM(err)
	}
	return &storagev1.DescribeResponse{EndorsementKey: device.EK, EndorsementCertificate: device.Certificate, AttestationKey: device.AK}, nil
}

func (s attestationServer) Prove(_ context.Context, r *storagev1.ProveRequest) (*storagev1.ProveResponse, error) {
	if len(r.GetQualifier()) != sha256.Size || len(r.GetCredential()) > attest.MaxKey || len(r.GetEncryptedSecret()) > attest.MaxKey {
		return nil, errs.New(errs.Invalid, "qualifier of %d bytes, credential of %d, encrypted_secret of %d; allowed are %d and at most %d", len(r.GetQualifier()), len(r.GetCredential()), len(r.GetEncryptedSecret()), sha256.Size, attest.MaxKey)
	}
	secret, q, image, err := s.d.vault.Prove(attest.Credential{Blob: r.GetCredential(), Secret: r.GetEncryptedSecret()}, r.GetQualifier())
	if err != nil {
		return nil, noTPM(err)
	}
	out := &storagev1.ProveResponse{Secret: secret, Quote: q.Attest, Signature: q.Signature}
	for _, v := range q.Values {
		out.Pcrs = append(out.Pcrs, v[:])
	}
	if image.Key != nil {
		out.ImageKey, out.ImagePolicy, out.ImageSignature, out.ImageEpoch = image.Key, image.Policy[:], image.Signature, uint32(image.Epoch)
	}
	return out, nil
}

func noTPM(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Precondition, "the machine has no TPM 2.0")
	}
	return errs.New(errs.Precondition, "%w", err)
}
