package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/bundle"
)

// A localImage is an image on this machine, of which a node asks for pieces.
type localImage struct {
	raw, signature []byte
	files          map[string]io.ReaderAt // by the name of a bundle's file
	size           int64
	closers        []io.Closer
}

func (l *localImage) Close() error {
	var err error
	for _, c := range l.closers {
		err = errors.Join(err, c.Close())
	}
	return err
}

// openImage opens a bundle, or a folder with one: that of "make image", or an OCI layout. The caller closes it.
func openImage(path string) (*localImage, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return openBundle(path)
	}
	if file := filepath.Join(path, "bulkhead.update"); exists(file) {
		return openBundle(file)
	}
	if exists(filepath.Join(path, "oci-layout")) {
		return openLayout(path)
	}
	return nil, fmt.Errorf("%s: neither bulkhead.update (of \"make image\") nor an OCI layout is in this folder", path)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func openBundle(path string) (*localImage, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	l := &localImage{files: map[string]io.ReaderAt{}, closers: []io.Closer{f}}
	if l.raw, l.signature, err = bundle.ReadHead(f); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	m, err := bundle.Parse(l.raw)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	head := bundle.Head{Manifest: m, Raw: l.raw, Signature: l.signature}
	for i, at := range head.Offsets() {
		l.files[m.Files[i].Name] = io.NewSectionReader(f, at, m.Files[i].Size)
	}
	l.size = m.Size()
	return l, nil
}

// openLayout opens an OCI layout: its only artifact, or the only one that has our files.
func openLayout(dir string) (*localImage, error) {
	var index struct {
		Manifests []struct{ Digest string }
	}
	if err := readJSON(filepath.Join(dir, "index.json"), &index); err != nil {
		return nil, err
	}
	blob := func(digest string) string {
		return filepath.Join(dir, "blobs", "sha256", filepath.Base(strings.TrimPrefix(digest, "sha256:")))
	}
	var found []map[string]string
	for _, d := range index.Manifests {
		var m struct {
			Layers []struct {
				Digest      string
				Annotations map[string]string
			}
		}
		if err := readJSON(blob(d.Digest), &m); err != nil {
			return nil, err
		}
		layers := map[string]string{}
		for _, l := range m.Layers {
			layers[l.Annotations["org.opencontainers.image.title"]] = blob(l.Digest)
		}
		if layers[bundle.ManifestName] != "" {
			found = append(found, layers)
		}
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%s: %d artifacts in this layout are updates, want one", dir, len(found))
	}
	return openFiles(dir, found[0])
}

func openFiles(dir string, files map[string]string) (l *localImage, err error) {
	l = &localImage{files: map[string]io.ReaderAt{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.raw, err = os.ReadFile(files[bundle.ManifestName]); err != nil {
		return l, err
	}
	if l.signature, err = os.ReadFile(files[bundle.SignatureName]); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return l, err
	}
	m, err := bundle.Parse(l.raw)
	if err != nil {
		return l, fmt.Errorf("%s: %w", dir, err)
	}
	for _, f := range m.Files {
		open, err := os.Open(files[f.Name])
		if err != nil {
			return l, fmt.Errorf("%s: %s: %w", dir, f.Name, err)
		}
		l.closers = append(l.closers, open)
		l.files[f.Name] = open
	}
	l.size = m.Size()
	return l, nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
