package image

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/testtool"
)

var keysFolder string // for testKeys, removed after the last test

// testKeys makes one set of keys for all tests: it takes a second.
var testKeys = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(keysFolder, "keys")
	return dir, MakeKeys(dir, time.Unix(1750000000, 0))
})

func TestMain(m *testing.M) {
	var err error
	if keysFolder, err = os.MkdirTemp("", "bulkhead-keys-"); err != nil {
		panic(err)
	}
	code := m.Run()
	os.RemoveAll(keysFolder)
	os.Exit(code)
}

// copyKeys returns a folder with the test's keys that may be damaged.
func copyKeys(t *testing.T) string {
	t.Helper()
	from, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "keys")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestKeys(t *testing.T) {
	dir, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	k, err := LoadKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secureBoot {
		if got := k.Certificates[s.name].Subject.CommonName; got != s.common {
			t.Errorf("%s is the certificate of %q", s.name, got)
		}
		if fi, err := os.Stat(filepath.Join(dir, s.name+".key")); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s.key: %v, %v", s.name, fi, err)
		}
		if !bytes.Contains(k.Enrol[s.name+".auth"], k.Certificates[s.name].Raw) {
			t.Errorf("%s.auth does not hold %s.crt", s.name, s.name)
		}
	}
	texts, err := k.texts()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range texts {
		if on, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(on, text) {
			t.Errorf("%s: %v: the file differs from what the image would hold", name, err)
		}
	}
	openssl := testtool.Path(t, "openssl", "openssl")
	for _, name := range []string{"pcr", "release"} {
		if out := testtool.Run(t, openssl, "pkey", "-in", filepath.Join(dir, name+".key"), "-pubout"); out != string(texts[name+".pub"]) {
			t.Errorf("openssl's public key of %s:\n%s", name, out)
		}
	}
	if err := MakeKeys(dir, time.Now()); err == nil || !strings.Contains(err.Error(), "is not replaced") {
		t.Errorf("made again: %v", err)
	}
}

func TestKeysRefused(t *testing.T) {
	if _, err := LoadKeys(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "mkimage keys --out") {
		t.Errorf("no folder: %v", err)
	}
	for want, damage := range map[string]struct{ file, from string }{
		"db.key: no such file":               {"db.key", ""},
		"KEK.auth: no such file":             {"KEK.auth", ""},
		"db.key does not belong to db.crt":   {"db.key", "PK.key"},
		"pcr is ed25519.PublicKey, want RSA": {"pcr.key", "release.key"},
		"release is *rsa.PublicKey, want":    {"release.key", "pcr.key"},
		"db.crt: no PEM block CERTIFICATE":   {"db.crt", "pcr.pub"},
	} {
		dir := copyKeys(t)
		if err := os.Remove(filepath.Join(dir, damage.file)); err != nil {
			t.Fatal(err)
		}
		if damage.from != "" {
			if err := os.Link(filepath.Join(dir, damage.from), filepath.Join(dir, damage.file)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := LoadKeys(dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	// PK and KEK may be locked away.
	dir := copyKeys(t)
	for _, name := range []string{"PK.key", "KEK.key"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := LoadKeys(dir); err != nil {
		t.Errorf("without PK.key and KEK.key: %v", err)
	}
}
