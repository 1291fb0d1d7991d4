package dm

import (
	"bytes"
	"encoding/hex"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/storaged/secret"
)

func table() Crypt {
	return Crypt{Device: "254:5", Offset: 16 << 20, Length: 64 << 20, SectorSize: 4096, Key: secret.From(bytes.Repeat([]byte{0xab}, 64))}
}

func TestParams(t *testing.T) {
	c := table()
	got, err := c.params()
	want := "aes-xts-plain64 " + strings.Repeat("ab", 64) + " 0 254:5 32768 4 allow_discards no_read_workqueue no_write_workqueue sector_size:4096"
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
	c.SectorSize = 512
	if got, _ := c.params(); !strings.HasSuffix(string(got), "32768 3 "+options) {
		t.Errorf("with small sectors: %s", got)
	}
	for name, spoil := range map[string]func(*Crypt){
		"short key": func(c *Crypt) { c.Key = secret.New(16) }, "no length": func(c *Crypt) { c.Length = 0 }, "odd length": func(c *Crypt) { c.Length += 512 },
		"odd offset": func(c *Crypt) { c.Offset++ }, "odd sectors": func(c *Crypt) { c.SectorSize = 1000 }, "a device of two words": func(c *Crypt) { c.Device = "254:5 0 1" },
	} {
		c := table()
		if spoil(&c); func() error { _, err := c.params(); return err }() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestLoadMessage(t *testing.T) {
	b, err := loadMessage("bulkhead-STATE", table())
	if err != nil {
		t.Fatal(err)
	}
	if len(b)%8 != 0 || le.Uint32(b[atDataSize:]) != uint32(len(b)) || b[len(b)-1] != 0 || le.Uint32(b[atFlags:])&flagSecure == 0 ||
		text(b[atName:]) != "bulkhead-STATE" || text(b[headerSize+24:]) != "crypt" || le.Uint64(b[headerSize+8:]) != 64<<20/512 {
		t.Errorf("message is %x", b)
	}
	for _, name := range []string{"", strings.Repeat("x", 128), "a/b", "a\x00b"} {
		if _, err := message(name, "", 0, 0); err == nil {
			t.Errorf("name %q accepted", name)
		}
	}
}

// A table comes back from the kernel as the same message.
func TestTable(t *testing.T) {
	want := table()
	b, err := loadMessage("x", want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseTable(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	in := bytes.Replace(b, []byte(hex.EncodeToString(want.Key.Expose())), []byte(":64:logon:cryptsetup:0123-d0"), 1)
	if _, err := parseTable(in); err == nil || !strings.Contains(err.Error(), "keyring") {
		t.Errorf("a key in a keyring: %v", err)
	}
}

// Whatever comes back, reading it does not panic.
func FuzzParseTable(f *testing.F) {
	b, err := loadMessage("x", table())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	testfuzz.Run(f, func(t *testing.T, b []byte) {
		if len(b) < headerSize {
			return
		}
		parseStatus(b)
		if c, err := parseTable(b); err == nil && c.Offset < 0 {
			t.Errorf("%+v", c)
		}
	})
}
