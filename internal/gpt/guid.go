package gpt

import (
	"encoding/hex"
	"fmt"
)

// A GUID is kept in the order in which it is written as text, so that GUID(hash[:16]) prints as the first half of
// the hash. On disk its first three fields are little-endian; only this package sees that order.
// The zero value means "none".
type GUID [16]byte

// Partition types. Root, RootVerity and Var are those of the Discoverable Partitions Specification.
var (
	EFISystem    = MustGUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
	BIOSBoot     = MustGUID("21686148-6449-6e6f-744e-656564454649")
	LinuxGeneric = MustGUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
	Root         = MustGUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709") // root of x86-64
	RootVerity   = MustGUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5") // verity tree of a root of x86-64
	Var          = MustGUID("4d21b016-b534-45c2-a9fb-5c16e091fd2d")
	LinuxReserve = MustGUID("8da63339-0007-60c0-c436-083ac8230908")
	LUKS         = MustGUID("ca7d7ccb-63ed-4c53-861c-1742536059cc")
)

// ParseGUID reads the usual text form, in capitals or not: 8-4-4-4-12 hexadecimal digits.
func ParseGUID(s string) (g GUID, err error) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return GUID{}, fmt.Errorf("guid %q: want 8-4-4-4-12 hexadecimal digits", s)
	}
	if _, err := hex.Decode(g[:], []byte(s[0:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return GUID{}, fmt.Errorf("guid %q: %w", s, err)
	}
	return g, nil
}

// MustGUID is ParseGUID for constants; it panics on a bad one.
func MustGUID(s string) GUID {
	g, err := ParseGUID(s)
	if err != nil {
		panic(err)
	}
	return g
}

// String returns the text form in small letters.
func (g GUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[0:4], g[4:6], g[6:8], g[8:10], g[10:])
}

// MarshalText and UnmarshalText make a GUID a string in JSON.
func (g GUID) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText is the inverse of MarshalText.
func (g *GUID) UnmarshalText(b []byte) (err error) {
	*g, err = ParseGUID(string(b))
	return err
}

// OnDisk returns the bytes in the order in which disks and EFI keep them.
func (g GUID) OnDisk() [16]byte { return g.swapped() }

// FromDisk is the inverse of OnDisk.
func FromDisk(b [16]byte) GUID { return GUID(b).swapped() }

// swapped converts between the text order and the order on disk; it is its own inverse.
func (g GUID) swapped() GUID {
	g[0], g[1], g[2], g[3] = g[3], g[2], g[1], g[0]
	g[4], g[5] = g[5], g[4]
	g[6], g[7] = g[7], g[6]
	return g
}
