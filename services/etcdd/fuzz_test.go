package etcdd

import (
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzSnapshotName: a file is a snapshot if its name is one that we would give, and of nothing else.
func FuzzSnapshotName(f *testing.F) {
	f.Add("000007-20260102T030405Z-99.db")
	f.Add("0000007-20260102T030405Z-099.db")
	f.Add("000007-20261302T030405Z-99.db")
	testfuzz.Run(f, func(t *testing.T, name string) {
		if s, ok := parseName(name); ok && (s.name() != name || s.number < 0 || s.revision < 0) {
			t.Errorf("%q is %+v, which is called %q", name, s, s.name())
		}
	})
}
