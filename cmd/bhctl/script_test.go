package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"bhctl": main, "qemu-system-x86_64": fakeQEMU, "browser": browser})
}

// TestScript runs testdata/script/*.txtar: what a user types, and what they read. -update is not used: the texts are short and worth reading.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("XDG_CONFIG_HOME", e.WorkDir+"/.config")
			e.Setenv("BULKHEAD_MACHINES", e.WorkDir+"/machines")
			e.Setenv("PATH", os.Getenv("PATH"))
			e.Setenv("BULKHEAD_ACCEL", "tcg")
			// A cluster that answers, for scripts that set BHCONFIG to this.
			_, c := startFake(e.T().(testing.TB))
			writeContexts(e.T().(testing.TB), filepath.Join(e.WorkDir, "fake.yaml"), c)
			return nil
		},
	})
}
