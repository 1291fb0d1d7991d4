package main

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// localFiles makes a folder with a bundle, one with an OCI layout, and returns what is in them.
func localFiles(t *testing.T) (image, layout string, head bundle.Head, files map[string][]byte) {
	t.Helper()
	image, layout, files = t.TempDir(), t.TempDir(), map[string][]byte{}
	img := bundle.Image{Version: "0.2.0", Architecture: "amd64", Epoch: 1, RootHash: bundle.Sum(nil)}
	for i, name := range []string{bundle.KernelName, bundle.RootName, bundle.TreeName} {
		files[name] = bytes.Repeat([]byte{byte(i + 1)}, 1000*(i+1)+1)
		img.Files[i] = filepath.Join(t.TempDir(), name)
		must(t, os.WriteFile(img.Files[i], files[name], 0o600))
	}
	f, err := os.Create(filepath.Join(image, "bulkhead.update"))
	must(t, err)
	head, err = bundle.Write(f, img, ed25519.NewKeyFromSeed(make([]byte, 32)))
	must(t, err)
	must(t, f.Close())

	must(t, os.MkdirAll(filepath.Join(layout, "blobs/sha256"), 0o755))
	blob := func(b []byte) string {
		d := bundle.Sum(b).String()
		must(t, os.WriteFile(filepath.Join(layout, "blobs/sha256", d), b, 0o600))
		return "sha256:" + d
	}
	var layers []map[string]any
	all := map[string][]byte{bundle.ManifestName: head.Raw, bundle.SignatureName: head.Signature}
	for name, b := range files {
		all[name] = b
	}
	for name, b := range all {
		layers = append(layers, map[string]any{"digest": blob(b), "annotations": map[string]string{"org.opencontainers.image.title": name}})
	}
	m, err := json.Marshal(map[string]any{"layers": layers})
	must(t, err)
	index, err := json.Marshal(map[string]any{"manifests": []map[string]any{{"digest": blob(m)}}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(layout, "index.json"), index, 0o600))
	must(t, os.WriteFile(filepath.Join(layout, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o600))
	return image, layout, head, files
}

func TestOpenImage(t *testing.T) {
	image, layout, head, files := localFiles(t)
	for _, path := range []string{image, filepath.Join(image, "bulkhead.update"), layout} {
		l, err := openImage(path)
		must(t, err)
		if !bytes.Equal(l.raw, head.Raw) || !bytes.Equal(l.signature, head.Signature) || l.size != head.Manifest.Size() {
			t.Errorf("%s: another manifest", path)
		}
		for name, want := range files {
			got, err := io.ReadAll(io.NewSectionReader(l.files[name], 0, int64(len(want))))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s: %d other bytes, %v", path, name, len(got), err)
			}
		}
		must(t, l.Close())
	}
	for path, want := range map[string]string{"/nonexistent": "no such file", t.TempDir(): "neither bulkhead.update", filepath.Join(layout, "oci-layout"): "not an update bundle"} {
		if _, err := openImage(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want …%s…", path, err, want)
		}
	}
	must(t, os.WriteFile(filepath.Join(layout, "index.json"), []byte(`{"manifests":[]}`), 0o600))
	if _, err := openImage(layout); err == nil || !strings.Contains(err.Error(), "0 artifacts") {
		t.Errorf("an empty layout: %v", err)
	}
}

// pieces is a stream that keeps what is sent.
type pieces struct {
	grpc.BidiStreamingClient[updatev1.UploadRequest, updatev1.UploadResponse]
	data []byte
}

func (p *pieces) Send(r *updatev1.UploadRequest) error {
	p.data = append(p.data, r.GetData()...)
	return nil
}

func TestSendPiece(t *testing.T) {
	img := &localImage{files: map[string]io.ReaderAt{"root.squashfs": strings.NewReader("0123456789")}}
	p := &pieces{}
	must(t, sendPiece(p, img, &updatev1.Piece{File: "root.squashfs", Offset: 2, Length: 5}, make([]byte, 3)))
	if string(p.data) != "23456" {
		t.Errorf("sent %q", p.data)
	}
	must(t, sendPiece(p, img, nil, nil))
	for _, bad := range []*updatev1.Piece{{File: "passwd", Length: 1}, {File: "root.squashfs", Offset: 5, Length: 6}} {
		if err := sendPiece(p, img, bad, make([]byte, 3)); err == nil {
			t.Errorf("%v was sent", bad)
		}
	}
}

func TestUpgradeRequest(t *testing.T) {
	image, _, _, _ := localFiles(t)
	for _, c := range []struct {
		f    upgradeFlags
		want string // of the request or the error; "local" if the image is on this machine
	}{
		{upgradeFlags{image: image}, "local"},
		{upgradeFlags{image: "https://example.org/x"}, `url:"https://example.org/x"`},
		{upgradeFlags{image: "r.example.org/x:1"}, `oci:"r.example.org/x:1"`},
		{upgradeFlags{media: "auto"}, `media:"auto"`},
		{upgradeFlags{image: "./none"}, "no such file"},
		{upgradeFlags{}, "name what to install"},
		{upgradeFlags{image: "x", media: "y"}, "name what to install"},
		{upgradeFlags{image: "r.example.org/x", ca: "/nonexistent"}, "no such file"},
		{upgradeFlags{image: "r.example.org/x", username: "me", passwordFile: "-"}, `password:"secret"`},
	} {
		r, err := c.f.request(&app{in: strings.NewReader("secret\n")})
		got := strings.ReplaceAll(r.String(), "  ", " ")
		if err != nil {
			got = err.Error()
		} else if r == nil {
			got = "local"
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%+v: got %s, want …%s…", c.f, got, c.want)
		}
	}
}

