package image

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/deploy/image/debian"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
)

var update = flag.Bool("update", false, "write testdata anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil || got != string(want) {
		t.Errorf("%s: %v; got\n%s\nwant\n%s", file, err, got, want)
	}
}

func fakeInputs() inputs {
	return inputs{
		version: "1.2.3", debian: fakeDebian(), release: "6.0-test",
		early: []module{{name: "b", path: "kernel/b.ko"}}, late: []module{{name: "a", path: "kernel/a.ko"}},
		bin:    map[string]string{"init": "/host/init", "bulkheadd": "/host/bulkheadd"},
		public: map[string][]byte{"release.pub": []byte("public\n")},
		kube:   map[string]string{"bin/kube": "/host/kube", "cni/bridge": "/host/bridge", "images.tar": "/host/images.tar"},
	}
}

func TestRootTree(t *testing.T) {
	tree, err := rootTree(fakeInputs())
	if err != nil {
		t.Fatal(err)
	}
	var texts strings.Builder
	for _, e := range tree {
		if strings.HasPrefix(e.Path, "/etc/") && e.Data != nil || strings.HasSuffix(e.Path, "bulkhead.list") {
			fmt.Fprintf(&texts, "== %s\n%s", e.Path, e.Data)
		}
	}
	golden(t, "root.txt", tree.String()+texts.String())
}

func TestRootTreeRefuses(t *testing.T) {
	for want, change := range map[string]func(*inputs){
		"/usr/sbin/nft is in no package of the lock":              func(in *inputs) { delete(in.debian, "/usr/sbin/nft") },
		"needs libblkid.so.1, which is in no package of the lock": func(in *inputs) { delete(in.debian, libDir+"/libblkid.so.1") },
		"kubernetes: share/doc: no place for it is known":         func(in *inputs) { in.kube["share/doc"] = "x" },
		"/usr/bin/mount: planned twice":                           func(in *inputs) { in.kube["bin/mount"] = "x" },
		"wants the interpreter /lib/ld-musl.so.1": func(in *inputs) {
			in.debian["/usr/sbin/nft"] = debian.File{Data: fakeELF("/lib/ld-musl.so.1", nil, nil)}
		},
		"/usr/lib/bulkhead/../../evil: not a clean absolute path": func(in *inputs) { in.bin["../../evil"] = "x" },
	} {
		in := fakeInputs()
		change(&in)
		if _, err := rootTree(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestCheck(t *testing.T) {
	static, dynamic := fakeELF("", nil, nil), fakeELF("/lib64/"+linker, []string{"libc.so.6"}, nil)
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		entry Entry
		want  string
	}{
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Data: static}, ""},
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Data: dynamic}, ""},
		{Entry{Path: "/usr/share/text", Mode: 0o644, Data: []byte("text")}, ""},
		{Entry{Path: "/usr/share/empty", Mode: 0o644}, ""},
		{Entry{Path: "/usr/bin/bash", Mode: 0o755, Data: static}, "shell or interpreter"},
		{Entry{Path: "/usr/bin/sh", Mode: fs.ModeSymlink | 0o777, Link: "tool"}, "shell or interpreter"},
		{Entry{Path: "/usr/bin/python3.13", Mode: 0o755, Data: static}, "shell or interpreter"},
		{Entry{Path: "/usr/share/text", Mode: 0o644, Data: []byte("#!/usr/bin/tool")}, "a script"},
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Host: script}, "a script"},
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Data: []byte("MZ..")}, "not an ELF"},
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Data: fakeELF("/lib/ld-musl.so.1", nil, nil)}, "wants the interpreter"},
		{Entry{Path: "/usr/bin/tool", Mode: 0o755, Data: fakeELF("", []string{"liba.so", "libc.so.6"}, nil)}, "needs liba.so"},
	}
	for _, test := range tests {
		tree := Tree{{Path: lib64, Mode: fs.ModeSymlink}, {Path: libDir + "/libc.so.6", Mode: 0o644, Data: static}, test.entry}
		err := check(tree)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: got %v, want %q", test.entry, err, test.want)
		}
	}
}

