package apid

import (
	"reflect"
	"strings"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// FuzzToken: whatever stands where a token should, nobody is let in but who shows what was signed, and as nobody else.
func FuzzToken(f *testing.F) {
	trust := newFakeTrustd(f)
	trust.own()
	state, _ := trust.state.Get()
	keys := append([]*trustv1.TokenKey{{Id: "other", PublicKey: []byte("garbage")}}, state.GetTokenKeys()...)
	now := time.Now()
	good := trust.mint("bob", "reader").Token
	want, err := fromToken(good, keys, now)
	if err != nil {
		f.Fatal(err)
	}
	part := strings.Split(good, ".")
	for _, text := range []string{good, part[0] + "." + part[1] + ".", "eyJhbGciOiJub25lIiwia2lkIjoiayJ9." + part[1] + ".", "eyJhbGciOiJFZERTQSIsImtpZCI6WzFdfQ." + part[1] + "." + part[2], "..", "a.b.c"} {
		f.Add(text)
	}
	testfuzz.Run(f, func(t *testing.T, text string) {
		got, err := fromToken(text, keys, now)
		switch {
		case err == nil && !reflect.DeepEqual(got, want):
			t.Errorf("%q is let in as %+v", text, got)
		case err != nil && (err.Error() == "" || len(err.Error()) > 1000):
			t.Errorf("%q is refused with %q", text, err)
		}
	})
}
