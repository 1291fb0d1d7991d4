package initctl

import (
	"bytes"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func TestRequestRoundTrip(t *testing.T) {
	for _, want := range []Request{{Start, "apid"}, {Logs, strings.Repeat("x", 31)}, {List, ""}, {PowerOff, ""}} {
		p := want.Encode()
		if got, err := DecodeRequest(p[:]); err != nil || got != want {
			t.Errorf("decode(encode(%v)) = %v, %v", want, got, err)
		}
	}
}

func TestDecodeRequestRefuses(t *testing.T) {
	good := Request{Stop, "apid"}.Encode()
	for name, spoil := range map[string]func(p []byte) []byte{
		"short":             func(p []byte) []byte { return p[:len(p)-1] },
		"long":              func(p []byte) []byte { return append(p, 0) },
		"empty":             func(p []byte) []byte { return nil },
		"verb zero":         func(p []byte) []byte { p[0] = 0; return p },
		"verb unknown":      func(p []byte) []byte { p[0] = 9; return p },
		"reserved bytes":    func(p []byte) []byte { p[3] = 1; return p },
		"after the name":    func(p []byte) []byte { p[20] = 'x'; return p },
		"name without end":  func(p []byte) []byte { copy(p[8:], strings.Repeat("x", 32)); return p },
		"no name":           func(p []byte) []byte { clear(p[8:]); return p },
		"name for no unit":  func(p []byte) []byte { p[0] = byte(Reboot); return p },
		"another direction": func(p []byte) []byte { r := Record{}.Encode(); return r[:] },
	} {
		if got, err := DecodeRequest(spoil(bytes.Clone(good[:]))); err == nil {
			t.Errorf("%s: accepted as %v", name, got)
		}
	}
}

func TestEnding(t *testing.T) {
	for want, r := range map[string]Record{
		"":                                       {},
		"exit 1":                                 {End: Exited, Value: 1},
		"killed by SIGKILL":                      {End: Killed, Value: 9},
		"killed by signal 40":                    {End: Killed, Value: 40},
		"not started: no such file or directory": {End: NotStarted, Value: 2},
		MemoryLimit:                              {End: Exhausted, Value: 9},
	} {
		if got := r.Ending(); got != want {
			t.Errorf("%+v: got %q, want %q", r, got, want)
		}
	}
}

func FuzzRequest(f *testing.F) {
	p := Request{Start, "networkd"}.Encode()
	f.Add(p[:])
	testfuzz.Run(f, func(t *testing.T, p []byte) {
		r, err := DecodeRequest(p)
		if err != nil {
			return
		}
		if again := r.Encode(); !bytes.Equal(again[:], p) {
			t.Errorf("%x is read as %v, which is written as %x", p, r, again)
		}
	})
}

func FuzzRecord(f *testing.F) {
	p := Record{State: 2, PID: 99, Restarts: 3, Left: 1, Since: 1e18, Unit: "networkd"}.Encode()
	f.Add(p[:])
	testfuzz.Run(f, func(t *testing.T, p []byte) {
		r, err := DecodeRecord(p)
		if err != nil {
			return
		}
		_ = status(r) // must not panic
		if again := r.Encode(); !bytes.Equal(again[:], p) {
			t.Errorf("%x is read as %v, which is written as %x", p, r, again)
		}
	})
}
