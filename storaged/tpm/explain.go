package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// Cause is what is not as it was when the key was sealed.
type Cause string

// The causes there are.
const (
	CauseNoPolicy   Cause = "no-policy"   // the image brought no signed policy
	CauseTPM        Cause = "tpm"         // another TPM, or this one was cleared
	CauseKey        Cause = "pcr-key"     // the image's policy is signed by somebody else
	CauseSignature  Cause = "signature"   // or by nobody
	CauseIndex      Cause = "index"       // the epoch's index is gone or another one
	CauseEpoch      Cause = "epoch"       // the TPM has seen a newer epoch
	CauseAdded      Cause = "added"       // PCR 12: something was added to the image's command line
	CauseImage      Cause = "image"       // PCR 11: another image than the signed one, or it was capped
	CauseSecureBoot Cause = "secure-boot" // PCR 7: the firmware's keys, or Secure Boot is on or off
)

// Refusal is why a TPM does not give a key. It is for people; the TPM alone has decided.
type Refusal struct {
	Cause Cause
	Text  string
	err   error // the TPM's own
}

func (r *Refusal) Error() string { return r.Text }
func (r *Refusal) Unwrap() error { return r.err }

func refusal(c Cause, format string, args ...any) *Refusal {
	return &Refusal{Cause: c, Text: fmt.Sprintf(format, args...)}
}

// Explain compares what is with what was when the key was sealed, and returns the first difference, the most fundamental one first;
// nil if it finds none. It asks the TPM for nothing that needs a right.
func (m *TPM) Explain(s Sealed, image Image, log []byte) *Refusal {
	srk, err := m.srk()
	switch {
	case errors.Is(err, errNoSRK):
		return refusal(CauseTPM, "the TPM was cleared or exchanged: it has no storage root key")
	case err != nil:
		return refusal(CauseTPM, "%v", err)
	case !bytes.Equal(srk.name.Buffer, s.SRK):
		return refusal(CauseTPM, "the TPM was cleared or exchanged: its storage root key is another one")
	case image.Key == nil:
		return refusal(CauseNoPolicy, "the machine was not started with a signed image: there is no signed PCR policy")
	case pcrpolicy.Fingerprint(image.Key) != s.Key:
		f := pcrpolicy.Fingerprint(image.Key)
		return refusal(CauseKey, "the image's PCR policy is signed with another key, %x…; the disk wants %x…", f[:6], s.Key[:6])
	}
	if err := image.Signature.Verify(image.Key); err != nil {
		return refusal(CauseSignature, "the signature of the image's PCR policy is wrong: %v", err)
	}
	epoch, err := m.Epoch()
	if err != nil {
		return refusal(CauseIndex, "%v; the TPM was cleared, or its owner's authorisation is known to others", err)
	}
	if epoch > image.Epoch {
		return refusal(CauseEpoch, "the image is of epoch %d, and this machine has run one of epoch %d: start a newer image", image.Epoch, epoch)
	}
	if pcr12, err := m.PCR(pcrpolicy.PCRAdded); err == nil && pcr12 != (pcrpolicy.Digest{}) {
		return refusal(CauseAdded, "something was added to the image's command line, or files to its EFI partition (PCR %d is %x…): look at SMBIOS strings of the machine and at *.cred and *.addon.efi files",
			pcrpolicy.PCRAdded, pcr12[:6])
	}
	pcr11, err := m.PCR(pcrpolicy.PCRImage)
	if err != nil {
		return nil
	}
	if d, err := (pcrpolicy.Policy{PCR11: pcr11, Epoch: image.Epoch}).Digest(); err != nil || d != image.Signature.Policy {
		return refusal(CauseImage, "PCR %d is %x…, which is not what the image's maker has signed for epoch %d: the image or its command line was changed, or it was capped already",
			pcrpolicy.PCRImage, pcr11[:6], image.Epoch)
	}
	pcr7, err := m.PCR(pcrpolicy.PCRSecureBoot)
	if err == nil && pcr7 != s.PCR7 {
		return refusal(CauseSecureBoot, "Secure Boot is not as it was (PCR %d is %x…, was %x…): %s", pcrpolicy.PCRSecureBoot, pcr7[:6], s.PCR7[:6], difference(s, log, pcr7))
	}
	return nil
}

// difference says in words what made PCR 7 another one.
func difference(s Sealed, log []byte, pcr7 pcrpolicy.Digest) string {
	events, err := Events(log, pcrpolicy.PCRSecureBoot)
	switch {
	case err != nil:
		return "the firmware's log cannot be read: " + err.Error()
	case len(s.Events) == 0:
		return "what it was made of then is not known"
	case Replay(events) != pcr7:
		return "the firmware's log does not tell all"
	}
	return Compare(s.Events, events)
}