func TestJudgeVersion(t *testing.T) {
	status := func(slots ...*updatev1.Slot) *updatev1.Status { return &updatev1.Status{Slots: slots} }
	old := &updatev1.Slot{Name: "A", Version: "0.1.0", Status: "good", Running: true}
	for _, c := range []struct {
		what string
		st   *updatev1.Status
		want string
	}{
		{"no answer", nil, "false false it is in no slot"},
		{"not down yet", status(old, &updatev1.Slot{Version: "0.2.0", Status: "on trial", Next: true, Detail: "will be tried"}), "false false will be tried"},
		{"on trial", status(&updatev1.Slot{Version: "0.1.0", Status: "good"}, &updatev1.Slot{Version: "0.2.0", Status: "on trial", Running: true, Detail: "missing: api"}), "false false missing: api"},
		{"good", status(&updatev1.Slot{Version: "0.2.0", Status: "good", Running: true}), "true false "},
		{"left", status(old, &updatev1.Slot{Version: "0.2.0", Status: "failed", Detail: "the kernel panicked"}), "false true 0.2.0 was left: the kernel panicked; the node runs 0.1.0 again (bhctl why)"},
		{"back, not down yet", status(&updatev1.Slot{Version: "0.3.0", Status: "given up", Running: true}, &updatev1.Slot{Version: "0.2.0", Status: "good", Next: true}), "false false the machine has not gone down yet"},
		{"overwritten", status(old), "false true it is in no slot"},
	} {
		good, why, left := judgeVersion(c.st, "0.2.0")
		if got := strings.Join([]string{map[bool]string{true: "true", false: "false"}[good], map[bool]string{true: "true", false: "false"}[left], why}, " "); got != c.want {
			t.Errorf("%s: got %q, want %q", c.what, got, c.want)
		}
	}
}

// A version that failed is not done with before the node has said why: a reason of another version, or none, is not it.
func TestExplained(t *testing.T) {
	failed := &updatev1.Slot{Version: "0.2.0", Status: "failed", RootHash: "2222"}
	for _, c := range []struct {
		what string
		st   *updatev1.Status
		want bool
	}{
		{"no reason yet", &updatev1.Status{Slots: []*updatev1.Slot{failed}}, false},
		{"of an earlier one", &updatev1.Status{Slots: []*updatev1.Slot{failed}, Failure: &updatev1.Failure{RootHash: "1111"}}, false},
		{"its own", &updatev1.Status{Slots: []*updatev1.Slot{failed}, Failure: &updatev1.Failure{RootHash: "2222"}}, true},
		{"given up", &updatev1.Status{Slots: []*updatev1.Slot{{Version: "0.2.0", Status: "given up"}}}, true},
	} {
		if got := explained(c.st, "0.2.0"); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

// Progress fits a terminal, and is a few lines in a file.
func TestUpgradeView(t *testing.T) {
	var b bytes.Buffer
	a := &app{out: &b, format: "table"}
	v := a.upgradeView()
	fetch := func(done uint64, note string) {
		must(t, v.show(&updatev1.UpgradeProgress{Step: "fetch", Version: "0.2.0", DoneBytes: done << 20, TotalBytes: 40 << 20, ElapsedSeconds: 2.5, ExpectedSeconds: 12.5,
			ImageBytes: 180 << 20, FetchBytes: 40 << 20, Note: note}))
	}
	must(t, v.show(&updatev1.UpgradeProgress{Step: "look", ElapsedSeconds: 0.1}))
	for i := range uint64(40) {
		fetch(i, "")
	}
	fetch(39, "503\nService Unavailable")
	must(t, v.show(&updatev1.UpgradeProgress{Step: "done", Version: "0.2.0", ElapsedSeconds: 61}))
	v.end()
	want := `100ms  look at the image
 2.5s  fetch 0.2.0: 0 % of 40.0 MiB (the node has the rest of 180.0 MiB), about 10s left
 2.5s  fetch 0.2.0: 25 % of 40.0 MiB (the node has the rest of 180.0 MiB), about 10s left
 2.5s  fetch 0.2.0: 50 % of 40.0 MiB (the node has the rest of 180.0 MiB), about 10s left
 2.5s  fetch 0.2.0: 75 % of 40.0 MiB (the node has the rest of 180.0 MiB), about 10s left
 2.5s  fetch 0.2.0: 97 % of 40.0 MiB (the node has the rest of 180.0 MiB), about 10s left · 503 Service Unavailable
 1m1s  installed 0.2.0
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	b.Reset()
	v.width, v.told = 60, ""
	fetch(12, strings.Repeat("x", 300))
	if got := []rune(strings.TrimPrefix(b.String(), "\r\x1b[K")); len(got) != 59 {
		t.Errorf("a terminal of 60 columns gets %d: %q", len(got), string(got))
	}
	b.Reset()
	a.format = "json"
	fetch(12, "")
	if !json.Valid(b.Bytes()) || bytes.Count(b.Bytes(), []byte("\n")) != 1 {
		t.Errorf("got %s", b.String())
	}
}
