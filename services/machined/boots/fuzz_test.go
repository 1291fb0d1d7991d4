package boots

import (
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzPanic puts together what a kernel and its firmware left of a panic.
func FuzzPanic(f *testing.F) {
	f.Add("dmesg-efi-1", "Panic#1 Part2\n<4>[    1.0] first\n", "Panic#1 Part1\n<0>[    2.0] Kernel panic\n")
	f.Add("dmesg-ramoops-0", "Oops#-1 Part9999999999999999999\n<\x1b[2J>\xff\n", strings.Repeat("x", 70000)+"\n")
	testfuzz.Run(f, func(t *testing.T, name, first, second string) {
		at := time.Unix(1, 0)
		text := assemble([]Record{{name, at, first}, {name, at, second}})
		if len(text) > maxPanic || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && r != '\t' && unicode.IsControl(r) }) {
			t.Errorf("%.200q and %.200q become %.500q", first, second, text)
		}
	})
}
