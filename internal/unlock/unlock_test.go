package unlock

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
)

func TestRecoveryKey(t *testing.T) {
	k := NewRecoveryKey()
	if !regexp.MustCompile(`^([0-9A-HJKMNP-TV-Z]{4}-){7}[0-9A-HJKMNP-TV-Z]{4}$`).Match(k) {
		t.Errorf("got %s", k)
	}
	for _, text := range []string{string(k), strings.ToLower(string(k)), strings.ReplaceAll(string(k), "-", ""), " " + strings.ReplaceAll(string(k), "-", " ") + "\n",
		strings.NewReplacer("0", "o", "1", "l").Replace(string(k))} {
		if got, err := ParseRecoveryKey(text); err != nil || !bytes.Equal(got, k) {
			t.Errorf("%q is %s, %v; want %s", text, got, err, k)
		}
	}
	for _, bad := range []string{"", string(k)[1:], string(k) + "A", strings.Replace(string(k), string(k[:1]), "U", 1)} {
		if got, err := ParseRecoveryKey(bad); err == nil {
			t.Errorf("%q is %s", bad, got)
		}
	}
	if bytes.Equal(k, NewRecoveryKey()) {
		t.Error("two are the same")
	}
}

func TestProofs(t *testing.T) {
	salt := NewSalt()
	seen := map[string]string{}
	for name, p := range map[string][]byte{
		"node": NodeProof(Verifier(Recovery, []byte("k"), nil), []byte("b")), "caller": CallerProof(Verifier(Recovery, []byte("k"), nil), []byte("b")),
		"other key": NodeProof(Verifier(Recovery, []byte("l"), nil), []byte("b")), "other connection": NodeProof(Verifier(Recovery, []byte("k"), nil), []byte("c")),
		"passphrase": NodeProof(Verifier(Passphrase, []byte("k"), salt), []byte("b")), "other salt": NodeProof(Verifier(Passphrase, []byte("k"), NewSalt()), []byte("b")),
	} {
		if was, twice := seen[string(p)]; twice {
			t.Errorf("%s and %s have the same proof", was, name)
		}
		seen[string(p)] = name
	}
}

func TestNormalize(t *testing.T) {
	if k, err := Normalize(Passphrase, "correct horse"); err != nil || string(k) != "correct horse" {
		t.Errorf("%s, %v", k, err)
	}
	for _, bad := range [][2]string{{Passphrase, "short"}, {Passphrase, strings.Repeat("x", MaxPassphrase+1)}, {"tpm", "something long"}} {
		if k, err := Normalize(bad[0], bad[1]); err == nil {
			t.Errorf("%v: %s", bad, k)
		}
	}
}
