package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWithFile(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"", "kubelet"},
		{"--v=2\n\n--config=/a b/c\n", "kubelet|--v=2|--config=/a b/c"},
		{"--profiling", "kubelet|--profiling"},
		{"--v=2\nkubelet\n", `FILE:2: "kubelet" is no flag like --name=value`},
		{"# no comments\n", `FILE:1: "# no comments" is no flag like --name=value`},
		{"-v=2\n", `FILE:1: "-v=2" is no flag like --name=value`},
		{"--\n", `FILE:1: "--" is no flag like --name=value`},
		{strings.Repeat("--a=b\n", maxArgs/6+1), "FILE: more than 65536 bytes"},
	} {
		path := filepath.Join(t.TempDir(), "args")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		argv, err := withFile([]string{"kubelet"}, path)
		got := strings.Join(argv, "|")
		if err != nil {
			got = strings.ReplaceAll(err.Error(), path, "FILE")
		}
		if got != c.want {
			t.Errorf("%.40q: got %s, want %s", c.text, got, c.want)
		}
	}
	if argv, err := withFile([]string{"kubelet"}, ""); err != nil || len(argv) != 1 {
		t.Errorf("no file: %q, %v", argv, err)
	}
	if _, err := withFile(nil, "/nowhere/args"); err == nil {
		t.Error("a file that is not there is no error")
	}
}
