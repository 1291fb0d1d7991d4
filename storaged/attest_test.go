package storaged

import (
	"bytes"
	"crypto/rand"
	"os"
	"strings"
	"testing"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testtpm"
	"github.com/bulkhead-os/bulkhead/internal/uid"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// trustd, and nobody else, has the TPM show which machine this is.
func TestAttestation(t *testing.T) {
	soft, dir := testtpm.Start(t), t.TempDir()
	v := vault.New(vault.Config{
		Mapper: func() (vault.Mapper, error) { return nil, os.ErrNotExist }, TPM: func() (*tpm.TPM, error) { return tpm.New(soft), nil },
		Boot: dir, Key: dir + "/none", Cmdline: "/proc/cmdline", Runtime: dir, Firmware: dir, Blocks: dir, Dev: dir,
	})
	k := &fake{m: machine(imageDisk("/dev/vda", 8*gib))}
	c := storagev1.NewAttestationClient(serveKernel(t, k, v, t.TempDir(), who(uid.Trustd)))
	d, err := c.Describe(t.Context(), &storagev1.DescribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	ak, err := attest.ParseAK(d.GetAttestationKey())
	if err != nil {
		t.Fatal(err)
	}
	secret, cred, err := attest.Challenge(rand.Reader, d.GetEndorsementKey(), ak)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, 32)
	p, err := c.Prove(t.Context(), &storagev1.ProveRequest{Credential: cred.Blob, EncryptedSecret: cred.Secret, Qualifier: want})
	if err != nil {
		t.Fatal(err)
	}
	q := attest.Quote{Attest: p.GetQuote(), Signature: p.GetSignature()}
	for i, v := range p.GetPcrs() {
		q.Values[i] = pcrpolicy.Digest(v)
	}
	if err := ak.Check(q, want); err != nil || !bytes.Equal(p.GetSecret(), secret) || p.GetImageKey() != nil {
		t.Errorf("%v, %v", err, p)
	}
	for name, c := range map[string]struct {
		c    storagev1.AttestationClient
		r    *storagev1.ProveRequest
		kind errs.Kind
		err  string
	}{
		"a qualifier that is too short": {c, &storagev1.ProveRequest{Credential: cred.Blob, EncryptedSecret: cred.Secret, Qualifier: want[:31]}, errs.Invalid, "qualifier of 31 bytes"},
		"nothing to decrypt":            {c, &storagev1.ProveRequest{Qualifier: want}, errs.Precondition, "another TPM or another key"},
		"another daemon": {storagev1.NewAttestationClient(serveKernel(t, k, v, t.TempDir(), who(uid.Updated))),
			&storagev1.ProveRequest{Credential: cred.Blob, EncryptedSecret: cred.Secret, Qualifier: want}, errs.Denied, ""},
		"no TPM": {storagev1.NewAttestationClient(serveKernel(t, k, noVault(t.TempDir()), t.TempDir(), who(uid.Trustd))),
			&storagev1.ProveRequest{Qualifier: want}, errs.Precondition, "the machine has no TPM 2.0"},
	} {
		if _, err := c.c.Prove(t.Context(), c.r); !errs.Is(err, c.kind) || !strings.Contains(errs.Text(err), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
