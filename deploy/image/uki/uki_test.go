package uki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

var (
	at   = time.Unix(1735689600, 0)
	pair = sync.OnceValue(func() [2]Signer { return [2]Signer{newSigner("ours"), newSigner("theirs")} })
)

func newSigner(name string) Signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotBefore: at, NotAfter: at.AddDate(50, 0, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return Signer{key, cert}
}

// aStub is a PE file with two sections and a header that has room for a few more, as systemd's stub is.
func aStub() []byte {
	b := make([]byte, 0x800)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], 0x40)
	copy(b[0x40:], "PE\x00\x00\x64\x86\x02\x00")
	le.PutUint16(b[0x54:], 240)    // SizeOfOptionalHeader
	le.PutUint16(b[0x56:], 0x22e)  // Characteristics
	opt := b[0x58:]                //
	le.PutUint16(opt, 0x20b)       //
	le.PutUint32(opt[32:], 0x1000) // SectionAlignment
	le.PutUint32(opt[36:], 0x200)  // FileAlignment
	le.PutUint32(opt[56:], 0x3000) // SizeOfImage
	le.PutUint32(opt[60:], 0x400)  // SizeOfHeaders
	le.PutUint16(opt[68:], 10)     // EFI application
	le.PutUint32(opt[108:], 16)    // data directories
	for i, name := range []string{".text", ".sbat"} {
		h := b[0x58+240+i*40:]
		copy(h, name)
		le.PutUint32(h[8:], 0x123)
		le.PutUint32(h[12:], uint32(0x1000*(i+1)))
		le.PutUint32(h[16:], 0x200)
		le.PutUint32(h[20:], uint32(0x400+0x200*i))
		copy(b[0x400+0x200*i:], name+" content")
	}
	return b
}

