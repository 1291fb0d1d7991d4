package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What "make test" runs without the race detector does nothing at once: there is no race to find. The list is the Makefile's, SEQUENTIAL.
func TestSequential(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`(?m)^SEQUENTIAL *:= *([^#\n]+)`).FindSubmatch(makefile)
	if list == nil {
		t.Fatal("the Makefile has no SEQUENTIAL")
	}
	for dir := range strings.FieldsSeq(string(list[1])) {
		files, err := filepath.Glob(filepath.Join("../..", dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Errorf("%s: %d Go files, error %v", dir, len(files), err)
		}
		for _, name := range files {
			file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			if what := concurrent(file); what != "" {
				t.Errorf("%s has %s: take %s out of SEQUENTIAL, its tests need the race detector", name, what, dir)
			}
		}
	}
}

// concurrent names the first thing in a file by which functions run at once, or may: "" if there is none.
func concurrent(file *ast.File) (what string) {
	for _, i := range file.Imports {
		if path := strings.Trim(i.Path.Value, `"`); path == "net/http" || path == "google.golang.org/grpc" {
			return "an import of " + path
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			what = "a go statement"
		case *ast.SelectorExpr:
			if n.Sel.Name == "Go" || n.Sel.Name == "AfterFunc" || n.Sel.Name == "Parallel" {
				what = "a call of " + n.Sel.Name
			}
		}
		return what == ""
	})
	return what
}

func TestConcurrent(t *testing.T) {
	for text, want := range map[string]string{
		"package p; func f() { go f() }":                                      "a go statement",
		"package p; func f(t *testing.T) { t.Parallel() }":                    "a call of Parallel",
		"package p; func f(w sync.WaitGroup) { w.Go(nil) }":                   "a call of Go",
		"package p; func f(c context.Context) { context.AfterFunc(c, nil) }":  "a call of AfterFunc",
		"package p; import \"net/http\"; func f() { http.ListenAndServe() }":  "an import of net/http",
		"package p; import \"sync\"; var m sync.Mutex; func f() { m.Lock() }": "",
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "p.go", text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if what := concurrent(file); what != want {
			t.Errorf("%s: %q, want %q", text, what, want)
		}
	}
}
