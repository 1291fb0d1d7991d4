package image

import (
	"cmp"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// A Tree is a file system to be: every entry, in the order of paths, so that folders come before what is in them.
type Tree []Entry

// An Entry is a folder, a file or a symbolic link, owned by root. A file's content is in Data or in the host's file
// Host, never in both.
type Entry struct {
	Path string      // absolute, clean
	Mode fs.FileMode // fs.ModeDir, fs.ModeSymlink or a regular file, with permissions
	Link string      // target of a symbolic link
	Data []byte
	Host string
	From string // where it comes from, for people: a package, or a folder of ours
}

func (e Entry) String() string {
	switch e.Mode.Type() {
	case fs.ModeDir:
		return fmt.Sprintf("dir  %04o %s", e.Mode.Perm(), e.Path)
	case fs.ModeSymlink:
		return fmt.Sprintf("link      %s -> %s", e.Path, e.Link)
	}
	return fmt.Sprintf("file %04o %s < %s", e.Mode.Perm(), e.Path, e.From)
}

func (t Tree) String() string {
	var b strings.Builder
	for _, e := range t {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

// builder collects entries. The first error is kept and told by tree.
type builder struct {
	entries map[string]Entry
	err     error
}

func newBuilder() *builder {
	b := &builder{entries: map[string]Entry{}}
	b.entries["/"] = Entry{Path: "/", Mode: fs.ModeDir | 0o755}
	return b
}

func (b *builder) add(e Entry) {
	if e.Path != path.Clean(e.Path) || !path.IsAbs(e.Path) {
		b.fail(fmt.Errorf("%s: not a clean absolute path", e.Path))
		return
	}
	for dir := path.Dir(e.Path); b.entries[dir].Path == ""; dir = path.Dir(dir) {
		b.entries[dir] = Entry{Path: dir, Mode: fs.ModeDir | 0o755}
	}
	if old, dup := b.entries[e.Path]; dup && (old.Mode != e.Mode || !e.Mode.IsDir()) {
		b.fail(fmt.Errorf("%s: planned twice (%s; %s)", e.Path, old, e))
		return
	}
	b.entries[e.Path] = e
}

func (b *builder) fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

func (b *builder) dir(name string, perm fs.FileMode) {
	b.add(Entry{Path: name, Mode: fs.ModeDir | perm})
}

func (b *builder) link(name, target string) {
	b.add(Entry{Path: name, Mode: fs.ModeSymlink | 0o777, Link: target})
}

func (b *builder) file(name string, perm fs.FileMode, data []byte, from string) {
	b.add(Entry{Path: name, Mode: perm, Data: data, From: from})
}

func (b *builder) host(name string, perm fs.FileMode, hostPath, from string) {
	b.add(Entry{Path: name, Mode: perm, Host: hostPath, From: from})
}

// tree returns the entries in order, after checking that what stands above each one is a folder.
func (b *builder) tree() (Tree, error) {
	if b.err != nil {
		return nil, b.err
	}
	var t Tree
	for _, e := range b.entries {
		if parent := b.entries[path.Dir(e.Path)]; !parent.Mode.IsDir() {
			return nil, fmt.Errorf("%s: %s is not a folder", e.Path, parent.Path)
		}
		t = append(t, e)
	}
	slices.SortFunc(t, func(x, y Entry) int { return cmp.Compare(sortKey(x.Path), sortKey(y.Path)) })
	return t, nil
}

// sortKey makes a folder's content follow it directly: "/" sorts before every other character of a name.
func sortKey(p string) string { return strings.ReplaceAll(p, "/", "\x00") }
