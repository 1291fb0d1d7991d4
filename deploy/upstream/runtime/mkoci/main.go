// Command mkoci packs static programs as container images, one archive for all,
// so that a node loads them in one step and without a registry:
//
//	mkoci OUT.tar NAME=PROGRAM...
//
// OUT.tar is an OCI image layout. Each image has one layer with one file, the
// program, at the root and as the entry point, started as user 65532. The same
// programs give the same bytes on every machine.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const user = "65532:65532" // a number, or the kubelet cannot check runAsNonRoot

var platform = v1.Platform{OS: "linux", Architecture: "amd64"}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: mkoci OUT.tar NAME=PROGRAM...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "mkoci:", err)
		os.Exit(1)
	}
}

// run writes the archive out with the images of args, each NAME=PROGRAM.
func run(out string, args []string) (err error) {
	dir, err := os.MkdirTemp("", "mkoci-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	for _, arg := range args {
		ref, program, ok := strings.Cut(arg, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=PROGRAM", arg)
		}
		if err := add(l, ref, program); err != nil {
			return fmt.Errorf("image %s: %w", ref, err)
		}
	}
	return pack(out, dir)
}

// add puts one image into l, under the full name that pods will ask for.
func add(l layout.Path, ref, program string) error {
	tag, err := name.NewTag(ref, name.StrictValidation)
	if err != nil {
		return err
	}
	body, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	img, err := image(filepath.Base(program), body)
	if err != nil {
		return err
	}
	return l.AppendImage(img, layout.WithPlatform(platform), layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          tag.Name(), // what containerd calls it
		"org.opencontainers.image.ref.name": tag.TagStr(),
	}))
}

// image is an image whose only file is /program. Its layer is not compressed:
// the OS image around it is, and better than gzip would, and a node unpacks it
// during its first boot.
func image(program string, body []byte) (v1.Image, error) {
	var layer bytes.Buffer
	if err := writeTar(&layer, []file{{program, 0o755, bytes.NewReader(body), int64(len(body))}}); err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer))
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = platform.OS, platform.Architecture
	config.Config = v1.Config{
		User:       user,
		Env:        []string{"PATH=/"}, // so that kubectl exec finds it by name
		Entrypoint: []string{"/" + program},
		WorkingDir: "/",
	}
	return mutate.ConfigFile(img, config)
}

// pack writes the files under dir to the archive out, in the order of their names.
func pack(out, dir string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()

	var files []file
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		body, err := os.ReadFile(path)
		files = append(files, file{rel, 0o644, bytes.NewReader(body), int64(len(body))})
		return err
	})
	if err != nil {
		return err
	}
	return writeTar(f, files)
}

// A file is one entry of an archive.
type file struct {
	name string
	mode int64
	body io.Reader
	size int64 // bytes in body
}

// writeTar writes files with what varies between machines left out: everything
// belongs to root and is as old as Unix.
func writeTar(w io.Writer, files []file) error {
	t := tar.NewWriter(w)
	for _, f := range files {
		h := tar.Header{
			Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: f.size,
			ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
		}
		if err := t.WriteHeader(&h); err != nil {
			return err
		}
		if _, err := io.Copy(t, f.body); err != nil {
			return err
		}
	}
	return t.Close()
}