func built(t *testing.T) []byte {
	t.Helper()
	image, err := Build(aStub(), []Section{{".linux", bytes.Repeat([]byte("kernel "), 5000)}, {".cmdline", []byte("a b\x00")}, {".initrd", []byte{1}}})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func signed(t *testing.T) []byte {
	t.Helper()
	image, err := Sign(built(t), pair()[0], at)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestBuild(t *testing.T) {
	image := built(t)
	sections, err := Sections(image)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range sections {
		names = append(names, s.Name)
	}
	if got := strings.Join(names, " "); got != ".text .sbat .linux .cmdline .initrd" {
		t.Errorf("sections: %s", got)
	}
	if got := sections[3].Data; string(got) != "a b\x00" {
		t.Errorf(".cmdline is %q: its length is not the data's", got)
	}
	if got := sections[1].Data; len(got) != 0x123 {
		t.Errorf(".sbat has %d bytes", len(got))
	}
	p, err := parse(image)
	if err != nil {
		t.Fatal(err)
	}
	// .linux has 35000 bytes: what follows starts behind it, not at an address that somebody once thought far enough.
	if va := p.sections[3].va; va != up(p.sections[2].va+35000, 4096) {
		t.Errorf(".cmdline is loaded at %#x, .linux ends at %#x", va, p.sections[2].va+35000)
	}
	if size := int(le.Uint32(image[p.optional+56:])); size != up(p.memoryEnd(), 4096) {
		t.Errorf("SizeOfImage is %#x", size)
	}
}

func TestBuildRefuses(t *testing.T) {
	var many []Section
	for c := 'a'; c < 'q'; c++ {
		many = append(many, Section{"." + string(c), []byte{1}})
	}
	more := append(aStub(), 1, 2, 3, 4, 5, 6, 7, 8)
	for _, c := range []struct {
		stub     []byte
		sections []Section
		want     string
	}{
		{nil, nil, "stub: not a PE file"},
		{signed(t), nil, "behind its sections: a signature?"},
		{more, nil, "has 8 bytes behind its sections"},
		{aStub(), many, "room for 17 sections, it has 2 and 16 are to be added"},
		{aStub(), []Section{{".sbat", []byte{1}}}, `section ".sbat": is there already`},
		{aStub(), []Section{{".a", nil}}, "0 bytes are not 1 to"},
		{aStub(), []Section{{".ninechar", []byte{1}}}, "a name is a dot and"},
		{aStub(), []Section{{"linux", []byte{1}}}, "a name is a dot and"},
	} {
		if _, err := Build(c.stub, c.sections); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

func TestSignAndVerify(t *testing.T) {
	image, ours, theirs := signed(t), pair()[0], pair()[1]
	if err := Verify(image, ours.Certificate); err != nil {
		t.Error(err)
	}
	if again := signed(t); !bytes.Equal(again, image) {
		t.Error("two signatures of the same differ")
	}
	before, err := Digest(built(t))
	if err != nil {
		t.Fatal(err)
	}
	if after, err := Digest(image); err != nil || after != before {
		t.Errorf("the digest changed with the signature: %v", err)
	}
	if err := Verify(image, theirs.Certificate); err == nil || !strings.Contains(err.Error(), `somebody else than "theirs"`) {
		t.Errorf("foreign: %v", err)
	}
	if err := Verify(built(t), ours.Certificate); err != ErrUnsigned {
		t.Errorf("unsigned: %v", err)
	}
	both, err := Sign(image, theirs, at)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range pair() {
		if err := Verify(both, s.Certificate); err != nil {
			t.Errorf("two signatures, %s: %v", s.Certificate.Subject.CommonName, err)
		}
	}
	// Every byte counts but for those that are the signature itself, or say where it is.
	p, err := parse(image)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(image); i += 1 + i/97 {
		outside := i >= p.checksum && i < p.checksum+4 || i >= p.certificates // the signature has parts that nobody signs
		changed := bytes.Clone(image)
		changed[i] ^= 0x10
		if err := Verify(changed, ours.Certificate); (err == nil) && !outside {
			t.Fatalf("byte %d of %d changed, and the signature holds", i, len(image))
		}
	}
}

func TestSignRefuses(t *testing.T) {
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for want, s := range map[string]Signer{
		"firmware knows RSA only":                        {curve, pair()[0].Certificate},
		`does not belong to the certificate of "theirs"`: {pair()[0].Key, pair()[1].Certificate},
		`sign with the key of "ours": the token is gone`: {gone{pair()[0].Key}, pair()[0].Certificate},
	} {
		if _, err := Sign(built(t), s, at); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// gone is a key that cannot be reached.
type gone struct{ crypto.Signer }

func (gone) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the token is gone")
}

// TestDamaged changes one field after the other: each is refused with a reason, none is believed.
func TestDamaged(t *testing.T) {
	for want, change := range map[string]func([]byte) []byte{
		"not a PE file":                     func(b []byte) []byte { return b[:0x30] },
		"not a PE file: no PE header":       func(b []byte) []byte { le.PutUint32(b[0x3c:], 0xfffffff0); return b },
		"magic number is 0x10b":             func(b []byte) []byte { le.PutUint16(b[0x58:], 0x10b); return b },
		"with 4294967295 data directories":  func(b []byte) []byte { le.PutUint32(b[0x58+108:], 1<<32-1); return b },
		"65535 sections do not fit":         func(b []byte) []byte { le.PutUint16(b[0x46:], 65535); return b },
		"alignments 4097":                   func(b []byte) []byte { le.PutUint32(b[0x58+32:], 4097); return b },
		"headers of 2147483136 bytes in":    func(b []byte) []byte { le.PutUint32(b[0x58+60:], 1<<31-512); return b },
		"headers of 1023 bytes, not a":      func(b []byte) []byte { le.PutUint32(b[0x58+60:], 1023); return b },
		`".sbat" has 511 bytes, not a`:      func(b []byte) []byte { le.PutUint32(b[0x148+40+16:], 511); return b },
		`section ".text" starts at 1025`:    func(b []byte) []byte { le.PutUint32(b[0x148+20:], 1025); return b },
		"longer than the file":              func(b []byte) []byte { le.PutUint32(b[0x148+40+16:], 1<<32-512); return b },
		`section ".sbat" is loaded at 0x0:`: func(b []byte) []byte { le.PutUint32(b[0x148+40+12:], 0); return b },
		"certificate table of 9 bytes":      func(b []byte) []byte { le.PutUint32(b[0x58+144+4:], 9); return b },
	} {
		if _, err := parse(change(aStub())); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// nobody is a certificate without a key: making keys takes minutes where the fuzzer counts every step.
func nobody() *x509.Certificate {
	n := new(big.Int).Lsh(big.NewInt(1), 2047)
	return &x509.Certificate{PublicKey: &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}, RawIssuer: []byte{0x30, 0}, SerialNumber: big.NewInt(1)}
}

func FuzzParse(f *testing.F) {
	f.Add(aStub())
	f.Add(slices.Concat(aStub(), []byte{16, 0, 0, 0, 0, 2, 2, 0, 0x30, 0, 0, 0, 0, 0, 0, 0}))
	testfuzz.Run(f, func(t *testing.T, b []byte) {
		p, err := parse(b)
		if err != nil {
			return
		}
		if p.end > len(b) || p.certificates < p.end || p.certificates > len(b) {
			t.Fatalf("%+v of %d bytes", p, len(b))
		}
		if Verify(b, nobody()) == nil {
			t.Error("signed by a key that does not exist")
		}
		image, err := Build(b, []Section{{".added", []byte("x")}})
		if err != nil {
			return
		}
		if got, err := Sections(image); err != nil || string(got[len(got)-1].Data) != "x" {
			t.Errorf("what Build made is not read: %v", err)
		}
	})
}

func FuzzVerify(f *testing.F) {
	digest := sha256.Sum256(nil)
	seed := Signer{fixed{nobody().PublicKey}, nobody()}
	der, err := authenticode(digest, seed, at)
	if err != nil {
		f.Fatal(err)
	}
	if err := checkAuthenticode(der, digest, nobody()); err == nil || !strings.Contains(err.Error(), "verification error") {
		f.Fatalf("the seed gets as far as %v", err)
	}
	f.Add(der)
	testfuzz.Run(f, func(t *testing.T, der []byte) {
		if checkAuthenticode(der, digest, nobody()) == nil {
			t.Error("signed by a key that does not exist")
		}
	})
}

// fixed signs everything with the same zeros.
type fixed struct{ public crypto.PublicKey }

func (f fixed) Public() crypto.PublicKey { return f.public }

func (fixed) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return make([]byte, 256), nil
}

func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func certificate(t *testing.T, s Signer) string {
	t.Helper()
	return write(t, "crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate.Raw}))
}

// TestOracle lets sbverify judge our signatures, and us those of sbsign.
func TestOracle(t *testing.T) {
	sbverify, sbsign := testtool.Path(t, "sbverify", "sbsigntool"), testtool.Path(t, "sbsign", "sbsigntool")
	ours, theirs := certificate(t, pair()[0]), certificate(t, pair()[1])
	image := write(t, "image", signed(t))
	if out := testtool.Run(t, sbverify, "--cert", ours, image); strings.Contains(out, "warning") {
		t.Errorf("sbverify says: %s", out)
	}
	if out, err := exec.Command(sbverify, "--cert", theirs, image).CombinedOutput(); err == nil {
		t.Errorf("sbverify takes another's certificate: %s", out)
	}
	changed := signed(t)
	changed[0x500] ^= 1
	if out, err := exec.Command(sbverify, "--cert", ours, write(t, "changed", changed)).CombinedOutput(); err == nil {
		t.Errorf("sbverify takes a changed image: %s", out)
	}
	der, err := x509.MarshalPKCS8PrivateKey(pair()[0].Key)
	if err != nil {
		t.Fatal(err)
	}
	key := write(t, "key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	out := filepath.Join(t.TempDir(), "out")
	testtool.Run(t, sbsign, "--key", key, "--cert", ours, "--output", out, write(t, "plain", built(t)))
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(b, pair()[0].Certificate); err != nil {
		t.Errorf("what sbsign signed: %v", err)
	}
}

// TestVariable lets sbsiglist judge the lists, and openssl the signature of an update.
func TestVariable(t *testing.T) {
	s := pair()[0]
	v := Variable{"db", ImageSecurity, Certificates(s.Certificate)}
	list := filepath.Join(t.TempDir(), "list")
	testtool.Run(t, testtool.Path(t, "sbsiglist", "sbsigntool"), "--owner", Owner.String(), "--type", "x509", "--output", list, write(t, "der", s.Certificate.Raw))
	if want, err := os.ReadFile(list); err != nil || !bytes.Equal(v.Value, want) {
		t.Errorf("sbsiglist makes another list of %d bytes, ours has %d: %v", len(want), len(v.Value), err)
	}
	sum := sha256.Sum256(nil)
	testtool.Run(t, testtool.Path(t, "sbsiglist", "sbsigntool"), "--owner", Owner.String(), "--type", "sha256", "--output", list, write(t, "sum", sum[:]))
	if want, err := os.ReadFile(list); err != nil || !bytes.Equal(Digests(sum), want) {
		t.Errorf("sbsiglist makes another list of a digest: %v", err)
	}
	b, err := v.Update(s, at)
	if err != nil {
		t.Fatal(err)
	}
	if stamp := []byte{0xe9, 7, 1, 1, 0, 0, 0, 0}; !bytes.HasPrefix(b, stamp) {
		t.Errorf("time is % x, want % x", b[:16], stamp)
	}
	length := int(le.Uint32(b[16:]))
	if !bytes.Equal(b[16+length:], v.Value) {
		t.Fatal("the value does not follow the signature")
	}
	der, err := asn1.Marshal(contentInfo{oidSignedData, wrap(asn1.ClassContextSpecific, 0, b[16+24:16+length])})
	if err != nil {
		t.Fatal(err)
	}
	id := ImageSecurity.OnDisk()
	text := slices.Concat([]byte("d\x00b\x00"), id[:], []byte{0x27, 0, 0, 0}, b[:16], v.Value)
	testtool.Run(t, testtool.Path(t, "openssl", "openssl"), "smime", "-verify", "-inform", "DER", "-in", write(t, "p7", der),
		"-content", write(t, "text", text), "-binary", "-noverify", "-certfile", certificate(t, s), "-out", os.DevNull)
}
