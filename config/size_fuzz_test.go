package config

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzSize: a size has a text that is read as the same size; a comparison is one of five.
func FuzzSize(f *testing.F) {
	f.Add("256MiB")
	f.Add("8191TiB")
	f.Add(">= 100GiB, < 2TiB")
	f.Add("+1KiB")
	testfuzz.Run(f, func(t *testing.T, text string) {
		if s, err := ParseSize(text); err == nil {
			if again, err := ParseSize(s.String()); s > 0 && (err != nil || again != s) {
				t.Errorf("%q is %d, whose text %q is %d, %v", text, s, s.String(), again, err)
			}
		}
		all, err := ParseComparisons(text)
		if err == nil && (len(all) == 0 || len(all) > 2) || err != nil && len(all) > 0 {
			t.Errorf("%q: %v, %v", text, all, err)
		}
		for _, c := range all {
			_ = c.Holds(1) // must not panic
		}
	})
}
