// Package ovmf reads and changes the variables of QEMU's UEFI firmware in the file that stands for its flash memory, while the
// machine is off. It is pure, and so defensive that a file which lost power in the middle of a write does it no harm.
//
// The file is a firmware volume of EDK2 with a store of authenticated variables at its start: a log, to which records are appended
// and in which older ones are marked as deleted by clearing bits, as flash memory has it.
package ovmf

import (
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/deploy/image/uki"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

var le = binary.LittleEndian

// Attributes of variables.
const (
	NonVolatile   = 1
	BootService   = 2
	Runtime       = 4
	Authenticated = 0x20 // with a time
)

// A Variable is one that the firmware keeps.
type Variable struct {
	Name       string
	Namespace  gpt.GUID
	Attributes uint32
	Value      []byte
}

// Namespaces of EDK2, for what a person would choose in the firmware's menu.
var (
	secureBootEnable = gpt.MustGUID("f0a30bc7-af08-4556-99c4-001009c93a44")
	customMode       = gpt.MustGUID("c076ec0c-7028-4399-a072-71ee5c448b9f")
	storeSignature   = gpt.MustGUID("aaf32c78-947b-439a-a180-2e144ec37792")
)

// Layout of the store, in bytes. A record is its header, its name in UTF-16 with a NUL, its value, and padding.
const (
	storeHeader  = 28
	recordHeader = 60
	recordAlign  = 4
	recordStart  = 0x55aa

	added   = 0x3f // state of a record that counts
	deleted = 0xfd // cleared in the state of one that counts no more
)

// Secure says how a firmware's own variables look when Secure Boot is on with these certificates and everything else is refused.
func Secure(pk, kek, db *x509.Certificate) []Variable {
	const signed = NonVolatile | BootService | Runtime | Authenticated
	return []Variable{
		{"PK", uki.GlobalVariable, signed, uki.Certificates(pk)},
		{"KEK", uki.GlobalVariable, signed, uki.Certificates(kek)},
		{"db", uki.ImageSecurity, signed, uki.Certificates(db)},
		{"SecureBootEnable", secureBootEnable, NonVolatile | BootService, []byte{1}},
		{"CustomMode", customMode, NonVolatile | BootService, []byte{0}},
	}
}

// A record is a variable and where it stands.
type record struct {
	Variable
	at   int
	live bool
}

// find returns where the store's records start and where the store ends.
func find(flash []byte) (start, end int, err error) {
	if len(flash) < 64 || string(flash[40:44]) != "_FVH" {
		return 0, 0, errors.New("no firmware volume")
	}
	head := int(le.Uint16(flash[48:]))
	signature := storeSignature.OnDisk()
	if head+storeHeader > len(flash) || string(flash[head:head+16]) != string(signature[:]) {
		return 0, 0, errors.New("no store of authenticated variables")
	}
	size := uint64(le.Uint32(flash[head+16:]))
	if size < storeHeader || uint64(head)+size > uint64(len(flash)) {
		return 0, 0, fmt.Errorf("store of %d bytes in a file of %d", size, len(flash))
	}
	return head + storeHeader, head + int(size), nil
}

// records returns all records and where the next one goes. A record that does not fit is the remains of a write that was cut off:
// nothing stands behind it.
func records(flash []byte) (all []record, next, end int, err error) {
	at, end, err := find(flash)
	if err != nil {
		return nil, 0, 0, err
	}
	for at+recordHeader <= end && le.Uint16(flash[at:]) == recordStart {
		h := flash[at:]
		name, value := uint64(le.Uint32(h[36:])), uint64(le.Uint32(h[40:]))
		if room := uint64(end - at - recordHeader); name < 2 || name%2 != 0 || name > room || value > room-name {
			return all, at, end, fmt.Errorf("record at %d: name of %d bytes and value of %d do not fit", at, name, value)
		}
		body := h[recordHeader:]
		units := make([]uint16, name/2)
		for i := range units {
			units[i] = le.Uint16(body[2*i:])
		}
		v := Variable{string(utf16.Decode(units[:len(units)-1])), gpt.FromDisk([16]byte(h[44:60])), le.Uint32(h[4:]), body[name : name+value]}
		all = append(all, record{v, at, h[2] == added})
		at = (at + recordHeader + int(name+value) + recordAlign - 1) &^ (recordAlign - 1)
	}
	return all, at, end, nil
}

// Read returns the variables that count, in the order in which they were written. With an error it returns those before the damage.
func Read(flash []byte) ([]Variable, error) {
	all, _, _, err := records(flash)
	var out []Variable
	for _, r := range all {
		if r.live {
			out = append(out, r.Variable)
		}
	}
	return out, err
}

// Write appends variables in place, each instead of one of the same name. After an error flash is not to be used.
func Write(flash []byte, vars ...Variable) error {
	for _, v := range vars {
		all, next, end, err := records(flash)
		if err != nil {
			return err
		}
		for _, r := range all {
			if r.live && r.Name == v.Name && r.Namespace == v.Namespace {
				flash[r.at+2] &= deleted
			}
		}
		b := encode(v)
		if next+len(b) > end {
			return fmt.Errorf("variable %s: %d bytes, the store has %d left", v.Name, len(b), end-next)
		}
		copy(flash[next:], b)
		for i := next + len(b); i < end; i++ { // what a write that was cut off left there shall not become a record behind this one
			flash[i] = 0xff
		}
	}
	return nil
}

func encode(v Variable) []byte {
	h := make([]byte, recordHeader)
	le.PutUint16(h, recordStart)
	h[2] = added
	le.PutUint32(h[4:], v.Attributes)
	if v.Attributes&Authenticated != 0 { // an update must be newer: anything is newer than this
		le.PutUint16(h[16:], 2000)
		h[18], h[19] = 1, 1
	}
	units := append(utf16.Encode([]rune(v.Name)), 0)
	le.PutUint32(h[36:], uint32(2*len(units)))
	le.PutUint32(h[40:], uint32(len(v.Value)))
	id := v.Namespace.OnDisk()
	copy(h[44:], id[:])
	for _, u := range units {
		h = le.AppendUint16(h, u)
	}
	h = append(h, v.Value...)
	for len(h)%recordAlign != 0 {
		h = append(h, 0xff) // as flash memory is where nothing was written
	}
	return h
}
