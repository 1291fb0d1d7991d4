package enrol

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// list is a signature list of one certificate.
func list(kind gpt.GUID, cert string) []byte {
	id := kind.OnDisk()
	out := le.AppendUint32(id[:], uint32(28+16+len(cert)))
	out = le.AppendUint32(out, 0)
	out = le.AppendUint32(out, uint32(16+len(cert)))
	return append(append(out, make([]byte, 16)...), cert...)
}

// auth is an update with a made-up signature.
func auth(value []byte) []byte {
	const signature = "signature"
	out := le.AppendUint32(make([]byte, 16), uint32(24+len(signature)))
	out = le.AppendUint16(out, 0x0200)
	out = le.AppendUint16(out, 0x0ef1)
	out = append(append(out, make([]byte, 16)...), signature...)
	return append(out, value...)
}

// image is the least of a PE image that has signatures.
func image(signatures string) []byte {
	b := make([]byte, 512)
	copy(b, "MZ")
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[64+24:], 0x20b)
	le.PutUint32(b[64+24+144:], uint32(len(b)))
	le.PutUint32(b[64+24+148:], uint32(len(signatures)))
	return append(b, signatures...)
}

// firmware is one in setup mode, and the folder with the keys for it.
func firmware(t *testing.T) (Firmware, string) {
	t.Helper()
	vars, keys := t.TempDir(), t.TempDir()
	put(t, filepath.Join(vars, "SetupMode"+global), []byte{6, 0, 0, 0, 1})
	put(t, filepath.Join(vars, "SecureBoot"+global), []byte{6, 0, 0, 0, 0})
	for _, n := range names {
		put(t, filepath.Join(keys, n.name+".auth"), auth(list(typeX509, "certificate "+n.name)))
	}
	return Firmware(vars), keys
}

func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestEnrol(t *testing.T) {
	f, dir := firmware(t)
	if s, err := f.State(); err != nil || s != (State{Setup: true}) {
		t.Errorf("%+v, %v", s, err)
	}
	keys, err := ReadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Enrol(keys); err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		got, err := os.ReadFile(filepath.Join(string(f), n.file))
		if want := append([]byte{0x27, 0, 0, 0}, keys[n.name].signed...); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: wrote %q, %v", n.name, got, err)
		}
	}
	if names[len(names)-1].name != "PK" {
		t.Error("the platform key is not the last: the firmware takes nothing after it")
	}
}

// What is there stays: ours, from a try that was interrupted, and somebody else's, with which nothing is written.
func TestEnrolAgain(t *testing.T) {
	f, dir := firmware(t)
	keys, err := ReadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	ours := append([]byte{0x27, 0, 0, 0}, keys["db"].value...) // a firmware shows the value without its signature
	put(t, filepath.Join(string(f), "db"+security), ours)
	put(t, filepath.Join(string(f), "KEK"+global), append([]byte{0x27, 0, 0, 0}, list(typeX509, "Contoso")...))
	if err := f.Enrol(keys); err == nil || !strings.Contains(err.Error(), "has a KEK of somebody else's: delete all") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(string(f), "PK"+global)); err == nil {
		t.Error("PK was written")
	}
	if err := os.Remove(filepath.Join(string(f), "KEK"+global)); err != nil {
		t.Fatal(err)
	}
	if err := f.Enrol(keys); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(string(f), "db"+security)); err != nil || !bytes.Equal(got, ours) {
		t.Errorf("db was written again: %v", err)
	}
}

func TestReadKeysRefuses(t *testing.T) {
	for name, data := range map[string][]byte{
		"empty": {}, "no signature": list(typeX509, "x"), "cut off": auth(list(typeX509, "x"))[:45], "nothing behind it": auth(nil), "too long": make([]byte, maxUpdate+1),
	} {
		_, dir := firmware(t)
		put(t, filepath.Join(dir, "KEK.auth"), data)
		if _, err := ReadKeys(dir); err == nil || !strings.Contains(err.Error(), "KEK.auth: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCovers(t *testing.T) {
	_, dir := firmware(t)
	keys, err := ReadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	long := image("x")
	le.PutUint32(long[64+24+148:], 4096)
	for name, c := range map[string]struct {
		image []byte
		want  bool
		err   string
	}{
		"ours": {image("pkcs7 certificate db pkcs7"), true, ""}, "unsigned": {image(""), false, ""}, "another's": {image("certificate KEK"), false, ""},
		"no image": {[]byte(strings.Repeat("x", 600)), false, "no PE image"}, "short": {[]byte("MZ"), false, "no PE image"}, "signatures outside": {long, false, "outside"},
		"a 32-bit one": {bytes.Replace(image("certificate db"), []byte{0x0b, 2}, []byte{0x0b, 1}, 1), false, "64-bit"},
	} {
		got, err := keys.Covers(bytes.NewReader(c.image), int64(len(c.image)))
		if got != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzCertificates(f *testing.F) {
	f.Add(list(typeX509, "a certificate"))
	f.Add(append(list(gpt.Root, "a digest"), list(typeX509, "another")...))
	testfuzz.Run(f, func(t *testing.T, lists []byte) {
		found, err := certificates(lists)
		if err == nil && len(slices.Concat(found...)) > len(lists) {
			t.Errorf("%d certificates out of %d bytes", len(found), len(lists))
		}
	})
}

func FuzzSignatures(f *testing.F) {
	f.Add(image("signatures"))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		if table, err := signatures(bytes.NewReader(data), int64(len(data))); err == nil && len(table) > len(data) {
			t.Errorf("%d bytes of signatures in an image of %d", len(table), len(data))
		}
	})
}
