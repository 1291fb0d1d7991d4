package main

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// The runner finds the targets, and there are many: a parser of foreign bytes has one.
func TestTargets(t *testing.T) {
	t.Chdir("../..")
	all, module, err := targets(regexp.MustCompile(""))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, f := range all {
		have[strings.TrimPrefix(f.Package, module+"/")+" "+f.Name] = true
	}
	for _, want := range []string{"config FuzzParse", "internal/gpt FuzzRead", "storaged/luks FuzzDecode", "internal/initctl FuzzRequest", "apid FuzzCalls"} {
		if !have[want] {
			t.Errorf("%s is not found", want)
		}
	}
	if len(have) < 50 || len(have) != len(all) {
		t.Errorf("%d targets, %d of them different", len(all), len(have))
	}
}

func TestRead(t *testing.T) {
	var r result
	r.read(strings.NewReader("fuzz: elapsed: 0s, gathering baseline coverage: 0/4 completed\n" +
		"fuzz: elapsed: 3s, execs: 325017 (108336/sec), new interesting: 11 (total: 202)\nfuzz: elapsed: 1m20s, execs: 680218 (0/sec), new interesting: 12 (total: 203)\n" +
		"    Failing input written to testdata/fuzz/FuzzX/582528ddfad69eb5\n"))
	if r.elapsed != 80*time.Second || r.executions != 680218 || r.fresh != 12 || r.corpus != 203 || r.seed != "testdata/fuzz/FuzzX/582528ddfad69eb5" || len(r.output) != 2 {
		t.Errorf("%+v", r)
	}
}

// The end of the time is no failure, and a failure is one whatever else is said.
func TestCutOff(t *testing.T) {
	late := []string{"--- FAIL: FuzzX (7.02s)", "    context deadline exceeded", "FAIL", "exit status 1"}
	if r := (result{output: late}); !r.cutOff() {
		t.Error("the end of the time counts as a failure")
	}
	for _, r := range []result{{output: late, seed: "x"}, {output: []string{"--- FAIL: FuzzX", "    --- FAIL: FuzzX", "        panic"}}, {output: []string{"no such package"}}} {
		if r.cutOff() {
			t.Errorf("%+v does not count as a failure", r)
		}
	}
}
