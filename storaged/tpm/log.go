package tpm

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
)

// MaxLog is the longest log that is read, in bytes. Real ones have some tens of kilobytes.
const MaxLog = 1 << 20

// maxEvents is how many events of one PCR are kept.
const maxEvents = 128

// Event is one entry of the firmware's log: something that was extended into a PCR.
type Event struct {
	Digest pcrpolicy.Digest
	What   string // "SecureBoot", "db", "separator" …; at most 32 printable characters
}

// MarshalText writes an event as it stands in a token: digest in hex, blank, What.
func (e Event) MarshalText() ([]byte, error) {
	return []byte(hex.EncodeToString(e.Digest[:]) + " " + e.What), nil
}

// UnmarshalText reads it.
func (e *Event) UnmarshalText(b []byte) error {
	digest, what, _ := strings.Cut(string(b), " ")
	d, err := hex.DecodeString(digest)
	if err != nil || len(d) != len(e.Digest) {
		return errors.New("an event of the TPM's log: no digest")
	}
	*e = Event{pcrpolicy.Digest(d), printable(what)}
	return nil
}

// Kinds of events, and digests' algorithms with their sizes (TCG PC Client Platform Firmware Profile, TPM 2.0 part 2).
const (
	evNoAction  = 0x3
	evSeparator = 0x4
	evVariable  = 0x80000001 // EV_EFI_VARIABLE_DRIVER_CONFIG
	evVariable2 = 0x8000000c // EV_EFI_VARIABLE_BOOT2
	evAuthority = 0x800000e0 // EV_EFI_VARIABLE_AUTHORITY
	evAction    = 0x80000007 // EV_EFI_ACTION
)

var digestSizes = map[uint16]int{0x4: 20, 0xb: 32, 0xc: 48, 0xd: 64, 0x12: 32}

// Events returns what the firmware's log, in TCG's crypto-agile form, has for one PCR, in order.
func Events(log []byte, pcr int) ([]Event, error) {
	if len(log) == 0 {
		return nil, errors.New("there is none")
	}
	if len(log) > MaxLog {
		return nil, fmt.Errorf("%d bytes, more than %d", len(log), MaxLog)
	}
	r := &reader{b: log}
	r.skip(8 + 20) // the first event is in the old form: PCR, type, SHA-1
	if !strings.HasPrefix(string(r.take(r.number())), "Spec ID Event03\x00") {
		return nil, errors.New("it is not in TCG's crypto-agile form")
	}
	var out []Event
	for len(r.b) > 0 && !r.bad {
		index, typ, count := r.number(), r.number(), r.number()
		var digest []byte
		if count > 16 {
			return nil, fmt.Errorf("an event with %d digests", count)
		}
		for range count {
			alg := r.short()
			size, ok := digestSizes[alg]
			if !ok && !r.bad {
				return nil, fmt.Errorf("a digest of unknown kind %#x", alg)
			}
			if d := r.take(uint32(size)); alg == 0xb {
				digest = d
			}
		}
		data := r.take(r.number())
		if r.bad {
			break
		}
		if index == uint32(pcr) && typ != evNoAction && len(digest) == len(pcrpolicy.Digest{}) {
			if len(out) == maxEvents {
				return nil, fmt.Errorf("more than %d events of PCR %d", maxEvents, pcr)
			}
			out = append(out, Event{pcrpolicy.Digest(digest), describe(typ, data)})
		}
	}
	if r.bad {
		return nil, errors.New("it ends within an event")
	}
	return out, nil
}

// Replay returns the PCR that the events make.
func Replay(events []Event) (pcr pcrpolicy.Digest) {
	for _, e := range events {
		pcr = pcrpolicy.Extend(pcr, e.Digest)
	}
	return pcr
}

// Compare says what differs between two logs of one PCR.
func Compare(was, is []Event) string {
	var out []string
	for i := range max(len(was), len(is)) {
		switch {
		case i >= len(is):
			out = append(out, fmt.Sprintf("%s is missing", was[i].What))
		case i >= len(was):
			out = append(out, fmt.Sprintf("%s is new", is[i].What))
		case was[i] == is[i]:
		case was[i].What == is[i].What:
			out = append(out, fmt.Sprintf("%s was changed", is[i].What))
		default:
			out = append(out, fmt.Sprintf("%s is in the place of %s", is[i].What, was[i].What))
		}
	}
	if len(out) == 0 {
		return "the log is as it was"
	}
	const most = 4
	if len(out) > most {
		out = append(out[:most], fmt.Sprintf("and %d more", len(out)-most))
	}
	return strings.Join(slices.Compact(out), ", ")
}

// describe names what was measured.
func describe(typ uint32, data []byte) string {
	switch typ {
	case evSeparator:
		return "separator"
	case evAction:
		return printable(string(data))
	case evVariable, evVariable2, evAuthority:
		r := &reader{b: data}
		r.skip(16) // the variable's vendor
		n := r.long()
		r.long() // length of its data
		if n > 128 {
			return "a variable"
		}
		var name []uint16
		for b := r.take(2 * uint32(n)); len(b) >= 2; b = b[2:] {
			name = append(name, binary.LittleEndian.Uint16(b))
		}
		text := printable(string(utf16.Decode(name)))
		if typ == evAuthority {
			return "authority " + text
		}
		return text
	}
	return fmt.Sprintf("event %#x", typ)
}

// printable bounds and cleans what a firmware says.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), 32)]
}

// reader takes bytes off the front. After one take too many it is bad and gives nothing but zeros.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint32) []byte {
	if r.bad || uint64(n) > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) skip(n uint32) { r.take(n) }

func (r *reader) short() uint16 {
	b := r.take(2)
	if r.bad {
		return 0
	}
	return binary.LittleEndian.Uint16(b)
}

func (r *reader) number() uint32 {
	b := r.take(4)
	if r.bad {
		return 0
	}
	return binary.LittleEndian.Uint32(b)
}

func (r *reader) long() uint64 {
	b := r.take(8)
	if r.bad {
		return 0
	}
	return binary.LittleEndian.Uint64(b)
}