func TestModules(t *testing.T) {
	files := debian.Files{"/usr/lib/modules/6.0/modules.builtin": {Data: []byte("kernel/fs/ext4.ko\n")}}
	add := func(file, name, depends string) {
		files["/usr/lib/modules/6.0/kernel/"+file] = debian.File{Data: fakeELF("", nil, map[string]string{"name": name, "depends": depends})}
	}
	add("dm-mod.ko", "dm_mod", "")
	add("dm-bufio.ko", "dm_bufio", "dm-mod")
	add("dm-verity.ko", "dm_verity", "dm-mod,dm-bufio")
	add("net.ko", "net", "dm_bufio,missing")
	add("ring1.ko", "ring1", "ring2")
	add("ring2.ko", "ring2", "ring1")
	add("lie.ko", "truth", "")
	set := moduleIndex(t.Context(), files, "6.0")
	for _, test := range []struct {
		want, loaded, out, err string
	}{
		{"dm_verity", "", "dm_mod dm_bufio dm_verity", ""},
		{"ext4 dm_mod dm_verity dm_verity", "", "dm_mod dm_bufio dm_verity", ""},
		{"dm_verity", "dm_mod", "dm_bufio dm_verity", ""},
		{"net", "", "", "module missing, wanted by the image net"},
		{"ring1", "", "", "depends on itself through ring1 ring2"},
		{"lie", "", "", `module lie: its .modinfo calls it "truth"`},
	} {
		loaded := map[string]bool{}
		for _, l := range strings.Fields(test.loaded) {
			loaded[l] = true
		}
		got, err := set.order(strings.Fields(test.want), loaded)
		var names []string
		for _, m := range got {
			names = append(names, m.name)
		}
		if strings.Join(names, " ") != test.out || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%q: got %q, %v", test.want, names, err)
		}
	}
}

func TestLayout(t *testing.T) {
	var root [32]byte
	for i := range root {
		root[i] = byte(i)
	}
	table, size := layout(root)
	if err := table.Validate(size); err != nil {
		t.Fatal(err)
	}
	if esp := table.Partitions[0]; esp.Type != gpt.EFISystem || esp.Size() != espSize {
		t.Errorf("partition 1: %+v", esp)
	}
	for i, want := range []string{"00010203-0405-0607-0809-0a0b0c0d0e0f", "10111213-1415-1617-1819-1a1b1c1d1e1f"} {
		if got := table.Partitions[i+1].GUID.String(); got != want {
			t.Errorf("partition %d: GUID %s, want %s", i+2, got, want)
		}
	}
	for _, p := range table.Partitions {
		if p.First%2048 != 0 {
			t.Errorf("%s does not start at a MiB", p.Name)
		}
	}
	if slotSize/128+8192*4 > treeSize {
		t.Error("the hash tree of a full slot does not fit")
	}
	if err := fits("root", slotSize+5, slotSize); err == nil || !strings.Contains(err.Error(), "5 more than its partition of 256 MiB holds") {
		t.Error(err)
	}
}

// TestCPIO lets cpio(1) read what we write. What is for machines without UEFI stands last in the list, with its parameters.
func TestCPIO(t *testing.T) {
	tree, err := initramfsTree("", []module{{name: "a", path: "x/a.ko", data: []byte("aaa")}, {name: "ramoops", path: "x/ramoops.ko"}, {name: "b", path: "y/b.ko", data: []byte("bbbb")}})
	if err != nil {
		t.Fatal(err)
	}
	tree = append(tree, Entry{Path: "/link", Mode: fs.ModeSymlink | 0o777, Link: "modules"})
	var b bytes.Buffer
	if err := writeCPIO(&b, tree); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("no cpio")
	}
	cmd := exec.Command("cpio", "-i", "--to-stdout", "--quiet", "modules.list", "modules/b.ko")
	cmd.Stdin = bytes.NewReader(b.Bytes())
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "bbbb/modules/a.ko\n/modules/b.ko\n\n/modules/ramoops.ko "+moduleParams["ramoops"]+"\n" {
		t.Errorf("content: %v\n%s", err, out)
	}
	cmd = exec.Command("cpio", "-t", "--quiet")
	cmd.Stdin = bytes.NewReader(b.Bytes())
	if out, err := cmd.CombinedOutput(); err != nil || strings.Join(strings.Fields(string(out)), " ") != "dev modules modules/a.ko modules/b.ko modules/ramoops.ko modules.list proc sys link" {
		t.Errorf("list: %v\n%s", err, out)
	}
}

func TestSparse(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, 300<<10)
	data[100<<10] = 7
	data[len(data)-1] = 9
	w := &sparseWriter{f: f, off: 5}
	for piece := range slices.Chunk(data, 99<<10) {
		if n, err := w.Write(piece); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, 5); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v", err)
	}
}
