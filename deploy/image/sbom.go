package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"path"
	"runtime/debug"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
)

const sbomFile = "sbom.cdx.json"

// A program is one made with Go, by its path on the node, or inside images.tar there.
type program struct {
	path string
	info *debug.BuildInfo
}

// programs finds every Go program of the root: what the host has built, and what lies in container images.
func programs(root Tree) (out []program, err error) {
	for _, e := range root {
		if e.Host == "" || !e.Mode.IsRegular() {
			continue
		}
		if path.Ext(e.Path) == ".tar" {
			inner, err := programsOfImages(e)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", e.Path, err)
			}
			out = append(out, inner...)
			continue
		}
		if e.Mode.Perm()&0o111 == 0 {
			continue
		}
		f, err := os.Open(e.Host)
		if err != nil {
			return nil, err
		}
		info, err := buildinfo.Read(f)
		f.Close()
		if err == nil { // others are no Go programs
			out = append(out, program{e.Path, info})
		}
	}
	return out, nil
}

// programsOfImages looks into an archive of container images whose layers are not compressed.
func programsOfImages(e Entry) (out []program, err error) {
	f, err := os.Open(e.Host)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	err = eachFile(f, func(h *tar.Header, r io.Reader) error {
		if !strings.HasPrefix(path.Clean(h.Name), "blobs/") {
			return nil
		}
		blob, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if bytes.HasPrefix(blob, []byte("{")) { // a manifest
			return nil
		}
		err = eachFile(bytes.NewReader(blob), func(h *tar.Header, r io.Reader) error {
			data, err := io.ReadAll(r)
			if err != nil || !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
				return err
			}
			if info, err := buildinfo.Read(bytes.NewReader(data)); err == nil {
				out = append(out, program{e.Path + ":" + path.Clean("/"+h.Name), info})
			}
			return nil
		})
		if err != nil {
			err = fmt.Errorf("%s is no plain tar, so its programs would be missing in the SBOM: %w", h.Name, err)
		}
		return err
	})
	return out, err
}

func eachFile(r io.Reader, f func(*tar.Header, io.Reader) error) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if err := f(h, tr); err != nil {
				return err
			}
		}
	}
}

// sbom lists what the image is made of, in the form of CycloneDX: programs, the Go modules that each is made of, and Debian's packages.
// There is no time in it and no random number: equal images have equal lists. Pure.
func sbom(version string, root [32]byte, all []program, lock debian.Lock) *cdx.BOM {
	bom := cdx.NewBOM()
	bom.SerialNumber = "urn:uuid:" + derived("SBOM", root).String()
	system := cdx.Component{BOMRef: "bulkhead", Type: cdx.ComponentTypeOS, Name: "bulkhead", Version: version}
	bom.Metadata = &cdx.Metadata{Component: &system}
	components := map[string]cdx.Component{}
	needs := map[string][]string{}
	for _, p := range all {
		ref := "file:" + p.path
		components[ref] = cdx.Component{BOMRef: ref, Type: cdx.ComponentTypeApplication, Name: p.path, Version: version}
		needs[system.BOMRef] = append(needs[system.BOMRef], ref)
		for _, m := range modules(p.info, version) {
			components[m.BOMRef] = m
			needs[ref] = append(needs[ref], m.BOMRef)
		}
	}
	for _, p := range lock.Packages {
		purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=amd64&distro=debian-%s", escape(p.Name), escape(p.Version), lock.Suite)
		components[purl] = cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: p.Name, Version: p.Version, PackageURL: purl,
			Hashes: &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: p.SHA256}}}
		needs[system.BOMRef] = append(needs[system.BOMRef], purl)
	}
	list := slices.SortedFunc(maps.Values(components), func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	bom.Components = &list
	var graph []cdx.Dependency
	for _, ref := range slices.Sorted(maps.Keys(needs)) {
		on := slices.Compact(slices.Sorted(slices.Values(needs[ref])))
		graph = append(graph, cdx.Dependency{Ref: ref, Dependencies: &on})
	}
	bom.Dependencies = &graph
	return bom
}

// modules are those that a program is made of, the standard library among them. Our own have the image's version.
func modules(info *debug.BuildInfo, version string) (out []cdx.Component) {
	add := func(name, version string) {
		purl := "pkg:golang/" + escapePath(name) + "@" + escape(version)
		out = append(out, cdx.Component{BOMRef: purl, Type: cdx.ComponentTypeLibrary, Name: name, Version: version, PackageURL: purl})
	}
	goVersion, _, _ := strings.Cut(strings.TrimPrefix(info.GoVersion, "go"), " ")
	add("stdlib", goVersion)
	for _, m := range append([]*debug.Module{&info.Main}, info.Deps...) {
		if m.Replace != nil {
			m = m.Replace
		}
		switch {
		case m.Path == "":
		case m.Version == "" || m.Version == "(devel)":
			add(m.Path, version)
		default:
			add(m.Path, m.Version)
		}
	}
	return out
}

// escape encodes a part of a package URL.
func escape(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(url.PathEscape(s), "+", "%2B"), ":", "%3A")
}

func escapePath(s string) string {
	parts := strings.Split(s, "/")
	for i := range parts {
		parts[i] = escape(parts[i])
	}
	return strings.Join(parts, "/")
}

// writeSBOM writes the list as JSON.
func writeSBOM(file string, bom *cdx.BOM) error {
	var b bytes.Buffer
	enc := cdx.NewBOMEncoder(&b, cdx.BOMFileFormatJSON).SetPretty(true).SetEscapeHTML(false)
	if err := enc.EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return fmt.Errorf("sbom: %w", err)
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}
