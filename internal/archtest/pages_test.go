package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	// of is a package and its tests as pages name them: `storaged/luks` TestRefuses, TestCryptsetup… (a case of it); FuzzRead.
	of = regexp.MustCompile("`([a-z0-9_/-]+)` (" + item + "(?:, " + item + ")*)")
	// named is the name of a test, wherever it stands. One that ends in "…" stands for all that begin so.
	named = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*…?`)
	cases = regexp.MustCompile(`\([^)]*\)`)
)

const item = `(?:Test|Fuzz|Benchmark)[A-Z][A-Za-z0-9_]*…?(?: \([^)]*\))?`

// TestPagesNameTests holds the pages to their word: who reads that something is shown by a test finds that test, in the package that is named.
func TestPagesNameTests(t *testing.T) {
	have := map[string][]string{} // folder → names
	for _, f := range testFunctions(t) {
		have[f.dir] = append(have[f.dir], f.name)
		have[""] = append(have[""], f.name)
	}
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages: %v", len(pages), err)
	}
	seen := map[string]int{}
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(text), "\n") {
			for _, complaint := range misnamed(line, filepath.Base(page) == "threat-model.md", have) {
				t.Errorf("%s:%d: %s", strings.TrimPrefix(page, "../../"), i+1, complaint)
			}
			seen[filepath.Base(page)] += len(named.FindAllString(line, -1))
		}
	}
	if seen["threat-model.md"] < 200 {
		t.Errorf("the threat model names %d tests: the look does not work", seen["threat-model.md"])
	}
}

// misnamed says which tests of a line there are not. In a strict page each stands behind its package.
func misnamed(line string, strict bool, have map[string][]string) (complaints []string) {
	exists := func(dir, name string) bool {
		prefix, many := strings.CutSuffix(name, "…")
		for _, n := range have[dir] {
			if n == name || many && strings.HasPrefix(n, prefix) {
				return true
			}
		}
		return false
	}
	for _, m := range of.FindAllStringSubmatch(line, -1) {
		for _, name := range named.FindAllString(cases.ReplaceAllString(m[2], ""), -1) {
			if !exists(m[1], name) {
				complaints = append(complaints, "there is no "+name+" in "+m[1])
			}
		}
	}
	for _, name := range named.FindAllString(of.ReplaceAllString(line, ""), -1) {
		switch {
		case strict:
			complaints = append(complaints, name+" stands behind no package: write `package` "+name)
		case !exists("", name):
			complaints = append(complaints, "there is no "+name)
		}
	}
	return complaints
}

func TestMisnamed(t *testing.T) {
	have := map[string][]string{"": {"TestA", "FuzzB", "TestCat"}, "x/y": {"TestA", "FuzzB"}, "z": {"TestCat"}}
	for _, c := range []struct {
		line   string
		strict bool
		want   string
	}{
		{"| it does | `x/y` TestA (one, of many), FuzzB; `z` TestC… |", true, ""},
		{"`x/y` TestCat", false, "there is no TestCat in x/y"},
		{"`x/y` TestA (TestNo is a case), TestB", false, "there is no TestB in x/y"},
		{"`no` TestA", false, "there is no TestA in no"},
		{"`z` TestD…", false, "there is no TestD… in z"},
		{"by `TestCat` and FuzzB", false, ""},
		{"by `TestDog`", false, "there is no TestDog"},
		{"`z` TestCat; TestA", true, "TestA stands behind no package: write `package` TestA"},
		{"Testing is no test, nor is Fuzz…", true, ""},
	} {
		if got := strings.Join(misnamed(c.line, c.strict, have), "; "); got != c.want {
			t.Errorf("%q: %q, want %q", c.line, got, c.want)
		}
	}
}
