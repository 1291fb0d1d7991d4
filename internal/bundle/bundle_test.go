package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// key returns a signing key that is always the same for a seed.
func key(seed byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
}

func public(k ed25519.PrivateKey) ed25519.PublicKey { return k.Public().(ed25519.PublicKey) }

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// image writes three files with those contents and returns an image of them.
func image(t testing.TB, kernel, root, tree []byte) Image {
	t.Helper()
	img := Image{Version: "1.2.3", Minimum: "1.0.0", Architecture: "amd64", Epoch: 2, RootHash: Sum(root)}
	dir := t.TempDir()
	for i, b := range [][]byte{kernel, root, tree} {
		img.Files[i] = filepath.Join(dir, fileNames[i])
		if err := os.WriteFile(img.Files[i], b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// sample is a bundle of three small files.
func sample(t testing.TB) (Head, []byte) {
	t.Helper()
	var b bytes.Buffer
	h, err := Write(&b, image(t, noise(1, 70_000), noise(2, 900_000), noise(3, 8192)), key(1))
	if err != nil {
		t.Fatal(err)
	}
	return h, b.Bytes()
}

func TestWriteRead(t *testing.T) {
	head, data := sample(t)
	r, err := NewReader(bytes.NewReader(data), Keys{public(key(9)), public(key(1))})
	if err != nil {
		t.Fatal(err)
	}
	var got [fileCount]bytes.Buffer
	if err := r.Each(func(file, chunk int, b []byte) error {
		if int64(got[file].Len()) != r.Manifest.Files[file].Start(chunk) {
			t.Errorf("file %d chunk %d starts at %d, Start says %d", file, chunk, got[file].Len(), r.Manifest.Files[file].Start(chunk))
		}
		got[file].Write(b)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]byte{noise(1, 70_000), noise(2, 900_000), noise(3, 8192)} {
		if !bytes.Equal(got[i].Bytes(), want) {
			t.Errorf("%s: %d bytes came out, not the %d that went in", fileNames[i], got[i].Len(), len(want))
		}
		at := head.Offsets()[i]
		if !bytes.Equal(data[at:at+int64(len(want))], want) {
			t.Errorf("%s is not at its offset %d", fileNames[i], at)
		}
	}
	if raw, sig, err := ReadHead(bytes.NewReader(data[:HeadSize(len(head.Raw))])); err != nil || !bytes.Equal(raw, head.Raw) || !bytes.Equal(sig, head.Signature) {
		t.Errorf("HeadSize does not hold the head: %v", err)
	}
	again, err := Write(io.Discard, image(t, noise(1, 70_000), noise(2, 900_000), noise(3, 8192)), key(1))
	if err != nil || !bytes.Equal(again.Raw, head.Raw) || !bytes.Equal(again.Signature, head.Signature) {
		t.Errorf("a second bundle of the same image differs: %v", err)
	}
}

// GNU tar reads our bundles, and a bundle that it packs has the same layout.
func TestTarOracle(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("no tar")
	}
	head, data := sample(t)
	dir := t.TempDir()
	ours := filepath.Join(dir, "ours.tar")
	if err := os.WriteFile(ours, data, 0o600); err != nil {
		t.Fatal(err)
	}
	names := append([]string{ManifestName, SignatureName}, fileNames[:]...)
	if out, err := exec.Command("tar", "-xf", ours, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	theirs := filepath.Join(dir, "theirs.tar")
	if out, err := exec.Command("tar", append([]string{"--format=ustar", "-cf", theirs, "-C", dir}, names...)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewReader(bytes.NewReader(b), Keys{public(key(1))})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Each(func(int, int, []byte) error { return nil }); err != nil {
		t.Error(err)
	}
	for i, at := range head.Offsets() {
		if n := head.Manifest.Files[i].Size; !bytes.Equal(b[at:at+n], data[at:at+n]) {
			t.Errorf("%s lies elsewhere in tar's bundle", fileNames[i])
		}
	}
}

// repack writes a bundle anew, after edit has changed its parts.
func repack(t testing.TB, data []byte, edit func(names []string, parts map[string][]byte) []string) []byte {
	t.Helper()
	tr, parts := tar.NewReader(bytes.NewReader(data)), map[string][]byte{}
	var names []string
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		names, parts[h.Name] = append(names, h.Name), b
	}
	names = edit(names, parts)
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for _, n := range names {
		if err := tw.WriteHeader(header(n, int64(len(parts[n])))); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(parts[n]); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestBadBundles(t *testing.T) {
	_, data := sample(t)
	change := func(edit func(parts map[string][]byte)) []byte {
		return repack(t, data, func(n []string, p map[string][]byte) []string { edit(p); return n })
	}
	list := func(edit func(n []string) []string) []byte {
		return repack(t, data, func(n []string, _ map[string][]byte) []string { return edit(n) })
	}
	flip := func(b []byte, at int) []byte { c := bytes.Clone(b); c[at] ^= 1; return c }
	for name, c := range map[string]struct {
		data []byte
		is   error
		want string
	}{
		"empty":             {nil, ErrNotBundle, ""},
		"something else":    {bytes.Repeat([]byte("x"), 4096), ErrNotBundle, ""},
		"another tar":       {list(func(n []string) []string { return n[1:] }), ErrNotBundle, ""},
		"no signature":      {list(func(n []string) []string { return append([]string{n[0]}, n[2:]...) }), ErrUnsigned, ""},
		"empty signature":   {change(func(p map[string][]byte) { p[SignatureName] = nil }), ErrUnsigned, ""},
		"short signature":   {change(func(p map[string][]byte) { p[SignatureName] = p[SignatureName][:63] }), ErrTampered, ""},
		"long signature":    {change(func(p map[string][]byte) { p[SignatureName] = make([]byte, 65) }), nil, "at most 64"},
		"signature changed": {change(func(p map[string][]byte) { p[SignatureName] = flip(p[SignatureName], 5) }), ErrTampered, "not that of key " + KeyID(public(key(1)))},
		"version changed": {change(func(p map[string][]byte) {
			p[ManifestName] = bytes.Replace(p[ManifestName], []byte(`"1.2.3"`), []byte(`"1.2.4"`), 1)
		}), ErrTampered, ""},
		"kernel changed":    {change(func(p map[string][]byte) { p[KernelName] = flip(p[KernelName], 69_999) }), ErrTampered, "of bulkhead.efi"},
		"root changed":      {change(func(p map[string][]byte) { p[RootName] = flip(p[RootName], 1) }), ErrTampered, "chunk 0 of root.squashfs"},
		"root longer":       {change(func(p map[string][]byte) { p[RootName] = append(p[RootName], 0) }), ErrTampered, "900001 bytes, the manifest says 900000"},
		"files swapped":     {list(func(n []string) []string { n[2], n[3] = n[3], n[2]; return n }), nil, `found "root.squashfs" where bulkhead.efi`},
		"file missing":      {list(func(n []string) []string { return n[:4] }), ErrTruncated, "root.verity is missing"},
		"file more":         {list(func(n []string) []string { return append(n, TreeName) }), nil, "behind its last file"},
		"cut in a file":     {data[:len(data)/2], ErrTruncated, "in root.squashfs, at byte"},
		"cut in a header":   {data[:HeadSize(len(firstPart(t, data)))+100], ErrTruncated, "bulkhead.efi is missing"},
		"cut in the head":   {data[:2000], ErrTruncated, "in manifest.json"},
		"manifest too long": {change(func(p map[string][]byte) { p[ManifestName] = make([]byte, MaxManifest+1) }), nil, "at most"},
	} {
		r, err := NewReader(bytes.NewReader(c.data), Keys{public(key(1))})
		if err == nil {
			err = r.Each(func(int, int, []byte) error { return nil })
		}
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %v …%s…", name, err, c.is, c.want)
		}
	}
	_, err := NewReader(bytes.NewReader(data), Keys{public(key(2))})
	if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), KeyID(public(key(2)))) {
		t.Errorf("foreign key: %v", err)
	}
	// A signature over the same bytes without the context, as another program of the same key might make it.
	bare := change(func(p map[string][]byte) { p[SignatureName] = ed25519.Sign(key(1), p[ManifestName]) })
	if _, err := NewReader(bytes.NewReader(bare), Keys{public(key(1))}); !errors.Is(err, ErrTampered) {
		t.Errorf("signature without context: %v", err)
	}
}

func firstPart(t testing.TB, data []byte) []byte {
	t.Helper()
	raw, _, err := ReadHead(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestKeys(t *testing.T) {
	want := Keys{public(key(1)), public(key(2))}
	text, err := MarshalKeys(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseKeys(text)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"", "x", strings.Replace(string(text), "PUBLIC", "PRIVATE", 2), strings.Repeat(string(text), 5)} {
		if k, err := ParseKeys([]byte(bad)); err == nil {
			t.Errorf("%.60q gives %d keys", bad, len(k))
		}
	}
}

func TestCheckUpgrade(t *testing.T) {
	head, _ := sample(t)
	good := Node{Architecture: "amd64", Version: "1.2.2", Epoch: 2, Room: [3]int64{70_000, 900_000, 8192}}
	for _, c := range []struct {
		what string
		edit func(*Node)
		want string
	}{
		{"fits", func(*Node) {}, ""},
		{"older than what runs", func(n *Node) { n.Version = "2.0.0" }, ""},
		{"unknown version", func(n *Node) { n.Version = "" }, ""},
		{"architecture", func(n *Node) { n.Architecture = "arm64" }, "architecture amd64, this node is arm64"},
		{"same root", func(n *Node) { n.RootHash = head.Manifest.RootHash }, "runs already"},
		{"epoch", func(n *Node) { n.Epoch = 3 }, "epoch 2, this node takes only 3"},
		{"minimum", func(n *Node) { n.Version = "1.0.0-rc.1" }, "upgrade to 1.0.0 first"},
		{"kernel too large", func(n *Node) { n.Room[Kernel]-- }, "the EFI partition of this node has room for 69999"},
		{"root too large", func(n *Node) { n.Room[Root]-- }, "a ROOT slot"},
		{"tree too large", func(n *Node) { n.Room[Tree] = 0 }, "a VERITY slot"},
	} {
		n := good
		c.edit(&n)
		err := CheckUpgrade(n, head.Manifest)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want …%s…", c.what, err, c.want)
		}
	}
}

func TestVersions(t *testing.T) {
	sorted := []string{"0.1.0-dev", "0.1.0", "0.2.0-1", "0.2.0-2", "0.2.0-10", "0.2.0-alpha", "0.2.0-alpha.1", "0.2.0-beta", "0.2.0", "0.10.0", "1.0.0"}
	for i, a := range sorted {
		if !ValidVersion(a) {
			t.Errorf("%q is not valid", a)
		}
		for j, b := range sorted {
			if got, want := CompareVersions(a, b), min(1, max(-1, i-j)); got != want {
				t.Errorf("CompareVersions(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
	for _, bad := range []string{"", "1", "1.2", "1.2.3.4", "v1.2.3", "1.2.3+4", "1.2.3_4", "01.2.3", "1.2.3-", "1.2.3-a..b", "1.2.-3", "1.2.3-ä", "1.2.+3", "1.2.3/..", "1.2.3-" + strings.Repeat("x", 60)} {
		if ValidVersion(bad) {
			t.Errorf("%q is valid", bad)
		}
	}
}
