package slots

import (
	"bytes"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

func TestReadKernel(t *testing.T) {
	root := bundle.Sum([]byte("root"))
	good := "console=ttyS0 bulkhead bulkhead.verity=" + root.String() + " bulkhead.epoch=7 quiet"
	for line, want := range map[string]string{
		good:          "",
		good + "\x00": "",
		strings.ToUpper("BULKHEAD.VERITY=") + root.String(): "no root hash",
		"bulkhead": "no root hash",
		good + " bulkhead.verity=" + root.String(): "two root hashes",
		"bulkhead.verity=12":                       "is not a digest",
		good + " bulkhead.epoch=0":                 "epoch \"0\" is not within",
		good + " bulkhead.epoch=64":                "epoch \"64\"",
		good + " bulkhead.epoch=x":                 "epoch \"x\"",
	} {
		uki := makeUKI(line, 100)
		k, err := readKernel(bytes.NewReader(uki), int64(len(uki)))
		if want == "" && (err != nil || k.root != root || k.epoch != 7) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %+v, %v; want …%s…", line, k, err, want)
		}
	}
	uki := makeUKI(good, 100)
	for what, b := range map[string][]byte{"empty": nil, "text": []byte(strings.Repeat("x", 200)), "cut in the table": uki[:300], "cut in the section": uki[:len(uki)-512], "no PE": append([]byte("MZ"), make([]byte, 100)...)} {
		if k, err := readKernel(bytes.NewReader(b), int64(len(b))); err == nil {
			t.Errorf("%s is read as %+v", what, k)
		}
	}
}

// FuzzReadKernel reads whatever lies in EFI/Linux.
func FuzzReadKernel(f *testing.F) {
	f.Add(makeUKI("bulkhead.verity="+bundle.Sum(nil).String(), 100))
	testfuzz.Run(f, func(t *testing.T, b []byte) {
		if k, err := readKernel(bytes.NewReader(b), int64(len(b))); err == nil && k.root == (bundle.Digest{}) {
			t.Error("a kernel that starts nothing")
		}
	})
}

// FuzzNames: what is read as a name of ours is that name when it is written again, but for leading zeros.
func FuzzNames(f *testing.F) {
	f.Add("bulkhead_0012_0.2.0-rc.1+2-1.efi")
	testfuzz.Run(f, func(t *testing.T, file string) {
		n, ok := ParseName(file)
		if !ok {
			return
		}
		if again, ok := ParseName(n.String()); !ok || again != n {
			t.Errorf("%q: %+v, and again %+v", file, n, again)
		}
	})
}
