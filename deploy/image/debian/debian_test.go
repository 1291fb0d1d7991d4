package debian

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

const sum0 = "0000000000000000000000000000000000000000000000000000000000000000"

func TestLock(t *testing.T) {
	l := Lock{"trixie", []Package{{"libc6", "2.41-12+deb13u5", sum0, 5}, {"nft", "1:1.0~rc1-1", sum0, 6}}}
	got, err := ParseLock(l.Format())
	if err != nil || !reflect.DeepEqual(got, l) {
		t.Errorf("got %+v, %v", got, err)
	}
	if p, ok := got.Find("nft"); !ok || p.Size != 6 {
		t.Errorf("Find: %+v, %v", p, ok)
	}
	for text, want := range map[string]string{
		"":                               "no suite",
		"libc6 1 5 " + sum0:              "line 1: want",
		"suite a\nsuite b":               "line 2: want",
		"suite a\nlibc6 1 -5 " + sum0:    `line 2: size "-5"`,
		"suite a\nlibc6 1 5 abc":         `line 2: "abc" is not a SHA-256`,
		"suite a\nlib=c6 1 5 " + sum0:    `line 2: "lib=c6" "1" is not`,
		"suite a\n\nlibc6 -o1 5 " + sum0: `line 3: "libc6" "-o1" is not`,
		"suite a\nb1 1 5 " + sum0 + "\nb1 1 5 " + sum0: `line 3: "b1" is not in order`,
	} {
		if _, err := ParseLock([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func FuzzLock(f *testing.F) {
	f.Add([]byte("suite trixie\nlibc6 2.41 5 " + sum0 + "\n"))
	testfuzz.Run(f, func(t *testing.T, text []byte) {
		l, err := ParseLock(text)
		if err != nil {
			return
		}
		if again, err := ParseLock(l.Format()); err != nil || !reflect.DeepEqual(again, l) {
			t.Errorf("%+v became %+v, %v", l, again, err)
		}
	})
}

func TestMirror(t *testing.T) {
	find := func(sources []source) string {
		for _, s := range sources {
			if s.debianMain() {
				return s.uri
			}
		}
		return ""
	}
	list := "# deb http://no.example/debian x main\n" +
		"deb http://a.example/debian-security bookworm-security main\ndeb https://b.example/apt stable main\n" +
		"deb-src http://c.example/debian bookworm main\ndeb [arch=amd64 signed-by=/k] http://d.example/debian/ bookworm contrib main # x\n"
	if got := find(parseList(list)); got != "http://d.example/debian/" {
		t.Errorf("one-line form: %q", got)
	}
	sources := "Types: deb\nEnabled: no\nURIs: http://a.example/debian\nSuites: x\nComponents: main\n\n" +
		"# a comment\nTypes: deb deb-src\nURIs: http://b.example/debian-security\n http://c.example/debian\n# inside\nSuites: bookworm\n bookworm-updates\nComponents: main\nSigned-By:\n -----BEGIN\n"
	if got := find(parseSources(sources)); got != "http://c.example/debian" {
		t.Errorf("deb822: %q", got)
	}
	t.Setenv("BULKHEAD_MIRROR", "http://mine.example/debian")
	if got, err := Mirror(); err != nil || got != "http://mine.example/debian" {
		t.Errorf("environment: %q, %v", got, err)
	}
}

func TestFiles(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "./usr/lib/libx.so.1.2", Size: 3, Mode: 0o644},
		{Name: "./usr/lib/libx.so.1", Typeflag: tar.TypeSymlink, Linkname: "libx.so.1.2"},
		{Name: "./usr/lib/y", Typeflag: tar.TypeSymlink, Linkname: "/usr/lib/libx.so.1"},
		{Name: "./usr/lib/z", Typeflag: tar.TypeLink, Linkname: "./usr/lib/libx.so.1.2"},
		{Name: "./usr/lib/loop", Typeflag: tar.TypeSymlink, Linkname: "loop"},
		{Name: "./usr/share/doc", Size: 3, Mode: 0o644},
		{Name: "./usr/lib/dir/", Typeflag: tar.TypeDir},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			w.Write([]byte("abc"))
		}
	}
	w.Close()
	files := Files{}
	keep := func(name string) bool { return strings.HasPrefix(name, "/usr/lib/") }
	if err := readTar(bytes.NewReader(b.Bytes()), "libx1", keep, files); err != nil {
		t.Fatal(err)
	}
	if len(files) != 5 {
		t.Errorf("got %v", files)
	}
	for _, name := range []string{"/usr/lib/y", "/usr/lib/z", "/usr/lib/libx.so.1.2"} {
		if _, f, ok := files.Lookup(name); !ok || string(f.Data) != "abc" || f.Package != "libx1" {
			t.Errorf("%s: %+v, %v", name, f, ok)
		}
	}
	for _, name := range []string{"/usr/lib/loop", "/nowhere"} {
		if _, _, ok := files.Lookup(name); ok {
			t.Errorf("%s is found", name)
		}
	}
	if err := readTar(bytes.NewReader(b.Bytes()), "libx2", keep, files); err == nil || !strings.Contains(err.Error(), "also in package libx1") {
		t.Errorf("the same file twice: %v", err)
	}
}

// TestArchive makes a Debian archive of two packages in a folder, signed by nobody, and drives the real apt on it.
func TestArchive(t *testing.T) {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("no " + tool)
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		t.Skip(err)
	}
	mirror := archive(t, "1.0-1")
	t.Setenv("BULKHEAD_MIRROR", "file:"+mirror)
	c := Cache{Dir: filepath.Join(t.TempDir(), "cache"), Log: slog.New(slog.DiscardHandler)}
	_, err := c.Resolve(t.Context(), "test", []string{"bulkhead-a"})
	if err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Fatalf("an archive that nobody signed: %v", err)
	}
	c.unsigned = true
	l, err := c.Resolve(t.Context(), "test", []string{"bulkhead-b", "bulkhead-a"})
	if err != nil || len(l.Packages) != 2 || l.Packages[0].Name != "bulkhead-a" {
		t.Fatalf("Resolve: %+v, %v", l, err)
	}
	if err := os.RemoveAll(c.Dir); err != nil {
		t.Fatal(err)
	}
	if err := c.Fetch(t.Context(), l); err != nil {
		t.Fatalf("Fetch: %v", err)
	}
	files, err := c.Read(t.Context(), l, func(string) bool { return true })
	if err != nil || string(files["/usr/share/bulkhead-a"].Data) != "content of bulkhead-a" {
		t.Errorf("Read: %v, %v", files, err)
	}
	bad := l
	bad.Packages = []Package{{"bulkhead-a", "1.0-1", sum0, 9}}
	if err := c.Fetch(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "the lock says "+sum0) {
		t.Errorf("wrong sum: %v", err)
	}
	bad.Packages[0].Version = "0.9-1"
	if err := c.Fetch(t.Context(), bad); err == nil || !strings.Contains(err.Error(), `package bulkhead-a 0.9-1 is no longer on the mirror: refresh the lock with`) {
		t.Errorf("gone version: %v", err)
	}
	if err := os.WriteFile(c.Path(l.Packages[0]), []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(context.Background(), l, func(string) bool { return true }); err == nil || !strings.Contains(err.Error(), "damaged and is removed") {
		t.Errorf("damaged cache: %v", err)
	}
}

