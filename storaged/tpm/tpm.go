// Package tpm keeps a disk's key such that only this machine, started with an image that its maker has signed, gets it back.
//
// The policy is that of package pcrpolicy. Besides, the package reads PCRs, raises the epoch below which no image opens anything any
// more, caps PCR 11 so that nothing that runs later can do what was done before, and says in words what is another than when the key
// was sealed. It trusts the TPM and nothing that comes from a disk.
package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

// Transport passes a command to a TPM and returns its answer.
type Transport interface {
	Send(command []byte) ([]byte, error)
	io.Closer
}

// TPM is one TPM 2.0. It is for one goroutine at a time.
type TPM struct{ t Transport }

// New uses a transport, which Close closes.
func New(t Transport) *TPM { return &TPM{t} }

// Open opens the kernel's node with resource manager, /dev/tpmrm0. An error that is os.ErrNotExist says that there is no TPM.
func Open(path string) (*TPM, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return New(device(fd)), nil
}

// Close lets go of the TPM.
func (m *TPM) Close() error { return m.t.Close() }

// device is a descriptor of the kernel's node, one write for each command and one read for its answer. It is read without Go's
// poller: the node says that it can be read before it has an answer.
type device int

func (d device) Send(command []byte) ([]byte, error) {
	if _, err := unix.Write(int(d), command); err != nil {
		return nil, err
	}
	answer := make([]byte, 4096)
	n, err := unix.Read(int(d), answer)
	if err != nil {
		return nil, err
	}
	return answer[:n], nil
}

func (d device) Close() error { return unix.Close(int(d)) }

const (
	// srkHandle is where the storage root key is kept, by TCG's registry of handles: others use it too.
	srkHandle = tpm2.TPMHandle(0x81000001)
	// permanent is TPM_PT_PERMANENT, ownerAuthSet its first bit.
	permanent    = 0x200
	ownerAuthSet = 1
)

// capDigest is extended into PCR 11 by Cap.
var capDigest = pcrpolicy.Extend(pcrpolicy.Digest{}, pcrpolicy.Digest([]byte("bulkhead: the volumes are open. ")))

func selection(pcrs ...uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}}}
}

// PCR reads one PCR of the SHA-256 bank.
func (m *TPM) PCR(n uint) (pcrpolicy.Digest, error) {
	r, err := tpm2.PCRRead{PCRSelectionIn: selection(n)}.Execute(m.t)
	if err != nil {
		return pcrpolicy.Digest{}, fmt.Errorf("read PCR %d: %w", n, err)
	}
	if len(r.PCRValues.Digests) != 1 || len(r.PCRValues.Digests[0].Buffer) != len(pcrpolicy.Digest{}) {
		return pcrpolicy.Digest{}, fmt.Errorf("read PCR %d: the TPM has no bank of SHA-256", n)
	}
	return pcrpolicy.Digest(r.PCRValues.Digests[0].Buffer), nil
}

// Cap extends PCR 11: until the machine restarts no key opens by it any more.
func (m *TPM) Cap() error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcrpolicy.PCRImage), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: capDigest[:]}}},
	}.Execute(m.t)
	if err != nil {
		return fmt.Errorf("cap PCR %d: %w", pcrpolicy.PCRImage, err)
	}
	return nil
}

// OwnerSet reports whether the owner's authorisation is set.
func (m *TPM) OwnerSet() (bool, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: permanent, PropertyCount: 1}.Execute(m.t)
	if err != nil {
		return false, fmt.Errorf("ask the TPM: %w", err)
	}
	p, err := r.CapabilityData.Data.TPMProperties()
	if err != nil || len(p.TPMProperty) < 1 || p.TPMProperty[0].Property != permanent {
		return false, errors.New("ask the TPM: it does not say whether it has an owner")
	}
	return p.TPMProperty[0].Value&ownerAuthSet != 0, nil
}

// TakeOwnership sets the owner's authorisation, so that nobody can take the epoch's index away and make it anew. The authorisation must be
// on disk before: it is needed nowhere in daily life, but nobody can guess it.
func (m *TPM) TakeOwnership(auth secret.Bytes) error {
	srk, err := m.srk()
	if err != nil {
		return err
	}
	// The session only encrypts: as the owner's own it would be checked with the new authorisation, which go-tpm does not know.
	_, err = tpm2.HierarchyChangeAuth{AuthHandle: owner(), NewAuth: tpm2.TPM2BAuth{Buffer: auth.Expose()}}.Execute(m.t, srk.session(encryptIn))
	if err != nil {
		return fmt.Errorf("set the TPM owner's authorisation: %w", err)
	}
	return nil
}

// GiveUpOwnership empties the owner's authorisation, as it is in a new TPM. The authorisation that was goes over the wires in the clear: it is void
// afterwards. Index and storage root key stay as they are.
func (m *TPM) GiveUpOwnership(auth secret.Bytes) error {
	_, err := tpm2.HierarchyChangeAuth{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(auth.Expose())}}.Execute(m.t)
	if err != nil {
		return ownerError("empty the TPM owner's authorisation", err)
	}
	return nil
}

// key is a key in the TPM under which others lie.
type key struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// What goes to the TPM, or comes from it, is encrypted on the wires.
var (
	encryptIn  = tpm2.AESEncryption(128, tpm2.EncryptIn)
	encryptOut = tpm2.AESEncryption(128, tpm2.EncryptOut)
)

// session is for authorisations; the key salts it, so that only this TPM can take part.
func (k key) session(options ...tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, append(options, tpm2.Salted(k.handle, k.public))...)
}

// errNoSRK: the TPM has no storage root key where it must be.
var errNoSRK = errors.New("the TPM has no storage root key")

// srk returns the storage root key. It is believed only if it cannot have come from outside of this TPM.
func (m *TPM) srk() (key, error) {
	r, err := tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(m.t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return key{}, errNoSRK
	} else if err != nil {
		return key{}, fmt.Errorf("read the TPM's storage root key: %w", err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		return key{}, fmt.Errorf("read the TPM's storage root key: %w", err)
	}
	a := public.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return key{}, fmt.Errorf("the TPM's key %#x is no storage root key: clear the TPM in the firmware's setup", uint32(srkHandle))
	}
	return key{srkHandle, r.Name, *public}, nil
}

// Prepare makes what sealing needs and is not there yet: the storage root key and the index of the epoch. It may be repeated.
func (m *TPM) Prepare() error {
	if _, err := m.srk(); errors.Is(err, errNoSRK) {
		if err := m.makeSRK(); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	return m.makeIndex()
}

func owner() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
}

// ownerError explains the error of a command that needs the owner's authorisation, which is empty in a new TPM.
func ownerError(what string, err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%s: the TPM belongs to another system: clear it in the firmware's setup (%w)", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func (m *TPM) makeSRK() error {
	r, err := tpm2.CreatePrimary{PrimaryHandle: owner(), InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(m.t)
	if err != nil {
		return ownerError("make the TPM's storage root key", err)
	}
	_, err = tpm2.EvictControl{Auth: owner(), ObjectHandle: &tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: srkHandle}.Execute(m.t)
	if err = errors.Join(err, m.flush(r.ObjectHandle)); err != nil {
		return ownerError("keep the TPM's storage root key", err)
	}
	return nil
}

func (m *TPM) flush(h tpm2.TPMHandle) error {
	_, err := tpm2.FlushContext{FlushHandle: h}.Execute(m.t)
	return err
}

var be = binary.BigEndian
