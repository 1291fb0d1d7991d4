// Package archtest enforces who may import whom (docs: STYLE section 3). Each rule says why.
package archtest

import (
	"bufio"
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/bulkhead-os/bulkhead/"

// daemons are level 1: they meet only over a socket.
var daemons = []string{"apid", "gateway", "networkd", "storaged", "trustd", "services/machined", "services/etcdd", "services/kubeletd", "services/updated"}

// forbid lists what a package must not reach, directly or through others. A name that ends in "/..." is a tree.
var forbid = func() []rule {
	rules := []rule{
		{"init/...", "google.golang.org/grpc", "PID 1 stays small"},
		{"init/...", "os/exec", "it would race with the reaper"},
		{"init/...", "net/http", "PID 1 speaks no network protocol"},
		{"init/...", "encoding/json", "PID 1 parses nothing: units are Go literals"},
		{"init/...", "go.yaml.in/yaml/v3", "PID 1 parses nothing"},
		{"config", "google.golang.org/grpc", "the document is pure"},
		{"config", module + "internal/daemon", "the document knows no daemon"},
		{"internal/hardening", "fmt", "PID 1 links it"},
		{"internal/hardening", "os", "it is tables: PID 1 and machined read and write"},
		{"cmd/bulkheadd", "github.com/spf13/cobra", "no command line on a node"},
		{"cmd/bulkheadd", "k8s.io/client-go/rest", "heavy libraries stay in kubeletd"},
		{"cmd/bulkheadd", "go.etcd.io/etcd/server/v3", "heavy libraries stay in etcdd"},
		{"cmd/bulkheadd", module + "deploy/...", "the builder is no part of the node"},
		{"cmd/bulkheadd", module + "internal/login", "people sign in where they are"},
		{"internal/uid", module + "...", "level 0 of level 0"},
	}
	for _, from := range daemons {
		for _, to := range daemons {
			if from != to {
				rules = append(rules, rule{from + "/...", module + to, "daemons meet only through api"})
			}
		}
		rules = append(rules,
			rule{from + "/...", module + "cmd/...", "nothing imports a main"},
			rule{from + "/...", module + "deploy/...", "a daemon does not know how the image is made"},
			rule{"cmd/bhctl", module + from, "the command line is a client"})
	}
	for _, any := range append([]string{"config", "api/...", "internal/...", "cmd/...", "deploy/image", "deploy/qemu"}, daemons...) {
		rules = append(rules, rule{any, module + "test/...", "nothing imports test"})
	}
	return rules
}()

type rule struct{ from, to, why string }

func TestImports(t *testing.T) {
	deps := map[string]map[string]bool{} // package → everything that it reaches
	cmd := exec.Command("go", "list", "-deps", "-f", "{{.ImportPath}} {{join .Imports \",\"}}", module+"...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	direct := map[string][]string{}
	sc := bufio.NewScanner(bytes.NewReader(out))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		path, imports, _ := strings.Cut(sc.Text(), " ")
		direct[path] = strings.Split(imports, ",")
	}
	var reach func(string) map[string]bool
	reach = func(p string) map[string]bool {
		if d, ok := deps[p]; ok {
			return d
		}
		d := map[string]bool{}
		deps[p] = d // import cycles do not exist in Go
		for _, i := range direct[p] {
			if i != "" {
				d[i] = true
				for j := range reach(i) {
					d[j] = true
				}
			}
		}
		return d
	}
	for _, r := range forbid {
		for p := range direct {
			if !match(module+r.from, p) {
				continue
			}
			for d := range reach(p) {
				if match(r.to, d) {
					t.Errorf("%s reaches %s: %s", strings.TrimPrefix(p, module), d, r.why)
				}
			}
		}
	}
}

// match reports whether path is pattern, or below it if pattern ends in "/...".
func match(pattern, path string) bool {
	tree, ok := strings.CutSuffix(pattern, "/...")
	return path == pattern || ok && (path == tree || strings.HasPrefix(path, tree+"/"))
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"a/...", "a", true}, {"a/...", "a/b", true}, {"a/...", "ab", false}, {"a", "a", true}, {"a", "a/b", false},
	} {
		if got := match(c.pattern, c.path); got != c.want {
			t.Errorf("match(%q, %q) = %v, want %v", c.pattern, c.path, got, c.want)
		}
	}
}
