package boot

import (
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzRootHash reads the kernel's command line: what comes out is one hash, in one form, that stands there.
func FuzzRootHash(f *testing.F) {
	hash := strings.Repeat("0123456789abcdef", 4)
	for _, line := range []string{"console=ttyS0 bulkhead bulkhead.verity=" + hash + "\n", "bulkhead.verity=" + strings.ToUpper(hash), "bulkhead.verity=" + hash + " bulkhead.verity=" + hash, "bulkhead.verity=", "bulkhead.verity=" + hash + "0", ""} {
		f.Add(line)
	}
	testfuzz.Run(f, func(t *testing.T, line string) {
		found, err := rootHash(line)
		stands := slices.Contains(strings.Fields(strings.ToLower(line)), "bulkhead.verity="+found)
		if err == nil && (len(found) != 64 || !stands || strings.Trim(found, "0123456789abcdef") != "") {
			t.Errorf("%q: %q", line, found)
		}
		if err != nil && err.Error() == "" {
			t.Error("an error that says nothing")
		}
	})
}
