package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// A Manifest describes a built image. It is written as manifest.json beside it.
type Manifest struct {
	Version  string            `json:"version"`
	Kernel   string            `json:"kernel"`
	Epoch    int               `json:"epoch"`
	RootHash string            `json:"root_hash"` // of dm-verity, in hex
	Boot     BootImage         `json:"boot"`
	Cmdline  string            `json:"cmdline"`
	Files    []Output          `json:"files"`
	Content  []Part            `json:"content"`
	Packages map[string]string `json:"packages"` // of Debian: name to version
	Missing  []string          `json:"missing,omitempty"`
}

// An Output is one file of the image's folder.
type Output struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// A Part is what one source adds to the root, before compression.
type Part struct {
	Name  string `json:"name"`
	Files int    `json:"files"`
	Size  int64  `json:"size"`
}

// ReadManifest reads the manifest of the image in dir.
func ReadManifest(dir string) (Manifest, error) {
	var m Manifest
	text, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%s: manifest.json: %w", dir, err)
	}
	return m, nil
}

// Table returns the sizes as text for people.
func (m Manifest) Table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Bulkhead %s, epoch %d, kernel %s, root %s\n", m.Version, m.Epoch, m.Kernel, m.RootHash)
	fmt.Fprintf(&b, "%s, PCR 11 %s\n", m.Boot.Name, m.Boot.PCR11)
	for _, p := range m.Content {
		fmt.Fprintf(&b, "  %-44s %9.2f MiB in %d files\n", p.Name, float64(p.Size)/mib, p.Files)
	}
	for _, f := range m.Files {
		fmt.Fprintf(&b, "%-46s %9.2f MiB  %s\n", f.Name, float64(f.Size)/mib, f.SHA256[:16])
	}
	for _, name := range m.Missing {
		fmt.Fprintf(&b, "missing: %s\n", name)
	}
	return b.String()
}

// parts sums up a tree by origin: a package's files count as "debian", our own one by one.
func parts(t Tree) ([]Part, error) {
	var out []Part
	index := map[string]int{}
	for _, e := range t {
		if !e.Mode.IsRegular() {
			continue
		}
		name, size := e.From, int64(len(e.Data))
		switch {
		case e.Host != "":
			fi, err := os.Stat(e.Host)
			if err != nil {
				return nil, err
			}
			name, size = e.Path, fi.Size()
		case strings.Contains(name, ":"):
			name = "debian"
		}
		i, ok := index[name]
		if !ok {
			i = len(out)
			index[name] = i
			out = append(out, Part{Name: name})
		}
		out[i].Files++
		out[i].Size += size
	}
	return out, nil
}

func describe(file string) (Output, error) {
	f, err := os.Open(file)
	if err != nil {
		return Output{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return Output{filepath.Base(file), n, hex.EncodeToString(h.Sum(nil))}, err
}
