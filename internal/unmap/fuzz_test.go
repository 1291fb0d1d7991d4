package unmap

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzMaps: PID 1 gives memory back by this table, so that a region is never anything but read-only text of the program, from low to high.
func FuzzMaps(f *testing.F) {
	f.Add("00400000-00600000 r-xp 00000000 00:01 7 /init\n00600000-00700000 rw-p 00200000 00:01 7 /init\n")
	f.Add("2-1 r--p 0 0 0 /init")
	testfuzz.Run(f, func(t *testing.T, maps string) {
		for _, r := range readOnly(maps, "/init") {
			if r[0] >= r[1] {
				t.Errorf("%q has %x", maps, r)
			}
		}
	})
}
