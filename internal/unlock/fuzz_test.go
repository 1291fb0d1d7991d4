package unlock

import (
	"bytes"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzRecoveryKey: a key that a person types is in its one form afterwards, or is refused without being repeated.
func FuzzRecoveryKey(f *testing.F) {
	f.Add(string(NewRecoveryKey()))
	f.Add("oilo oilo")
	testfuzz.Run(f, func(t *testing.T, text string) {
		key, err := ParseRecoveryKey(text)
		if err != nil {
			if len(err.Error()) > 200 {
				t.Errorf("%q is refused with %q", text, err)
			}
			return
		}
		again, err := ParseRecoveryKey(string(key))
		if err != nil || !bytes.Equal(key, again) || len(key) != groups*perGroup+groups-1 {
			t.Errorf("%q is read as %q, and that as %q, %v", text, key, again, err)
		}
	})
}
