// Package testtool finds the programs of other people that judge ours in tests.
package testtool

import (
	"os"
	"os/exec"
	"testing"
)

// Path returns where the tool is, also outside of $PATH where Debian keeps tools for root. A test whose judge is missing is skipped;
// with REQUIRE_ROOT=1, as CI sets it, it fails, so that what was not judged does not look green.
func Path(t testing.TB, tool, debianPackage string) string {
	t.Helper()
	for _, name := range []string{tool, "/usr/sbin/" + tool, "/sbin/" + tool} {
		if p, err := exec.LookPath(name); err == nil {
			return p
		}
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatalf("no %s: install the package %s", tool, debianPackage)
	}
	t.Skipf("no %s: install the package %s", tool, debianPackage)
	return ""
}

// Run runs a tool that must succeed and returns all that it says.
func Run(t testing.TB, path string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", path, args, err, out)
	}
	return string(out)
}
