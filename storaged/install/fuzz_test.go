package install

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzPrefer finds boot entries and an order as a firmware may have them. Afterwards our entry is the first, once; the others stay, in their order; and there is nothing left to do.
func FuzzPrefer(f *testing.F) {
	f.Add("Boot0001"+globalVariable, []byte("\x07\x00\x00\x00entry"), []byte("\x02\x00\x00\x00\x01\x00"))
	f.Add("BootFFFF"+globalVariable, []byte{}, []byte("\x02"))
	f.Add("Boot+001"+globalVariable, []byte("\x07"), []byte{1, 2, 3})
	testfuzz.Run(f, func(t *testing.T, name string, entry, numbers []byte) {
		order := []byte("\x07\x00\x00\x00")
		for seen := map[uint16]bool{}; len(numbers) >= 2; numbers = numbers[2:] { // each once: a variable that is written is never shorter then, which a file would not be, either
			if n := binary.LittleEndian.Uint16(numbers); !seen[n] {
				seen[n], order = true, binary.LittleEndian.AppendUint16(order, n)
			}
		}
		vars := t.TempDir()
		if err := os.WriteFile(filepath.Join(vars, filepath.Base(filepath.Clean("/"+name))), entry, 0o600); err != nil {
			return // no name of a file
		}
		must(t, os.WriteFile(filepath.Join(vars, bootOrder+globalVariable), order, 0o600))
		esp := gpt.Partition{Number: 1, First: 2048, Last: 264191, GUID: gpt.GUID{1}}
		if Prefer(vars, esp) != nil {
			if len(order) <= maxVariable {
				t.Errorf("%q, %x, %x: refused", name, entry, order)
			}
			return
		}
		list := func() []byte {
			b, err := os.ReadFile(filepath.Join(vars, bootOrder+globalVariable))
			must(t, err)
			return b
		}
		was := list()
		ours := binary.LittleEndian.Uint16(was[4:])
		count := 0
		for o := was[4:]; len(o) >= 2; o = o[2:] {
			if binary.LittleEndian.Uint16(o) == ours {
				count++
			}
		}
		if count != 1 || len(was) > len(order)+2 {
			t.Errorf("the order %x became %x", order, was)
		}
		must(t, Prefer(vars, esp))
		if now := list(); !bytes.Equal(now, was) {
			t.Errorf("the order %x became %x, and then %x", order, was, now)
		}
	})
}
