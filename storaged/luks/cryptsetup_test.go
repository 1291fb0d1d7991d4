package luks

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// file is a volume in a file, which cryptsetup judges: without device-mapper it cannot map it, but all else.
type file struct {
	*os.File
	t *testing.T
}

func newFile(t *testing.T) file {
	t.Helper()
	if _, err := exec.LookPath("cryptsetup"); err != nil {
		if os.Getenv("REQUIRE_ROOT") == "1" {
			t.Fatal("no cryptsetup")
		}
		t.Skip("no cryptsetup: LUKS2 is not compared with it")
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "volume"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(DataOffset + 1<<20); err != nil {
		t.Fatal(err)
	}
	return file{f, t}
}

// tool runs cryptsetup with a key on its standard input.
func (f file) tool(key string, argv ...string) (string, error) {
	f.t.Helper()
	cmd := exec.Command("cryptsetup", append(argv, f.Name())...)
	cmd.Stdin = strings.NewReader(key)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (f file) must(key string, argv ...string) string {
	f.t.Helper()
	out, err := f.tool(key, argv...)
	if err != nil {
		f.t.Errorf("cryptsetup %v: %v\n%s", argv, err, out)
	}
	return out
}

// cryptsetup opens what we make, with the same volume key, and finds nothing to complain about.
func TestCryptsetupOpensOurs(t *testing.T) {
	f := newFile(t)
	h, vk := volume(t, f, "first key")
	human := Human
	human.Time, human.Memory = 4, 32<<10 // cryptsetup is as slow as we are
	if _, err := h.Update(f, vk, Change{Add: key("pass word"), KDF: human, Token: Token{Type: "bulkhead-recovery"}}); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"first key", "pass word"} {
		f.must(k, "open", "--test-passphrase", "--key-file=-")
	}
	if out, err := f.tool("wrong", "open", "--test-passphrase", "--key-file=-"); err == nil {
		t.Errorf("a wrong key: %s", out)
	}
	dump := f.must("", "luksDump")
	for _, want := range []string{"Version:       \t2", h.UUID, "Label:         \ttest", "offset: 16777216", "cipher: aes-xts-plain64", "sector: 4096 [bytes]", "argon2id", "bulkhead-recovery", "Keyslot:    1"} {
		if !strings.Contains(dump, want) {
			t.Errorf("luksDump has no %q:\n%s", want, dump)
		}
	}
	out := filepath.Join(t.TempDir(), "key")
	f.must("first key", "luksDump", "--dump-volume-key", "--volume-key-file", out, "--batch-mode", "--key-file=-")
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, vk.Expose()) {
		t.Errorf("the volume keys differ: %v", err)
	}
	f.must("", "luksDump", "--debug-json") // parses and checks every field

	// It changes what we made, and we read what it left.
	f.must("", "token", "remove", "--token-id", "0")
	add := filepath.Join(t.TempDir(), "add")
	if err := os.WriteFile(add, []byte("its key"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cryptsetup", "luksAddKey", "--key-file=-", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", f.Name(), add)
	cmd.Stdin = strings.NewReader("first key")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("luksAddKey: %v\n%s", err, out)
	}
	got := opens(t, f, vk, "first key", "its key")
	if !slices.Equal(got, []string{"first key", "its key"}) {
		t.Errorf("opened by %v", got)
	}
	h, health, err := Read(f)
	if err != nil || !health.OK() {
		t.Fatalf("%v, %v", health, err)
	}
	if len(h.Tokens) != 1 || len(h.Keyslots) != 3 {
		t.Errorf("%d tokens, %d keyslots", len(h.Tokens), len(h.Keyslots))
	}
	if _, err := h.Update(f, vk, Change{Remove: []int{0}}); err != nil {
		t.Fatal(err)
	}
	f.must("its key", "open", "--test-passphrase", "--key-file=-")
	if out, err := f.tool("first key", "open", "--test-passphrase", "--key-file=-"); err == nil {
		t.Errorf("a removed key opens it: %s", out)
	}
	f.must("its key", "luksKillSlot", "--key-file=-", f.Name(), "1") // and once more the other way
	if got := opens(t, f, vk, "its key", "pass word"); !slices.Equal(got, []string{"its key"}) {
		t.Errorf("opened by %v", got)
	}
}

// We open what cryptsetup makes, add a slot, and it opens that.
func TestWeOpenCryptsetups(t *testing.T) {
	for _, args := range [][]string{
		{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32768", "--pbkdf-parallel", "2", "--sector-size", "4096"},
		{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512", "--key-size", "256", "--luks2-metadata-size", "64k"},
	} {
		f := newFile(t)
		f.must("theirs", append([]string{"luksFormat", "--type", "luks2", "--batch-mode", "--key-file=-", "--label", "theirs"}, args...)...)
		// A foreign token is kept as it is.
		cmd := exec.Command("cryptsetup", "token", "import", f.Name())
		cmd.Stdin = strings.NewReader(`{"type":"example","keyslots":["0"],"deep":{"a":[1,2,3]}}`)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("token import: %v\n%s", err, out)
		}
		h, health, err := Read(f)
		if err != nil || !health.OK() {
			t.Fatalf("%v: %v, %v", args, health, err)
		}
		vk, _, err := h.Open(f, key("theirs"))
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		if _, err := h.Update(f, vk, Change{Add: key("ours"), KDF: quick}); err != nil {
			t.Fatal(err)
		}
		f.must("ours", "open", "--test-passphrase", "--key-file=-")
		f.must("theirs", "open", "--test-passphrase", "--key-file=-")
		var doc struct {
			Tokens map[string]struct {
				Type string
				Deep struct{ A []int }
			}
		}
		if err := json.Unmarshal([]byte(f.must("", "luksDump", "--dump-json-metadata")), &doc); err != nil {
			t.Fatal(err)
		}
		if got := doc.Tokens["0"]; got.Type != "example" || !slices.Equal(got.Deep.A, []int{1, 2, 3}) {
			t.Errorf("the foreign token is now %+v", got)
		}
	}
}

// cryptsetup repairs from the copy that we left when the power failed in between, and takes the same one as we do.
func TestCryptsetupTakesTheNewer(t *testing.T) {
	f := newFile(t)
	h, vk := volume(t, f, "a")
	old := make([]byte, headerSize)
	if _, err := f.ReadAt(old, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Update(f, vk, Change{Add: key("b"), KDF: quick}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(old, 0); err != nil { // as if the first copy was never written
		t.Fatal(err)
	}
	if got := opens(t, f, vk, "a", "b"); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("opened by %v", got)
	}
	f.must("b", "open", "--test-passphrase", "--key-file=-")
	if _, health, err := Read(f); err != nil || !health.OK() {
		t.Errorf("cryptsetup did not repair it: %v, %v", health, err)
	}
}
