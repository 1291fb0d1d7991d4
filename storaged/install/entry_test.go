package install

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

// TestPrefer writes a boot entry into the first free number and puts it first, once.
func TestPrefer(t *testing.T) {
	esp := gpt.Partition{Number: 1, First: 2048, Last: 264191, GUID: gpt.MustGUID("00112233-4455-6677-8899-aabbccddeeff")}
	vars := t.TempDir()
	put := func(name, content string) {
		t.Helper()
		must(t, os.WriteFile(filepath.Join(vars, name), []byte(content), 0o600))
	}
	get := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(vars, name))
		must(t, err)
		return string(b)
	}
	put("Boot0000"+globalVariable, "\x07\x00\x00\x00somebody's")
	put("Boot0002"+globalVariable, "\x07\x00\x00\x00somebody else's")
	put("Boot0001-00000000-0000-0000-0000-000000000000", "another vendor's")
	put("BootOrder"+globalVariable, "\x07\x00\x00\x00\x02\x00\x00\x00")
	for range 2 {
		must(t, Prefer(vars, esp))
		if got := get("BootOrder" + globalVariable); got != "\x07\x00\x00\x00\x01\x00\x02\x00\x00\x00" {
			t.Errorf("order is %x", got)
		}
		// As efibootmgr writes it.
		want := "07000000" + "01000000" + "7400" + hex.EncodeToString(text("Bulkhead")) +
			"04012a00" + "01000000" + "0008000000000000" + "0000040000000000" + "33221100554477668899aabbccddeeff" + "0202" +
			"04042e00" + hex.EncodeToString(text(loaderPath)) + "7fff0400"
		want = strings.Replace(want, "7400", fmt.Sprintf("%02x00", 42+4+len(text(loaderPath))+4), 1)
		want = strings.Replace(want, "04042e00", fmt.Sprintf("0404%02x00", 4+len(text(loaderPath))), 1)
		if got := hex.EncodeToString([]byte(get("Boot0001" + globalVariable))); got != want {
			t.Errorf("entry is\n%s, want\n%s", got, want)
		}
	}
	if all, err := os.ReadDir(vars); err != nil || len(all) != 5 {
		t.Errorf("%d variables, %v", len(all), err)
	}
	fresh := t.TempDir()
	vars = fresh
	must(t, Prefer(vars, esp))
	if got := get("BootOrder" + globalVariable); len(got) != 6 || binary.LittleEndian.Uint16([]byte(got[4:])) != 0 {
		t.Errorf("order is %x", got)
	}
	if err := Prefer(filepath.Join(vars, "none"), esp); err == nil {
		t.Error("a machine without variables has an entry now")
	}
}
