package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"bhctl": main})
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
			return nil
		},
	})
}
