package hardening

import (
	"os"
	"strings"
	"testing"
)

// TestTables: a table that is wrong in form would be wrong on every machine.
func TestTables(t *testing.T) {
	seen := map[string]bool{}
	once := func(name, why string) {
		if seen[name] {
			t.Errorf("%s stands there twice", name)
		}
		seen[name] = true
		if why == "" || len(why) > 90 || strings.ContainsAny(why, "\n\t") {
			t.Errorf("%s: why is %q: want one short line", name, why)
		}
	}
	for _, w := range Words {
		once(w.Name, w.Why)
		if strings.ContainsAny(w.String(), " \t\"") {
			t.Errorf("%q is not one word", w)
		}
	}
	if line := CommandLine(); !strings.Contains(line, "lockdown=integrity") || !strings.Contains(line, " slab_nomerge ") || len(line) > 1000 {
		t.Errorf("command line: %s", line)
	}
	late := false
	for _, p := range Params {
		once(p.Name, p.Why)
		if p.Value != Plain(p.Value) {
			t.Errorf("%s: value %q is not plain: it would never be found right", p.Name, p.Value)
		}
		if late && !p.Late {
			t.Errorf("%s stands behind a late one", p.Name)
		}
		late = p.Late
	}
	if last := Params[len(Params)-1]; last.Name != "kernel.modules_disabled" || !last.Late {
		t.Errorf("the last is %s: nothing may need a module after that", last.Name)
	}
}

// TestRedirects: the kernel's rule for several of these is "all or the interface's own", so both must be there.
func TestRedirects(t *testing.T) {
	all := map[string]bool{}
	for _, p := range Params {
		all[p.Name] = true
	}
	for name := range all {
		if rest, ok := strings.CutPrefix(name, "net.ipv4.conf.all."); ok && !all["net.ipv4.conf.default."+rest] {
			t.Errorf("%s has no net.ipv4.conf.default.%s", name, rest)
		}
	}
	// The stricter of all and the interface's own counts: with all set, a CNI plugin could not loosen its interfaces.
	if all["net.ipv4.conf.all.rp_filter"] {
		t.Error("rp_filter is set for all interfaces")
	}
}

func TestIs(t *testing.T) {
	for _, c := range []struct {
		want, text string
		is         bool
	}{{"1", "1\n", true}, {"1", "0\n", false}, {"", "\n", true}, {"", "core\n", false}, {"0 0", "0\t0\n", true}, {"0 0", "4294967295\t511\n", false}} {
		if got := (Param{Value: c.want}).Is(c.text); got != c.is {
			t.Errorf("%q is %q: %v", c.text, c.want, got)
		}
	}
	p := Param{Name: "kernel.randomize_va_space"}
	if _, err := os.Stat(p.Path()); err != nil {
		t.Error(err)
	}
}

// TestDocs: every setting stands in docs/hardening.md, with its value.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/hardening.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range Words {
		if !strings.Contains(string(text), "| `"+w.String()+"` |") {
			t.Errorf("docs/hardening.md has no row for the word %s", w)
		}
	}
	for _, p := range Params {
		if !strings.Contains(string(text), "`"+p.Name+"`") {
			t.Errorf("docs/hardening.md does not name %s", p.Name)
		}
	}
}
