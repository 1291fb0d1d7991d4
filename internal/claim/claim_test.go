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

// The token of a cluster is for the node with the code, on this connection, under this name, at these endpoints; and so is the proof.
func TestJoin(t *testing.T) {
	b, eps := bytes.Repeat([]byte{7}, BindingSize), []string{"a:1", "b:2"}
	sealed, err := SealToken("CODE", b, "n2", eps, "the token", rand.Reader)
	if err != nil || bytes.Contains(sealed, []byte("token")) {
		t.Fatalf("%q, %v", sealed, err)
	}
	if got, err := OpenToken("CODE", b, "n2", eps, sealed); err != nil || got != "the token" {
		t.Errorf("%q, %v", got, err)
	}
	right := JoinProof("CODE", b, "n2", sealed, eps)
	for _, c := range []struct {
		what, code, name string
		binding          []byte
		endpoints        []string
	}{
		{"code", "EDOC", "n2", b, eps},
		{"connection", "CODE", "n2", bytes.Repeat([]byte{8}, BindingSize), eps},
		{"name", "CODE", "n3", b, eps},
		{"endpoints", "CODE", "n2", b, []string{"a:1", "c:2"}},
		{"number of endpoints", "CODE", "n2", b, []string{"a:1"}},
	} {
		if _, err := OpenToken(c.code, c.binding, c.name, c.endpoints, sealed); err == nil {
			t.Errorf("opened with another %s", c.what)
		}
		if Equal(right, JoinProof(c.code, c.binding, c.name, sealed, c.endpoints)) {
			t.Errorf("the proof is the same with another %s", c.what)
		}
	}
	if _, err := OpenToken("CODE", b, "n2", eps, sealed[:5]); err == nil {
		t.Error("five bytes are a token")
	}
	if Equal(right, JoinProof("CODE", b, "n2", sealed[1:], eps)) {
		t.Error("the proof does not cover the token")
	}
	if Equal(JoinedProof("CODE", b, []byte("ca"), "worker"), JoinedProof("CODE", b, []byte("ca"), "controlplane")) || Equal(JoinedProof("CODE", b, []byte("ca"), "worker"), JoinedProof("CODE", b, []byte("CA"), "worker")) {
		t.Error("the node's proof does not cover what it says")
	}
}
