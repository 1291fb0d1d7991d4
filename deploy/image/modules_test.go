package image

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// What a node needs for Kubernetes is built from three modules. A library that two of them share has one version: one to patch, and compiled once.
func TestModulesShareVersions(t *testing.T) {
	required := regexp.MustCompile(`(?m)^\t([^\s/]+\.[^\s]+) (v\S+)`)
	replaced := regexp.MustCompile(`(?m)^\t(\S+) => \S+ (v\S+)`)
	type use struct{ version, module string }
	seen, shared := map[string]use{}, 0
	for _, module := range []string{"kubernetes", "runtime", "dns"} {
		text, err := os.ReadFile("../upstream/" + module + "/go.mod")
		if err != nil {
			t.Fatal(err)
		}
		uses := map[string]string{}
		for _, m := range required.FindAllStringSubmatch(string(text), -1) {
			uses[m[1]] = m[2]
		}
		for _, m := range replaced.FindAllStringSubmatch(string(text), -1) {
			uses[m[1]] = m[2]
		}
		for path, version := range uses {
			switch before, ok := seen[path]; {
			case !ok:
				seen[path] = use{version, module}
			case before.version != version:
				t.Errorf("%s: %s in deploy/upstream/%s, %s in deploy/upstream/%s; in deploy/upstream: go work sync, and GOWORK=off go mod tidy in each", path, before.version, before.module, version, module)
			default:
				shared++
			}
		}
	}
	if shared < 20 {
		t.Errorf("only %d libraries are shared; are the go.mod files read right?", shared)
	}
}

// A workspace holds for every folder below its own, and go does nothing for a package in it that is in none of its modules: ours must not be below one.
func TestNoWorkspace(t *testing.T) {
	out, err := exec.Command("go", "env", "GOWORK").Output()
	if err != nil {
		t.Fatal(err)
	}
	if work := strings.TrimSpace(string(out)); work != "" && work != "off" {
		t.Errorf("deploy/image is below the workspace %s: go build and go test fail here", work)
	}
}
