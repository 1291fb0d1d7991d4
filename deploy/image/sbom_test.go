package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

func aTar(t *testing.T, name string, files ...[]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o755, Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestPrograms finds this test itself, as a file of the root and in a container image.
func TestPrograms(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	root := Tree{
		{Path: "/usr/bin/tool", Mode: 0o755, Host: self},
		{Path: "/usr/share/text", Mode: 0o644, Host: self},
		{Path: "/usr/bin/c", Mode: 0o755, Host: write("c", fakeELF("", nil, nil))},
		{Path: "/usr/share/images.tar", Mode: 0o644, Host: write("images.tar", aTar(t, "blobs/sha256/1", []byte("{}"), aTar(t, "inner", data)))},
	}
	got, err := programs(root)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, p := range got {
		paths = append(paths, p.path)
		if !strings.HasPrefix(p.info.GoVersion, "go1.") || p.info.Main.Path != "github.com/bulkhead-os/bulkhead" {
			t.Errorf("%s: %+v", p.path, p.info)
		}
	}
	if got, want := strings.Join(paths, " "), "/usr/bin/tool /usr/share/images.tar:/inner"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	root[3].Host = write("packed.tar", aTar(t, "blobs/sha256/1", []byte("\x1f\x8bpacked")))
	if _, err := programs(root); err == nil || !strings.Contains(err.Error(), "would be missing in the SBOM") {
		t.Errorf("a packed layer: %v", err)
	}
}

func TestSBOM(t *testing.T) {
	info := &debug.BuildInfo{GoVersion: "go1.26.8 X:foo", Main: debug.Module{Path: "example.org/ours", Version: "(devel)"}, Deps: []*debug.Module{
		{Path: "example.org/a/b", Version: "v1.2.3+incompatible"},
		{Path: "example.org/old", Version: "v1.0.0", Replace: &debug.Module{Path: "example.org/new", Version: "v2.0.0"}},
	}}
	lock := debian.Lock{Suite: "trixie", Packages: []debian.Package{{Name: "libgmp10", Version: "2:6.3.0+dfsg-3", SHA256: strings.Repeat("a", 64)}}}
	bom := sbom("1.2.3", [32]byte{1}, []program{{"/usr/bin/one", info}, {"/usr/bin/two", info}}, lock)
	file := filepath.Join(t.TempDir(), "sbom")
	if err := writeSBOM(file, bom); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var read cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(text), cdx.BOMFileFormatJSON).Decode(&read); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{read.Metadata.Component.BOMRef: true}
	for _, c := range *read.Components {
		if known[c.BOMRef] {
			t.Errorf("%s is there twice", c.BOMRef)
		}
		known[c.BOMRef] = true
	}
	for _, want := range []string{
		"file:/usr/bin/one", "file:/usr/bin/two", "pkg:golang/stdlib@1.26.8", "pkg:golang/example.org/ours@1.2.3", "pkg:golang/example.org/a/b@v1.2.3%2Bincompatible",
		"pkg:golang/example.org/new@v2.0.0", "pkg:deb/debian/libgmp10@2%3A6.3.0%2Bdfsg-3?arch=amd64&distro=debian-trixie",
	} {
		if !known[want] {
			t.Errorf("%s is missing", want)
		}
	}
	if len(known) != 8 {
		t.Errorf("%d components: %v", len(known), known)
	}
	edges := 0
	for _, d := range *read.Dependencies {
		for _, ref := range *d.Dependencies {
			edges++
			if !known[ref] || !known[d.Ref] {
				t.Errorf("%s needs %s: not both are known", d.Ref, ref)
			}
		}
	}
	if edges != 3+4+4 {
		t.Errorf("%d dependencies", edges)
	}
}
