package config

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the goldens and the table in docs/config.md")

// paths lists every field of the document's types, in order.
func paths() []string {
	var out []string
	var walk func(reflect.Type, string)
	walk = func(t reflect.Type, at string) {
		for t.Kind() == reflect.Slice || t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		out = append(out, at)
		if t.Kind() == reflect.Struct && t != addrType && t != prefixType {
			for i, name := range names(t) {
				walk(t.Field(i).Type, at+"."+name)
			}
		}
	}
	for _, k := range Kinds() {
		walk(new(Set).slot(k).Type(), string(k))
	}
	return out
}

func TestEveryFieldHasARule(t *testing.T) {
	all := paths()
	for _, at := range all {
		if r := fields[at]; !strings.HasSuffix(r.doc, ".") {
			t.Errorf("%s: doc is %q, want a sentence", at, r.doc)
		}
	}
	if len(all) != len(fields) {
		t.Errorf("%d fields but %d rules", len(all), len(fields))
	}
}

func TestPatternsAgreeWithChecks(t *testing.T) {
	samples := []string{"a", "a-b", "-a", "a-", "a.b", "a..b", ".", "A", "eth0", "en*", "system", "/dev/vda", "/dev", "a b", "https://a", "https://10.0.0.1:6443", "http://a", "0123456789abcdef0"}
	for at, r := range fields {
		if r.pattern == "" || r.ok == nil {
			continue
		}
		p := regexp.MustCompile(r.pattern)
		for _, s := range samples {
			if r.ok(s) && !p.MatchString(s) {
				t.Errorf("%s: %q is fine but does not match the schema's pattern", at, s)
			}
		}
	}
}

func TestSize(t *testing.T) {
	for in, want := range map[string]Size{"1KiB": 1 << 10, "256MiB": 256 << 20, "10GiB": 10 << 30, "8388607TiB": 8388607 << 40} {
		if got, err := ParseSize(in); err != nil || got != want || got.String() != in {
			t.Errorf("%q: got %d (%s), %v", in, got, got, err)
		}
	}
	for _, in := range []string{"", "1", "MiB", "+1MiB", "-1MiB", "1.5GiB", "8388608TiB", "1MB", "1 MiB"} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("%q: accepted as %d", in, got)
		}
	}
}

func TestDiff(t *testing.T) {
	from, err := Parse("", full(t))
	if err != nil {
		t.Fatal(err)
	}
	text := string(full(t))
	for old, change := range map[string]string{
		"mtu: 1400": "mtu: 1500", "hostname: node-1.example.org\n": "", "      - 2001:db8::3/64": "      - 2001:db8::4/64",
		"  - name: en*\n    dhcp: true\n": "  - name: eth1\n    dhcp: true\n", "  - 10.0.0.1\n  - 2001:db8::53": "  - 2001:db8::53\n  - 10.0.0.1",
		"schedulable: false\n": "",
	} {
		if !strings.Contains(text, old) {
			t.Fatalf("full.yaml has no %q", old)
		}
		text = strings.Replace(text, old, change, 1)
	}
	to, err := Parse("", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Machine.hostname: node-1.example.org -> (none)",
		"Network.interfaces[eth0].mtu: 1400 -> 1500",
		"Network.interfaces[eth0].addresses: - 2001:db8::3/64",
		"Network.interfaces[eth0].addresses: + 2001:db8::4/64",
		"Network.interfaces[en*]: - {name: en*, dhcp: true}",
		"Network.interfaces[eth1]: + {name: eth1, dhcp: true}",
		"Network.nameservers: order [10.0.0.1, 2001:db8::53] -> [2001:db8::53, 10.0.0.1]",
		"Kubernetes.schedulable: false -> true",
	}
	if got := Diff(from, to); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %s\nwant %s", strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
	if got := Diff(from, from); got != nil {
		t.Errorf("nothing differs, got %v", got)
	}
	if !Equal(from, from) || Equal(from, to) {
		t.Error("Equal disagrees with Diff")
	}
}

func TestValidateASetMadeByHand(t *testing.T) {
	s := Set{Network: &Network{Interfaces: []Interface{{MTU: 5, Addresses: []netip.Prefix{netip.MustParsePrefix("10.96.0.3/24")}}}}}
	want := `Network.interfaces[0].name: is missing; allowed: a name like "eth0" or a pattern like "en*", at most 15 characters
Network.interfaces[0].mtu: 5 is out of range; allowed: 0, or 68 to 65535
Network.interfaces[0].addresses[0]: "10.96.0.3/24" overlaps with Kubernetes.serviceSubnet "10.96.0.0/16"; set one of them to a network that is free`
	if err := Validate(s); err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	if s.Machine != nil {
		t.Error("Validate changed its argument")
	}
	if err := Validate(Set{}); err != nil {
		t.Errorf("the empty set: %v", err)
	}
}

func TestSchema(t *testing.T) {
	for _, k := range Kinds() {
		out := Schema(k)
		if !json.Valid(out) {
			t.Fatalf("%s: not JSON", k)
		}
		golden := "testdata/" + strings.ToLower(string(k)) + ".schema.json"
		if *update {
			if err := os.WriteFile(golden, out, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil || string(want) != string(out) {
			t.Errorf("%s differs from Schema (go test -update): %v\n%s", golden, err, out)
		}
	}
	if Schema("x") != nil {
		t.Error("a schema for no kind")
	}
}

// TestDocs keeps the table in docs/config.md equal to the rules.
func TestDocs(t *testing.T) {
	const page, begin, end = "../docs/config.md", "<!-- fields: go test ./config -update -->\n", "<!-- end of fields -->\n"
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := strings.Cut(string(data), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok1 || !ok2 {
		t.Fatalf("%s has no field markers", page)
	}
	var b strings.Builder
	for _, at := range paths() {
		r := fields[at]
		if !strings.Contains(at, ".") {
			b.WriteString("\n### " + at + "\n\n" + r.doc + "\n\n| field | what | default | allowed |\n|---|---|---|---|\n")
			continue
		}
		_, name, _ := strings.Cut(at, ".")
		standard, allowed := r.standard, r.permits()
		if r.required {
			standard = "(required)"
		}
		if strings.HasSuffix(at, "stateSize") {
			allowed = Size(r.min).String() + " to " + Size(r.max).String()
		}
		b.WriteString("| `" + name + "` | " + r.doc + " | " + standard + " | " + strings.ReplaceAll(allowed, "*", `\*`) + " |\n")
	}
	if want := before + begin + b.String() + "\n" + end + after; want != string(data) {
		if !*update {
			t.Fatalf("%s differs from the rules: go test ./config -update", page)
		}
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
