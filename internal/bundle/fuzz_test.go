package bundle

import (
	"bytes"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

// What Parse takes, Encode writes again, byte for byte.
func FuzzManifest(f *testing.F) {
	head, _ := sample(f)
	f.Add(head.Raw)
	f.Add(bytes.ToUpper(head.Raw))
	f.Add(bytes.Replace(head.Raw, []byte(`{"format":1`), []byte(`{"format":2,"format":1`), 1))
	f.Add(append(bytes.TrimSpace(head.Raw), " \n"...))
	testfuzz.Run(f, func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		if again, err := m.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%v: read %q, wrote %q", err, b, again)
		}
	})
}

// Whatever a bundle is made of, chunks come out only if they are those of the signed manifest.
func FuzzReader(f *testing.F) {
	var b bytes.Buffer
	head, err := Write(&b, image(f, noise(1, 3000), noise(2, 20_000), noise(3, 512)), key(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:5000])
	f.Add(bytes.Replace(b.Bytes(), []byte("ustar\x0000"), []byte("ustar  \x00"), 1))
	testfuzz.Run(f, func(t *testing.T, data []byte) {
		r, err := NewReader(bytes.NewReader(data), Keys{public(key(1))})
		if err != nil {
			return
		}
		if !bytes.Equal(r.Raw, head.Raw) {
			t.Fatalf("another manifest has our signature: %q", r.Raw)
		}
		_ = r.Each(func(file, chunk int, c []byte) error {
			if Sum(c) != head.Manifest.Files[file].Chunks[chunk].SHA256 {
				t.Errorf("file %d chunk %d is not the signed one", file, chunk)
			}
			return nil
		})
	})
}
