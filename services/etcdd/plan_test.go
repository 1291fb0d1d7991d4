package etcdd

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/testfuzz"
)

var update = flag.Bool("update", false, "write the goldens anew")

var cp = spec{Name: "n1", Role: config.ControlPlane}

// signed is a state in which everything that others must bring is there.
func signed() State {
	return State{Bootstrapped: true, Volume: true,
		Want: map[string]string{caFile: "a", serverFile: "b", peerFile: "c", rootClient: "d", ownClient: "e"}, Port: "2380", Have: map[string]string{}}
}

func ready(a auth) State {
	s := signed()
	s.Have, s.Running, s.Ready, s.Auth, s.Loaded = maps.Clone(s.Want), true, true, a, s.Want[caFile]
	return s
}

func TestPlan(t *testing.T) {
	half := signed()
	half.Want[peerFile], half.Want[rootClient] = "", ""
	renewed := ready(auth{})
	renewed.Ready = false
	renewed.Want[serverFile] = "new"
	other, turn := ready(auth{}), ready(auth{})
	other.Want[caFile], turn.Turn = "new", true
	for _, c := range []struct {
		name string
		want spec
		have State
	}{
		{"authority-replaced", cp, other},
		{"back-with-another-authority", cp, turn},
		{"nothing", cp, State{}},
		{"worker", spec{Name: "w", Role: config.Worker}, State{}},
		{"unsigned", cp, half},
		{"first-start", cp, signed()},
		{"no-answer-and-renewed", cp, renewed},
		{"fresh-member", cp, ready(auth{})},
		{"tampered", cp, ready(auth{Enabled: true,
			Users: map[string][]string{"root": {"root"}, "kube-apiserver": {"kube-apiserver", "root"}, "bulkhead": {}, "mallory": {"root"}},
			Roles: map[string][]grant{"root": nil, "kube-apiserver": {{"/registry/", true}, {"compact_rev_key", false}, {"/bulkhead/", true}}, "bulkhead": {{"/bulkhead/", true}}, "spare": nil}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			steps, err := plan(c.want, c.have)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, s := range steps {
				b.WriteString(s.String() + "\n")
			}
			golden(t, filepath.Join("testdata", c.name+".plan"), b.String())
		})
	}
	if _, err := plan(spec{Role: config.Worker}, ready(auth{})); err == nil {
		t.Error("a control plane with a member became a worker without a word")
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", path, got, want)
	}
}

// apply is the model of etcd: what doAuth does, on a value.
func apply(a *auth, s Step) {
	switch s.Op {
	case "role add":
		a.Roles[s.Name] = nil
	case "role delete":
		delete(a.Roles, s.Name)
	case "role grant":
		a.Roles[s.Name] = append(a.Roles[s.Name], grantOf(s.Arg))
	case "role revoke":
		a.Roles[s.Name] = slices.DeleteFunc(slices.Clone(a.Roles[s.Name]), func(g grant) bool { return g == grantOf(s.Arg) })
	case "user add":
		a.Users[s.Name] = nil
	case "user delete":
		delete(a.Users, s.Name)
	case "user grant":
		a.Users[s.Name] = append(a.Users[s.Name], s.Arg)
	case "user revoke":
		a.Users[s.Name] = slices.DeleteFunc(slices.Clone(a.Users[s.Name]), func(r string) bool { return r == s.Arg })
	case "auth enable":
		a.Enabled = true
	}
}

// FuzzPlanConverges: apply a plan, plan again, and nothing is left.
func FuzzPlanConverges(f *testing.F) {
	f.Add("root kube-apiserver:root,x mallory:root", "root kube-apiserver:/registry/*,foo spare", true)
	f.Add("", "", false)
	testfuzz.Run(f, func(t *testing.T, us, rs string, enabled bool) {
		a := auth{Enabled: enabled, Users: map[string][]string{}, Roles: map[string][]grant{}}
		for _, u := range strings.Fields(us) {
			name, roles, _ := strings.Cut(u, ":")
			a.Users[name] = nil
			for _, r := range strings.Split(roles, ",") {
				if !slices.Contains(a.Users[name], r) && r != "" {
					a.Users[name] = append(a.Users[name], r)
				}
			}
		}
		for _, r := range strings.Fields(rs) {
			name, grants, _ := strings.Cut(r, ":")
			a.Roles[name] = nil
			for _, g := range strings.Split(grants, ",") {
				if !slices.Contains(a.Roles[name], grantOf(g)) && g != "" {
					a.Roles[name] = append(a.Roles[name], grantOf(g))
				}
			}
		}
		for _, s := range planAuth(a) {
			apply(&a, s)
		}
		if rest := planAuth(a); len(rest) > 0 {
			t.Errorf("users %q, roles %q: left %v", us, rs, rest)
		}
	})
}
