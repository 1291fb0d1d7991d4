package ovmf

import (
	"bytes"
	"crypto/x509"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// anEmpty is a store as a firmware's maker ships it: erased.
func anEmpty(size int) []byte {
	b := bytes.Repeat([]byte{0xff}, 72+size+100)
	clear(b[:72])
	copy(b[40:], "_FVH")
	le.PutUint16(b[48:], 72)
	id := storeSignature.OnDisk()
	copy(b[72:], id[:])
	le.PutUint32(b[88:], uint32(size))
	return b
}

var some = gpt.MustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")

func TestWrite(t *testing.T) {
	flash := anEmpty(1024)
	one, two := Variable{"Boot0001", some, 7, []byte("abc")}, Variable{"Böot", some, 3, []byte{}}
	if err := Write(flash, one, two); err != nil {
		t.Fatal(err)
	}
	one.Value = []byte("other and longer")
	if err := Write(flash, one); err != nil {
		t.Fatal(err)
	}
	elsewhere := one
	elsewhere.Namespace[0]++
	if err := Write(flash, elsewhere); err != nil {
		t.Fatal(err)
	}
	got, err := Read(flash)
	if want := []Variable{two, one, elsewhere}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v\nwant %v", got, err, want)
	}
	if !bytes.Equal(flash[72+1024:], bytes.Repeat([]byte{0xff}, 100)) {
		t.Error("written behind the store")
	}
	if err := Write(flash, Variable{"x", some, 7, make([]byte, 1000)}); err == nil || !strings.Contains(err.Error(), "variable x: 1064 bytes, the store has 648 left") {
		t.Errorf("full: %v", err)
	}
}

// A write that was cut off leaves what stood before it.
func TestTorn(t *testing.T) {
	flash := anEmpty(1024)
	if err := Write(flash, Variable{"a", some, 7, []byte("abc")}); err != nil {
		t.Fatal(err)
	}
	_, next, _, err := records(flash)
	if err != nil {
		t.Fatal(err)
	}
	whole := encode(Variable{"b", some, 7, []byte("defg")})
	for n := range len(whole) {
		torn := bytes.Clone(flash)
		copy(torn[next:], whole[:n])
		got, _ := Read(torn)
		if len(got) < 1 || got[0].Name != "a" {
			t.Errorf("%d bytes of a record written: %v", n, got)
		}
	}
}

func TestRefused(t *testing.T) {
	for want, change := range map[string]func([]byte) []byte{
		"no firmware volume": func(b []byte) []byte { return b[:60] },
		"no store":           func(b []byte) []byte { le.PutUint16(b[48:], 71); return b },
		"no store of":        func(b []byte) []byte { le.PutUint16(b[48:], 65535); return b },
		"bytes in a file of": func(b []byte) []byte { le.PutUint32(b[88:], 1<<32-1); return b },
	} {
		flash := change(anEmpty(1024))
		if _, err := Read(flash); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		if err := Write(flash, Variable{"a", some, 7, nil}); err == nil {
			t.Errorf("%s: written", want)
		}
	}
}

// TestDebian reads the store that Debian's package ovmf has, and turns Secure Boot on in it.
func TestDebian(t *testing.T) {
	flash, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err != nil {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	c := &x509.Certificate{Raw: make([]byte, 800)}
	if err := Write(flash, Secure(c, c, c)...); err != nil {
		t.Fatal(err)
	}
	vars, err := Read(flash)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, v := range vars {
		if v.Name == "PK" && v.Attributes == 0x27 && len(v.Value) == 28+16+800 || v.Name == "SecureBootEnable" && v.Value[0] == 1 {
			found++
		}
	}
	if found != 2 {
		t.Errorf("%v", vars)
	}
}

func FuzzRead(f *testing.F) {
	flash := anEmpty(300)
	if err := Write(flash, Variable{"a", some, 7, []byte("abc")}); err != nil {
		f.Fatal(err)
	}
	f.Add(flash)
	testfuzz.Run(f, func(t *testing.T, flash []byte) {
		before, err := Read(flash)
		if err != nil {
			return
		}
		v := Variable{"new", some, NonVolatile, []byte("value")}
		if Write(flash, v) != nil {
			return
		}
		after, err := Read(flash)
		if err != nil || len(after) == 0 || !reflect.DeepEqual(after[len(after)-1], v) || len(after) > len(before)+1 {
			t.Errorf("had %v, have %v, %v", before, after, err)
		}
	})
}
