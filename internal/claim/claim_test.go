package claim

import (
	"bytes"
	"crypto/rand"
	"regexp"
	"strings"
	"testing"
)

func TestNormalize(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"7F3KQ-M2X9T-0AB1C-DEFGH", "7F3KQM2X9T0AB1CDEFGH"},
		{" 7f3kq m2x9t oabic defgh\n", "7F3KQM2X9T0AB1CDEFGH"},
		{"7f3kqm2x9tOablcdefgh", "7F3KQM2X9T0AB1CDEFGH"},
		{"", ""},
		{"7F3KQ-M2X9T-0AB1C", ""},
		{strings.Repeat("A", 257), ""},
	} {
		got, err := Normalize(c.in)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("Normalize(%q) = %q, %v; want %q", c.in, got, err, c.want)
		}
	}
}

func TestNewCode(t *testing.T) {
	a, err := NewCode(rand.Reader)
	if err != nil || !regexp.MustCompile(`^([0-9A-HJKMNP-TV-Z]{5}-){3}[0-9A-HJKMNP-TV-Z]{5}$`).MatchString(a) {
		t.Errorf("NewCode = %q, %v", a, err)
	}
	if n, err := Normalize(a); err != nil || n != strings.ReplaceAll(a, "-", "") {
		t.Errorf("a code is not its own normal form: %q, %v", n, err)
	}
	if _, err := NewCode(bytes.NewReader(nil)); err == nil {
		t.Error("no randomness, but a code")
	}
}

func TestProofsDiffer(t *testing.T) {
	seen := map[string]string{}
	for name, p := range map[string][]byte{
		"client": ClientProof("A", []byte("b"), []byte("c")), "server": ServerProof("A", []byte("b"), []byte("c"), nil),
		"other code": ClientProof("B", []byte("b"), []byte("c")), "other connection": ClientProof("A", []byte("x"), []byte("c")),
		"other request": ClientProof("A", []byte("b"), []byte("x")),
	} {
		if was, twice := seen[string(p)]; twice {
			t.Errorf("%s and %s have the same proof", was, name)
		}
		seen[string(p)] = name
	}
}
