package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The judge of an archive is containerd's own importer.
func TestImport(t *testing.T) {
	dir := t.TempDir()
	program := func(name, body string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	args := []string{
		"bulkhead.dev/pause:1=" + program("pause", "one"),
		"bulkhead.dev/coredns:v1.15.0=" + program("coredns", "two"),
	}
	first, second := filepath.Join(dir, "first.tar"), filepath.Join(dir, "second.tar")
	for _, out := range []string{first, second} {
		if err := run(out, args); err != nil {
			t.Fatal(err)
		}
	}
	a, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(second)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("two archives of the same programs differ")
	}

	store, err := local.NewStore(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	desc, err := archive.ImportIndex(t.Context(), store, bytes.NewReader(a))
	if err != nil {
		t.Fatal(err)
	}
	var index ocispec.Index
	readJSON(t, store, desc, &index)
	want := []struct{ name, entry, body string }{
		{"bulkhead.dev/pause:1", "/pause", "one"},
		{"bulkhead.dev/coredns:v1.15.0", "/coredns", "two"},
	}
	if len(index.Manifests) != len(want) {
		t.Fatalf("%d images, want %d", len(index.Manifests), len(want))
	}
	for i, w := range want {
		m := index.Manifests[i]
		if got := m.Annotations[images.AnnotationImageName]; got != w.name {
			t.Errorf("image %d is named %q, want %q", i, got, w.name)
		}
		manifest, err := images.Manifest(t.Context(), store, m, platforms.OnlyStrict(platforms.DefaultSpec()))
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		var config ocispec.Image
		readJSON(t, store, manifest.Config, &config)
		if config.Config.User != user || len(config.Config.Entrypoint) != 1 || config.Config.Entrypoint[0] != w.entry {
			t.Errorf("%s: config %+v", w.name, config.Config)
		}
		layer, err := content.ReadBlob(t.Context(), store, manifest.Layers[0])
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		r := tar.NewReader(bytes.NewReader(layer))
		h, err := r.Next()
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		if body, err := io.ReadAll(r); err != nil || "/"+h.Name != w.entry || h.Mode != 0o755 || string(body) != w.body {
			t.Errorf("%s: file %s, mode %o: %q, %v", w.name, h.Name, h.Mode, body, err)
		}
	}
}

func readJSON(t *testing.T, store content.Provider, desc ocispec.Descriptor, v any) {
	t.Helper()
	b, err := content.ReadBlob(context.Background(), store, desc)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

func TestRefuses(t *testing.T) {
	for _, arg := range []string{"bulkhead.dev/pause:1", "pause:1=main.go", "bulkhead.dev/pause=main.go", "bulkhead.dev/pause:1=absent"} {
		if err := run(filepath.Join(t.TempDir(), "out.tar"), []string{arg}); err == nil {
			t.Errorf("%q is taken", arg)
		}
	}
}
