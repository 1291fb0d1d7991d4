package uki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"time"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// Namespaces and types of UEFI, and our own.
var (
	GlobalVariable = gpt.MustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c") // of PK and KEK
	ImageSecurity  = gpt.MustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f") // of db and dbx
	Owner          = gpt.MustGUID("bfa6849d-9271-41bd-a76b-6530ffbf81e2") // who put a signature into a list: Bulkhead

	typeX509   = gpt.MustGUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")
	typeSHA256 = gpt.MustGUID("c1c41626-504c-4092-aca9-41f936934328")
	typePKCS7  = gpt.MustGUID("4aafd29d-68df-49ee-8aa9-347d375665a7")
)

// Attributes are those of Secure Boot's variables: kept, readable before and after the system's start, written with a signature.
const Attributes = 0x01 | 0x02 | 0x04 | 0x20

// Certificates returns an EFI signature list for each certificate: the value of PK, KEK or db.
func Certificates(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, signatureList(typeX509, c.Raw)...)
	}
	return out
}

// Digests returns an EFI signature list of Authenticode digests: images that dbx refuses or db takes.
func Digests(digests ...[sha256.Size]byte) []byte {
	var entries [][]byte
	for _, d := range digests {
		entries = append(entries, d[:])
	}
	return signatureList(typeSHA256, entries...)
}

// signatureList encodes EFI_SIGNATURE_LIST; all entries have the same length.
func signatureList(kind gpt.GUID, entries ...[]byte) []byte {
	const header, guid = 28, 16
	if len(entries) == 0 {
		return nil
	}
	each := guid + len(entries[0])
	id, owner := kind.OnDisk(), Owner.OnDisk()
	out := append([]byte{}, id[:]...)
	out = le.AppendUint32(out, uint32(header+each*len(entries)))
	out = le.AppendUint32(out, 0)
	out = le.AppendUint32(out, uint32(each))
	for _, e := range entries {
		out = append(append(out, owner[:]...), e...)
	}
	return out
}

// A Variable is one of Secure Boot's, to be written by whoever holds the key above it.
type Variable struct {
	Name      string   // "PK", "KEK", "db" or "dbx"
	Namespace gpt.GUID // GlobalVariable or ImageSecurity
	Value     []byte   // signature lists
}

// Update returns what SetVariable takes for the variable, EFI_VARIABLE_AUTHENTICATION_2 and the value: the .auth files that
// systemd-boot, firmware menus and efivarfs enrol. A firmware refuses one that is not newer than the last; at has seconds.
func (v Variable) Update(s Signer, at time.Time) ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("variable %s: %w", v.Name, err)
	}
	stamp := efiTime(at)
	id := v.Namespace.OnDisk()
	var signed bytes.Buffer
	for _, u := range utf16.Encode([]rune(v.Name)) { // without its NUL
		signed.Write([]byte{byte(u), byte(u >> 8)})
	}
	signed.Write(id[:])
	signed.Write(le.AppendUint32(nil, Attributes))
	signed.Write(stamp)
	signed.Write(v.Value)
	signature, err := sign(s, signed.Bytes())
	if err != nil {
		return nil, fmt.Errorf("variable %s: %w", v.Name, err)
	}
	der, err := message(s, contentInfo{Type: oidData}, asn1.RawValue{}, signature, false)
	if err != nil {
		return nil, err
	}
	const header = winHeader + 16 // WIN_CERTIFICATE_UEFI_GUID
	kind := typePKCS7.OnDisk()
	out := le.AppendUint32(stamp, uint32(header+len(der)))
	out = le.AppendUint16(out, winRevision)
	out = le.AppendUint16(out, winGUID)
	out = append(append(out, kind[:]...), der...)
	return append(out, v.Value...), nil
}

const winGUID = 0x0ef1

// efiTime encodes EFI_TIME in UTC; all below seconds is zero, as authenticated variables want it.
func efiTime(t time.Time) []byte {
	t = t.UTC()
	b := make([]byte, 16)
	le.PutUint16(b, uint16(t.Year()))
	b[2], b[3], b[4], b[5], b[6] = byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second())
	return b
}
