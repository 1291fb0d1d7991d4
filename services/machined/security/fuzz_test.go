package security

import (
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzMountinfo looks for the device of the root in the kernel's list of mounts, where names are what somebody chose.
func FuzzMountinfo(f *testing.F) {
	f.Add("21 1 254:0 / / ro,relatime shared:1 - squashfs /dev/dm-0 ro\n22 21 0:5 / /dev rw - devtmpfs devtmpfs rw\n")
	f.Add("21 1 254:0 / / ro - squashfs\n - \n")
	testfuzz.Run(f, func(t *testing.T, text string) {
		if d := rootDevice(text); strings.ContainsAny(d, " \t\n") || !strings.Contains(text, d) {
			t.Errorf("%q: %q", text, d)
		}
	})
}
