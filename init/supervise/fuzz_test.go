package supervise

import (
	"regexp"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzName: what PID 1 takes from networkd's file for the kernel's name is made of a host name's characters.
func FuzzName(f *testing.F) {
	for _, name := range []string{"n1", "a.b-c", "-a", "a-", "A", "a\x00", "a\nb", "", "é"} {
		f.Add(name)
	}
	good := regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)
	testfuzz.Run(f, func(t *testing.T, name string) {
		if isName(name) != good.MatchString(name) {
			t.Errorf("%q: %v", name, isName(name))
		}
	})
}
