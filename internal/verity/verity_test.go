package verity

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func data(blocks int) []byte {
	b := make([]byte, blocks*BlockSize)
	rand.NewChaCha8([32]byte{byte(blocks)}).Read(b)
	return b
}

func TestBadInput(t *testing.T) {
	tests := []struct {
		data, salt []byte
		want       string
	}{
		{nil, nil, "no data"},
		{make([]byte, BlockSize+1), nil, "block 1: unexpected EOF"},
		{make([]byte, BlockSize), make([]byte, 257), "salt of 257 bytes"},
	}
	for _, test := range tests {
		if _, err := Build(bytes.NewReader(test.data), test.salt, [16]byte{}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %v, want %q", err, test.want)
		}
	}
}

// TestOracle lets veritysetup judge: sizes at and around the edges of one, two and three levels.
func TestOracle(t *testing.T) {
	veritysetup, err := exec.LookPath("veritysetup")
	if err != nil {
		t.Skip("no veritysetup")
	}
	salt := []byte("some salt of no special length")
	for _, blocks := range []int{1, 2, 127, 128, 129, 500, 128 * 128, 128*128 + 1} {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			tree, err := Build(bytes.NewReader(data(blocks)), salt, [16]byte{1})
			if err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			n, err := tree.WriteTo(&b)
			if err != nil || n != tree.Size() || n != int64(b.Len()) {
				t.Fatalf("WriteTo: %d, %v; Size %d, wrote %d", n, err, tree.Size(), b.Len())
			}
			dir := t.TempDir()
			d, h, theirs := filepath.Join(dir, "data"), filepath.Join(dir, "hash"), filepath.Join(dir, "theirs")
			write(t, d, data(blocks))
			write(t, h, b.Bytes())
			write(t, theirs, nil)
			root := hex.EncodeToString(tree.Root[:])
			if out, err := exec.Command(veritysetup, "verify", d, h, root).CombinedOutput(); err != nil {
				t.Errorf("veritysetup verify: %v\n%s", err, out)
			}
			out, err := exec.Command(veritysetup, "format", "--salt", hex.EncodeToString(salt),
				"--uuid", "01000000-0000-0000-0000-000000000000", d, theirs).CombinedOutput()
			if err != nil || !strings.Contains(string(out), root) {
				t.Errorf("veritysetup format: %v\n%s\nwant root %s", err, out, root)
			}
			if got, err := os.ReadFile(theirs); err != nil || !bytes.Equal(got, b.Bytes()) {
				t.Errorf("our tree of %d bytes differs from veritysetup's of %d", b.Len(), len(got))
			}
		})
	}
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
