package tpm

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/bulkhead-os/bulkhead/internal/pcrpolicy"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// newLog is the first event of every log.
func newLog() []byte {
	b := make([]byte, 8+20)
	b[4] = evNoAction
	data := append([]byte("Spec ID Event03\x00"), make([]byte, 20)...)
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
}

// appendEvent adds one with a digest of SHA-1 and one of SHA-256.
func appendEvent(log []byte, pcr, typ uint32, digest [32]byte, data []byte) []byte {
	le := binary.LittleEndian
	log = le.AppendUint32(log, pcr)
	log = le.AppendUint32(log, typ)
	log = le.AppendUint32(log, 2)
	log = append(le.AppendUint16(log, 0x4), make([]byte, 20)...)
	log = append(le.AppendUint16(log, 0xb), digest[:]...)
	return append(le.AppendUint32(log, uint32(len(data))), data...)
}

// variable is UEFI_VARIABLE_DATA.
func variable(name, data string) []byte {
	le := binary.LittleEndian
	b := make([]byte, 16)
	b = le.AppendUint64(b, uint64(len(name)))
	b = le.AppendUint64(b, uint64(len(data)))
	for _, c := range utf16.Encode([]rune(name)) {
		b = le.AppendUint16(b, c)
	}
	return append(b, data...)
}

func TestEvents(t *testing.T) {
	log := newLog()
	for _, e := range []struct {
		pcr, typ uint32
		data     []byte
	}{
		{7, evVariable, variable("SecureBoot", "\x01")}, {4, evVariable, variable("Boot0000", "x")}, {7, evSeparator, make([]byte, 4)},
		{7, evAuthority, variable("db", "cert")}, {7, evNoAction, []byte("nothing is extended")}, {7, evAction, []byte("DMA Protection Disabled\x00")}, {7, 0x1234, nil},
	} {
		log = appendEvent(log, e.pcr, e.typ, sha256.Sum256(e.data), e.data)
	}
	got, err := Events(log, 7)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range got {
		names = append(names, e.What)
	}
	if have, want := strings.Join(names, ", "), "SecureBoot, separator, authority db, DMA Protection Disabled, event 0x1234"; have != want {
		t.Errorf("got %s; want %s", have, want)
	}
	var pcr pcrpolicy.Digest
	for _, e := range got {
		pcr = pcrpolicy.Extend(pcr, e.Digest)
	}
	if Replay(got) != pcr {
		t.Error("replayed wrongly")
	}
	for _, e := range got {
		text, _ := e.MarshalText()
		var again Event
		if err := again.UnmarshalText(text); err != nil || again != e {
			t.Errorf("%s: %+v, %v", text, again, err)
		}
	}
	for name, bad := range map[string][]byte{"nothing": nil, "old form": make([]byte, 64), "cut": log[:len(log)-1], "cut in a digest": log[:120], "long": make([]byte, MaxLog+1)} {
		if got, err := Events(bad, 7); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestCompare(t *testing.T) {
	ev := func(names ...string) (out []Event) {
		for _, n := range names {
			what, _, _ := strings.Cut(n, "=")
			out = append(out, Event{pcrpolicy.Digest(sha256.Sum256([]byte(n))), what})
		}
		return out
	}
	for _, c := range []struct {
		was, is []Event
		want    string
	}{
		{ev("a", "b"), ev("a", "b"), "the log is as it was"},
		{ev("a", "db=1"), ev("a", "db=2"), "db was changed"},
		{ev("a", "b"), ev("a"), "b is missing"},
		{ev("a"), ev("a", "b"), "b is new"},
		{ev("a"), ev("b"), "b is in the place of a"},
		{ev("a", "b", "c", "d", "e", "f"), nil, "a is missing, b is missing, c is missing, d is missing, and 2 more"},
	} {
		if got := Compare(c.was, c.is); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

// Whatever a firmware has written, reading it does not panic, and what is kept of it is bounded.
func FuzzEvents(f *testing.F) {
	data := variable("SecureBoot", "\x01")
	f.Add(appendEvent(newLog(), 7, evVariable, sha256.Sum256(data), data))
	f.Add(newLog())
	testfuzz.Run(f, func(t *testing.T, log []byte) {
		got, err := Events(log, 7)
		if err != nil {
			return
		}
		if len(got) > maxEvents {
			t.Errorf("%d events", len(got))
		}
		for _, e := range got {
			text, _ := e.MarshalText()
			var again Event
			if len(e.What) > 32 || again.UnmarshalText(text) != nil || again != e {
				t.Errorf("%q", e.What)
			}
		}
	})
}
