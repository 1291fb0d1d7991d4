package console

import (
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzMounts: pods name what they mount as they like, and PID 1 reads the table to unmount it all.
func FuzzMounts(f *testing.F) {
	f.Add("22 1 254:0 / / ro,relatime shared:1 - squashfs /dev/dm-0 ro\n30 22 254:3 / /var/lib/a\\040b rw shared:2 master:1 - ext4 /dev/vda4 rw\n")
	f.Add("31 22 0:1 / /odd\"name\\ rw - tmpfs - rw\n")
	testfuzz.Run(f, func(t *testing.T, text string) {
		all, size := Mounts([]byte(text)), 0
		for _, m := range all {
			if m.Point == "" || m.FS == "" || m.Source == "" {
				t.Errorf("%q has %+v", text, m)
			}
			size += len(m.Point) + len(m.FS) + len(m.Source)
		}
		if len(all) > strings.Count(text, "\n")+1 || size > 3*len(text) { // \x in quotes may become three bytes
			t.Errorf("%d mounts of %d bytes out of %q", len(all), size, text)
		}
	})
}
