package archtest

import (
	"bufio"
	"go/parser"
	"go/scanner"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// PID 1 is what everything stands on, so that its size is a promise. To raise a limit is a decision, made in a review.
const (
	initLines  = 2400    // lines with code of init/, without tests, comments and the units, which are data
	initBinary = 2200000 // bytes, as built for the image
)

// initPackages is everything of the standard library that PID 1 may reach, but for what is below internal/ and runtime/ there: nothing that formats,
// parses, resolves or speaks to anybody.
var initPackages = strings.Fields(`bytes cmp context encoding/binary errors hash hash/crc32 io io/fs iter math math/bits os os/signal path reflect runtime
	slices sort strconv strings sync sync/atomic syscall time unicode unicode/utf8 unsafe golang.org/x/sys/unix`)

// initOwn is what of ours it links.
var initOwn = strings.Fields(`init init/boot init/confine init/console init/halt init/supervise init/watchdog
	internal/hardening internal/initctl internal/landlock internal/uid internal/unit internal/unmap`)

func TestInitImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", "-f", "{{.ImportPath}}", module+"init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	sc, seen := bufio.NewScanner(strings.NewReader(string(out))), 0
	for sc.Scan() {
		seen++
		path := sc.Text()
		own, ours := strings.CutPrefix(path, module)
		switch {
		case ours && !slices.Contains(initOwn, own):
			t.Errorf("PID 1 links %s: it needs a review, and a place in this list", own)
		case !ours && !strings.HasPrefix(path, "internal/") && !strings.Contains(path, "/internal/") && !strings.HasPrefix(path, "runtime/") && !slices.Contains(initPackages, path):
			t.Errorf("PID 1 links %s: it needs a review, and a place in this list", path)
		}
	}
	if seen < len(initOwn) {
		t.Errorf("only %d packages: the look does not work", seen)
	}
}

func TestInitSize(t *testing.T) {
	lines := 0
	err := filepath.WalkDir("../../init", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && e.Name() == "testdata" {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || e.Name() == "units.go" {
			return nil
		}
		n, err := codeLines(path)
		lines += n
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if lines > initLines || lines < initLines/2 {
		t.Errorf("PID 1 has %d lines of code, want %d at most", lines, initLines)
	}
	// As the Makefile builds it, so that what it built is in the cache.
	program := filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-tags", "grpcnotrace", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, module+"init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	fi, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > initBinary {
		t.Errorf("PID 1 is %d bytes, want %d at most", fi.Size(), initBinary)
	}
	t.Logf("PID 1: %d lines of code, %d bytes", lines, fi.Size())
}

// codeLines counts the lines on which a token stands that is no comment.
func codeLines(path string) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	files := token.NewFileSet()
	if _, err := parser.ParseFile(files, path, text, 0); err != nil {
		return 0, err
	}
	file := files.AddFile(path, files.Base(), len(text))
	var s scanner.Scanner
	s.Init(file, text, nil, 0)
	seen := map[int]bool{}
	for {
		pos, tok, lit := s.Scan()
		if tok == token.EOF {
			return len(seen), nil
		}
		if tok == token.SEMICOLON && lit == "\n" { // the end of a line is none
			continue
		}
		for l := range strings.Count(lit, "\n") + 1 {
			seen[file.Line(pos)+l] = true
		}
	}
}
