package join

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func TestToken(t *testing.T) {
	key := bytes.Repeat([]byte{3}, KeySize)
	id, err := NewID(rand.Reader)
	if err != nil || !IsID(id) {
		t.Fatalf("id %q: %v", id, err)
	}
	token := Token(id, Secret(key, id))
	for _, typed := range []string{token, strings.ToLower(token), " " + strings.ReplaceAll(token, "-", " ") + "\n", strings.NewReplacer("0", "o", "1", "l").Replace(token)} {
		got, secret, err := Parse(typed)
		if err != nil || got != id || !bytes.Equal(secret, Secret(key, id)) {
			t.Errorf("%q: %q, %x, %v", typed, got, secret, err)
		}
	}
	if other := Secret(key, "0123456789"); bytes.Equal(other, Secret(key, id)) {
		t.Error("two tokens have one secret")
	}
	for _, bad := range []string{"", id, id + ".", token[1:], token[:len(token)-1], token + "0", strings.Replace(token, ".", "", 1), id + "." + strings.Repeat("U", 32), strings.Repeat("0", 300)} {
		if _, _, err := Parse(bad); err == nil {
			t.Errorf("%q is taken for a token", bad)
		}
	}
}

// Each part of a proof counts, and neither side's proof is the other's.
func TestProofs(t *testing.T) {
	b := bytes.Repeat([]byte{7}, BindingSize)
	s, csr, seal := []byte("secret"), []byte("csr"), bytes.Repeat([]byte{1}, SealKeySize)
	right := NodeProof(s, b, "n2", csr, seal)
	if !Equal(right, NodeProof(s, b, "n2", csr, seal)) {
		t.Fatal("the same proof differs")
	}
	for name, forged := range map[string][]byte{
		"secret":        NodeProof([]byte("Secret"), b, "n2", csr, seal),
		"connection":    NodeProof(s, bytes.Repeat([]byte{8}, BindingSize), "n2", csr, seal),
		"name":          NodeProof(s, b, "n3", csr, seal),
		"key":           NodeProof(s, b, "n2", []byte("CSR"), seal),
		"seal key":      NodeProof(s, b, "n2", csr, bytes.Repeat([]byte{2}, SealKeySize)),
		"the cluster's": ClusterProof(s, b, []byte("n2\x00"), csr, seal),
		"nothing":       nil,
	} {
		if Equal(right, forged) {
			t.Errorf("a forged %s is not noticed", name)
		}
	}
	right = ClusterProof(s, b, []byte("ca"), []byte("cert"), []byte("sealed"))
	for name, forged := range map[string][]byte{
		"secret":      ClusterProof([]byte("Secret"), b, []byte("ca"), []byte("cert"), []byte("sealed")),
		"connection":  ClusterProof(s, bytes.Repeat([]byte{8}, BindingSize), []byte("ca"), []byte("cert"), []byte("sealed")),
		"authority":   ClusterProof(s, b, []byte("CA"), []byte("cert"), []byte("sealed")),
		"certificate": ClusterProof(s, b, []byte("ca"), []byte("CERT"), []byte("sealed")),
		"keys":        ClusterProof(s, b, []byte("ca"), []byte("cert"), []byte("SEALED")),
	} {
		if Equal(right, forged) {
			t.Errorf("a forged %s is not noticed", name)
		}
	}
}

func TestSignature(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Repeat([]byte{7}, BindingSize)
	in := bytes.Repeat([]byte{1}, InstanceSize)
	sig, err := Sign(key, rand.Reader, b, SignPayload(in, "apid-server", []byte("csr")))
	if err != nil {
		t.Fatal(err)
	}
	other, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	for _, c := range []struct {
		name string
		key  *ecdsa.PublicKey
		b    []byte
		load []byte
		sig  []byte
		want bool
	}{
		{"right", &key.PublicKey, b, SignPayload(in, "apid-server", []byte("csr")), sig, true},
		{"another's key", &other.PublicKey, b, SignPayload(in, "apid-server", []byte("csr")), sig, false},
		{"another connection", &key.PublicKey, bytes.Repeat([]byte{8}, BindingSize), SignPayload(in, "apid-server", []byte("csr")), sig, false},
		{"no connection", &key.PublicKey, nil, SignPayload(in, "apid-server", []byte("csr")), sig, false},
		{"another profile", &key.PublicKey, b, SignPayload(in, "etcd-root", []byte("csr")), sig, false},
		{"another request", &key.PublicKey, b, SignPayload(in, "apid-server", []byte("CSR")), sig, false},
		{"another instance", &key.PublicKey, b, SignPayload(bytes.Repeat([]byte{2}, InstanceSize), "apid-server", []byte("csr")), sig, false},
		{"for WatchCluster", &key.PublicKey, b, WatchPayload(in), sig, false},
		{"nothing", &key.PublicKey, b, SignPayload(in, "apid-server", []byte("csr")), nil, false},
	} {
		if got := Verify(c.key, c.b, c.load, c.sig); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestSeal(t *testing.T) {
	key, err := NewSealKey()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if key, err = ParseSealKey(raw); err != nil {
		t.Fatal(err)
	}
	sealed, err := Seal(key.PublicKey().Bytes(), "ID", []byte("keys"))
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := Open(key, "ID", sealed); err != nil || string(plain) != "keys" {
		t.Errorf("%q, %v", plain, err)
	}
	if _, err := Open(key, "DI", sealed); err == nil {
		t.Error("what was sealed for another token is opened")
	}
	other, _ := NewSealKey()
	if _, err := Open(other, "ID", sealed); err == nil {
		t.Error("another's key opens it")
	}
	sealed[40] ^= 1
	if _, err := Open(key, "ID", sealed); err == nil {
		t.Error("what was changed on the way is opened")
	}
	if _, err := Seal([]byte("short"), "ID", nil); err == nil {
		t.Error("a short key is taken")
	}
}

func TestParseKey(t *testing.T) {
	for _, c := range []struct {
		curve elliptic.Curve
		ok    bool
	}{{elliptic.P256(), true}, {elliptic.P384(), false}} {
		k, _ := ecdsa.GenerateKey(c.curve, rand.Reader)
		der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseKey(der); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.curve.Params().Name, err)
		}
	}
	if _, err := ParseKey([]byte("x")); err == nil {
		t.Error("garbage is a key")
	}
}

// What is taken for a token is one: written out again it is the same.
func FuzzParse(f *testing.F) {
	f.Add(Token("7F3KQM2X9T", make([]byte, SecretSize)))
	f.Add("7f3kq-m2x9t . ooooo")
	f.Add("")
	testfuzz.Run(f, func(t *testing.T, text string) {
		id, secret, err := Parse(text)
		if err != nil {
			return
		}
		again, same, err := Parse(Token(id, secret))
		if err != nil || again != id || !bytes.Equal(same, secret) {
			t.Errorf("%q is %s and %x, then %s and %x, %v", text, id, secret, again, same, err)
		}
	})
}
