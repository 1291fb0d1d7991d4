package archtest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// A testFunction is one that go test runs.
type testFunction struct {
	dir, name string // the folder from the root of the tree
	body      *ast.FuncDecl
}

// testFunctions are all of the tree: tests, benchmarks and fuzz targets.
func testFunctions(t *testing.T) (all []testFunction) {
	t.Helper()
	const root = "../.."
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && (e.Name() == "testdata" || e.Name() == "out" || path != root && strings.HasPrefix(e.Name(), ".")) {
			return fs.SkipDir
		}
		if e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if ok && f.Recv == nil && (strings.HasPrefix(f.Name.Name, "Test") || strings.HasPrefix(f.Name.Name, "Fuzz") || strings.HasPrefix(f.Name.Name, "Benchmark")) {
				all = append(all, testFunction{dir, f.Name.Name, f})
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 500 {
		t.Fatalf("only %d tests in the tree: the look does not work", len(all))
	}
	return all
}

// Every fuzz target tries random inputs in each run of the tests: it hands its function to testfuzz.Run, or to a socket of testrpc, which does.
func TestFuzzTargetsTryMore(t *testing.T) {
	targets := 0
	for _, f := range testFunctions(t) {
		if !strings.HasPrefix(f.name, "Fuzz") {
			continue
		}
		targets++
		runs := false
		ast.Inspect(f.body, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			if s, ok := call.Fun.(*ast.SelectorExpr); ok {
				first, _ := call.Args[0].(*ast.Ident)
				pkg, _ := s.X.(*ast.Ident)
				given := first != nil && first.Name == f.body.Type.Params.List[0].Names[0].Name
				runs = runs || given && (s.Sel.Name == "Run" && pkg != nil && pkg.Name == "testfuzz" || s.Sel.Name == "Fuzz")
			} else if name, ok := call.Fun.(*ast.Ident); ok && f.dir == "internal/testfuzz" {
				runs = runs || name.Name == "Run"
			}
			return true
		})
		if !runs {
			t.Errorf("%s %s: it runs its seeds only; write testfuzz.Run(f, func(t *testing.T, …) {…}) for f.Fuzz(func…) (docs/fuzzing.md)", f.dir, f.name)
		}
	}
	if targets < 60 {
		t.Errorf("%d targets: the look does not work", targets)
	}
}
