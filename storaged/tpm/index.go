package tpm

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"

	"github.com/google/go-tpm/tpm2"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

const indexHandle = tpm2.TPMHandle(pcrpolicy.Index)

// ErrNoIndex: nothing was ever sealed to this TPM, or it was cleared since.
var ErrNoIndex = errors.New("the TPM has no index of the epoch")

var (
	errOtherIndex = errors.New("the TPM's index of the epoch was made by somebody else")
)

// index is the index as an authorisation handle; its authorisation is empty.
func index() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: indexHandle, Name: tpm2.TPM2BName{Buffer: pcrpolicy.IndexName()}, Auth: tpm2.PasswordAuth(nil)}
}

func indexNamed() tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: indexHandle, Name: tpm2.TPM2BName{Buffer: pcrpolicy.IndexName()}}
}

// checkIndex wants the index to be there, and to be the one that signed policies name.
func (m *TPM) checkIndex() error {
	r, err := tpm2.NVReadPublic{NVIndex: indexHandle}.Execute(m.t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return ErrNoIndex
	} else if err != nil {
		return fmt.Errorf("read the TPM's index of the epoch: %w", err)
	}
	if !bytes.Equal(r.NVName.Buffer, pcrpolicy.IndexName()) {
		return errOtherIndex
	}
	return nil
}

// makeIndex defines the index and writes to it once. An index that was defined but not written is what a power cut in between leaves.
func (m *TPM) makeIndex() error {
	err := m.checkIndex()
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrNoIndex) {
		_, err := tpm2.NVDefineSpace{AuthHandle: owner(), PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: indexHandle, NameAlg: tpm2.TPMAlgSHA256, DataSize: pcrpolicy.IndexSize,
			Attributes: tpm2.TPMANV{AuthWrite: true, NT: tpm2.TPMNTBits, AuthRead: true, NoDA: true},
		})}.Execute(m.t)
		if err != nil {
			return ownerError("make the TPM's index of the epoch", err)
		}
	} else if !errors.Is(err, errOtherIndex) {
		return err
	}
	if err := m.setBits(0); err != nil {
		return err
	}
	return m.checkIndex()
}

// setBits is TPM2_NV_SetBits, which go-tpm does not have. Bits that are set stay so.
func (m *TPM) setBits(value uint64) error {
	const (
		sessions = 0x8002 // TPM_ST_SESSIONS
		setBits  = 0x135  // TPM_CC_NV_SetBits
		password = 0x40000009
	)
	b := be.AppendUint16(nil, sessions)
	b = be.AppendUint32(b, 0) // the length, below
	b = be.AppendUint32(b, setBits)
	b = be.AppendUint32(b, pcrpolicy.Index) // whose authorisation
	b = be.AppendUint32(b, pcrpolicy.Index)
	b = be.AppendUint32(b, 9)        // length of the authorisation:
	b = be.AppendUint32(b, password) // TPM_RS_PW,
	b = append(b, 0, 0, 0, 0, 0)     // no nonce, no attributes, an empty password
	b = be.AppendUint64(b, value)
	be.PutUint32(b[2:], uint32(len(b)))
	answer, err := m.t.Send(b)
	if err == nil && len(answer) < 10 {
		err = fmt.Errorf("an answer of %d bytes", len(answer))
	}
	if err == nil {
		if rc := tpm2.TPMRC(be.Uint32(answer[6:])); rc != tpm2.TPMRCSuccess {
			err = rc
		}
	}
	if err != nil {
		return fmt.Errorf("raise the TPM's epoch: %w", err)
	}
	return nil
}

// Epoch returns the newest epoch that was confirmed on this machine; 0 if none was. Images of an older one open nothing.
func (m *TPM) Epoch() (int, error) {
	if err := m.checkIndex(); err != nil {
		return 0, err
	}
	r, err := tpm2.NVRead{AuthHandle: index(), NVIndex: indexNamed(), Size: pcrpolicy.IndexSize}.Execute(m.t)
	if err != nil {
		return 0, fmt.Errorf("read the TPM's index of the epoch: %w", err)
	}
	if len(r.Data.Buffer) != pcrpolicy.IndexSize {
		return 0, fmt.Errorf("read the TPM's index of the epoch: %d bytes", len(r.Data.Buffer))
	}
	return bits.Len64(be.Uint64(r.Data.Buffer)), nil
}

// RaiseEpoch makes images of older epochs unable to open anything on this machine, for ever. An epoch that is not newer changes nothing.
func (m *TPM) RaiseEpoch(epoch int) error {
	value, err := pcrpolicy.EpochBits(epoch)
	if err != nil {
		return err
	}
	now, err := m.Epoch()
	if err != nil || now >= epoch {
		return err
	}
	return m.setBits(value)
}
