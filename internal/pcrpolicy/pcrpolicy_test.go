package pcrpolicy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func testKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, keyBits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestPredict(t *testing.T) {
	// By hand: of zeros, H(".linux\0"), H("a").
	name, data := hash([]byte(".linux\x00")), hash([]byte("a"))
	want := hash(make([]byte, 32), name[:])
	want = hash(want[:], data[:])
	got, err := PredictPCR11([]Section{{".linux", []byte("a")}, {".sbat", nil}, {".pcrsig", []byte("x")}})
	if err != nil || got != want {
		t.Errorf("got %x, %v; want %x", got, err, want)
	}
	a := []Section{{".linux", []byte("a")}, {".osrel", []byte("b")}, {".ucode", []byte("c")}}
	b := []Section{a[2], a[0], a[1]}
	one, _ := PredictPCR11(a)
	two, _ := PredictPCR11(b)
	if one != two {
		t.Error("the order of sections matters")
	}
	for name, bad := range map[string][]Section{
		"twice": {a[0], a[0]}, "unknown": {{".profile", []byte("a")}}, "without the dot": {{"linux", []byte("a")}},
	} {
		if _, err := PredictPCR11(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestEpochBits(t *testing.T) {
	for epoch, want := range map[int]uint64{1: 1, 2: 3, 5: 31, 63: 1<<63 - 1} {
		if got, err := EpochBits(epoch); got != want || err != nil {
			t.Errorf("epoch %d: %x, %v; want %x", epoch, got, err, want)
		}
	}
	for _, epoch := range []int{-1, 0, 64} {
		if _, err := EpochBits(epoch); err == nil {
			t.Errorf("epoch %d accepted", epoch)
		}
	}
}

func TestSign(t *testing.T) {
	key := testKey(t)
	p := Policy{PCR11: Digest{1}, Epoch: 3}
	data, err := Sign(key, p)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Sign(key, p)
	if err != nil || !bytes.Equal(data, again) {
		t.Errorf("a second signature is another one: %v", err)
	}
	s, err := ParseSignature(append(data, '\n', 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	want, _ := p.Digest()
	if err := s.Verify(&key.PublicKey); err != nil || s.Policy != want {
		t.Errorf("got %x, %v; want %x", s.Policy, err, want)
	}
	if err := s.Verify(&testKey(t).PublicKey); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("another key: %v", err)
	}
	s.Policy[0]++
	if err := s.Verify(&key.PublicKey); err == nil {
		t.Error("another policy verifies")
	}
	if _, err := Sign(key, Policy{Epoch: 0}); err == nil {
		t.Error("epoch 0 was signed")
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Sign(ec, p); err == nil {
		t.Error("an elliptic key signs")
	}
	if _, err := Sign(small, p); err == nil {
		t.Error("a key of 3072 bits signs")
	}
	for field, change := range map[string]func(*Policy){"PCR 11": func(p *Policy) { p.PCR11[31]++ }, "epoch": func(p *Policy) { p.Epoch++ }} {
		q := p
		change(&q)
		if d, _ := q.Digest(); d == want {
			t.Errorf("%s is not in the digest", field)
		}
	}
}

func TestParseSignatureRefuses(t *testing.T) {
	data, err := Sign(testKey(t), Policy{Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	good := string(data)
	for name, bad := range map[string]string{
		"nothing": "", "no entry": `{"sha256":[]}`, "two entries": strings.Replace(good, "]}", ","+good[len(`{"sha256":[`):], 1),
		"another bank": strings.Replace(good, "sha256", "sha1", 1), "another PCR": strings.Replace(good, "[11]", "[7]", 1), "more PCRs": strings.Replace(good, "[11]", "[11,12]", 1),
		"something behind": good + "{}", "an unknown field": strings.Replace(good, `"pkfp"`, `"x":1,"pkfp"`, 1), "too long": good + strings.Repeat(" ", maxSignature),
		"short signature": strings.Replace(good, `"sig":"`, `"sig":"AAAA","sig":"AAAA","x`, 1), "short policy": strings.Replace(good, `"pol":"`, `"pol":"aa","y`, 1), "no JSON": "pcrs",
	} {
		if s, err := ParseSignature([]byte(bad)); err == nil {
			t.Errorf("%s: accepted as %+v", name, s)
		}
	}
}

func TestParseKey(t *testing.T) {
	key := testKey(t)
	text, err := EncodeKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseKey(append(text, 0))
	if err != nil || !got.Equal(&key.PublicKey) {
		t.Errorf("got %v, %v", got, err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&ec.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	for name, bad := range map[string][]byte{
		"nothing": nil, "elliptic": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), "private": private, "two": append(bytes.Clone(text), text...),
		"long": append(bytes.Clone(text), make([]byte, maxKey)...), "no DER": []byte("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
	} {
		if _, err := ParseKey(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// As openssl rsa -RSAPublicKey_out -outform DER | sha256sum has it.
	print := Fingerprint(&key.PublicKey)
	if want := hash(x509.MarshalPKCS1PublicKey(&key.PublicKey)); print != want {
		t.Errorf("fingerprint %s", hex.EncodeToString(print[:]))
	}
}

// What is accepted has the right form, and is the same when it is written again.
func FuzzParseSignature(f *testing.F) {
	data, err := Sign(testKey(f), Policy{Epoch: 1})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"sha256":[{"pcrs":[11],"pkfp":"","pol":"","sig":""}]}`))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		s, err := ParseSignature(data)
		if err == nil && len(s.Signature) != keyBits/8 {
			t.Errorf("a signature of %d bytes", len(s.Signature))
		}
		again, err2 := ParseSignature(bytes.TrimRight(data, "\x00 \r\n"))
		if (err == nil) != (err2 == nil) && len(data) <= maxSignature || err == nil && !reflect.DeepEqual(s, again) {
			t.Errorf("what stands behind counts: %v, %v", err, err2)
		}
	})
}

// Whatever is read as a key can be written and read again.
func FuzzParseKey(f *testing.F) {
	text, err := EncodeKey(&testKey(f).PublicKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		key, err := ParseKey(data)
		if err != nil {
			return
		}
		text, err := EncodeKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseKey(text); err != nil || !again.Equal(key) {
			t.Errorf("%v", err)
		}
	})
}
