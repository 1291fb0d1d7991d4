package main

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// What there is no time for is written as skipped, with the reason, and nothing is run.
func TestNoTimeIsLeft(t *testing.T) {
	var out bytes.Buffer
	r := &runner{out: &out, begun: time.Now(), until: time.Now().Add(time.Minute), pace: 1, programs: t.TempDir()}
	one := test{pkg: "test/machine", name: "Faults", lanes: 1, usual: 40 * time.Second}
	r.took, r.usual = 100*time.Second, 50*time.Second // twice as slow
	r.one(one)
	var actions []string
	for line := range strings.Lines(out.String()) {
		var e struct{ Action, Package, Test, Output string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Package != module+"test/machine" || e.Test != "TestFaults" {
			t.Errorf("of %s %s, want TestFaults", e.Package, e.Test)
		}
		if e.Action == "output" && !strings.Contains(e.Output, "no time is left: on this host it takes 1m20s") {
			t.Errorf("the reason is %q", e.Output)
		}
		actions = append(actions, e.Action)
	}
	if got := strings.Join(actions, " "); got != "output skip" {
		t.Errorf("events %q, want an output and a skip", got)
	}
}

// What did not get as far as to say what failed has failed, too.
func TestNotRun(t *testing.T) {
	var out bytes.Buffer
	r := &runner{out: &out, begun: time.Now(), pace: 1, programs: t.TempDir(), events: "no-such-program"}
	r.one(test{pkg: "../../test/machine", name: "Faults", lanes: 1, usual: time.Second})
	if text := out.String(); !strings.Contains(text, "no-such-program") || !strings.Contains(text, `"Action":"fail"`) {
		t.Errorf("a test that was not run is told as %q, want a failure with the reason", text)
	}
}

// Tests are made shorter only where there is not time for all.
func TestShort(t *testing.T) {
	todo := []test{{lanes: 1, usual: time.Minute}, {lanes: 2, usual: time.Minute}} // a minute and a half
	for _, c := range []struct {
		until time.Duration
		pace  float64
		want  bool
	}{
		{0, 9, false}, {2 * time.Minute, 1, false}, {2 * time.Minute, 2, true}, {4 * time.Minute, 2, false},
	} {
		var out bytes.Buffer
		r := &runner{out: &out, pace: c.pace}
		if c.until > 0 {
			r.until = time.Now().Add(c.until)
		}
		if got := r.short(todo); got != c.want || (out.Len() > 0) != c.want {
			t.Errorf("until %s at pace %v: short is %v and said %q, want %v", c.until, c.pace, got, out.String(), c.want)
		}
	}
}

// Each test is there: one that was renamed would be run by nobody.
func TestTestsAreThere(t *testing.T) {
	for _, e := range tests {
		files, err := os.ReadDir("../../" + e.pkg)
		if err != nil {
			t.Fatal(err)
		}
		found := e.name == ""
		for _, f := range files {
			if strings.HasSuffix(f.Name(), "_test.go") && !found {
				text, err := os.ReadFile("../../" + e.pkg + "/" + f.Name())
				if err != nil {
					t.Fatal(err)
				}
				found = regexp.MustCompile(`(?m)^func Test` + e.name + `\(`).Match(text)
			}
		}
		if !found {
			t.Errorf("%s has no Test%s", e.pkg, e.name)
		}
	}
}