func archive(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	var index bytes.Buffer
	for _, name := range []string{"bulkhead-a", "bulkhead-b"} {
		root := filepath.Join(t.TempDir(), name)
		control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\nDescription: a test\n", name, version)
		for file, text := range map[string]string{"DEBIAN/control": control, "usr/share/" + name: "content of " + name} {
			if err := os.MkdirAll(filepath.Dir(filepath.Join(root, file)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		deb := filepath.Join(dir, name+".deb")
		if out, err := exec.Command("dpkg-deb", "--build", "--root-owner-group", root, deb).CombinedOutput(); err != nil {
			t.Fatalf("dpkg-deb: %v\n%s", err, out)
		}
		digest, size, err := sum(deb)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&index, "%sFilename: %s.deb\nSize: %d\nSHA256: %s\n\n", control, name, size, digest)
	}
	packages := filepath.Join(dir, "dists/test/main/binary-amd64/Packages")
	if err := os.MkdirAll(filepath.Dir(packages), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(packages, index.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	digest, size, err := sum(packages)
	if err != nil {
		t.Fatal(err)
	}
	release := fmt.Sprintf("Suite: test\nCodename: test\nComponents: main\nArchitectures: amd64\nSHA256:\n %s %d main/binary-amd64/Packages\n", digest, size)
	if err := os.WriteFile(filepath.Join(dir, "dists/test/Release"), []byte(release), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
