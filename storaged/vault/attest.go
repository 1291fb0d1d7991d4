package vault

import (
	"github.com/bulkhead-os/bulkhead/internal/attest"
	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// Describe returns which TPM the machine has. os.ErrNotExist: it has none.
func (v *Vault) Describe() (attest.Device, error) {
	t, err := v.cfg.TPM()
	if err != nil {
		return attest.Device{}, err
	}
	defer t.Close()
	return t.Describe()
}

// Prove has the TPM answer a cluster's challenge, and returns what the image brought with it; that is empty if it is not signed. os.ErrNotExist: there is no TPM.
func (v *Vault) Prove(c attest.Credential, qualifier []byte) ([]byte, attest.Quote, attest.Image, error) {
	t, err := v.cfg.TPM()
	if err != nil {
		return nil, attest.Quote{}, attest.Image{}, err
	}
	defer t.Close()
	secret, q, err := t.Prove(c, qualifier)
	if err != nil || v.image.Key == nil {
		return secret, q, attest.Image{}, err
	}
	key, err := pcrpolicy.EncodeKey(v.image.Key)
	return secret, q, attest.Image{Key: key, Policy: v.image.Signature.Policy, Signature: v.image.Signature.Signature, Epoch: v.image.Epoch}, err
}
