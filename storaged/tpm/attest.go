package tpm

import "github.com/bulkhead-os/bulkhead/internal/attest"

// Describe returns which TPM it is; see attest.Describe.
func (m *TPM) Describe() (attest.Device, error) { return attest.Describe(m.t) }

// Prove shows it, and what the machine was started with; see attest.Prove.
func (m *TPM) Prove(c attest.Credential, qualifier []byte) ([]byte, attest.Quote, error) {
	return attest.Prove(m.t, c, qualifier)
}
