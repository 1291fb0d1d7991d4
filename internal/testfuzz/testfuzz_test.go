package testfuzz

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

// planted has the targets below fail: as a process of its own, so that what go test prints of it can be read.
const planted = "TESTFUZZ_PLANTED"

// FuzzPlanted has a mistake that its seeds do not show.
func FuzzPlanted(f *testing.F) {
	f.Add([]byte("a good input"), "text", uint16(3), int8(-4), true)
	how := os.Getenv(planted)
	Run(f, func(t *testing.T, b []byte, s string, _ uint16, _ int8, sure bool) {
		if how == "" || bytes.Equal(b, []byte("a good input")) && s == "text" || sure {
			return
		}
		clear(b) // what is told is the input as it was
		switch how {
		case "panic":
			panic("planted")
		case "fatal":
			t.Fatal("planted")
		default:
			t.Error("planted")
		}
	})
}

// FuzzPlain has no seeds.
func FuzzPlain(f *testing.F) {
	tried := 0
	f.Cleanup(func() {
		if !fuzzing() && tried < 2 {
			f.Errorf("%d inputs", tried)
		}
	})
	Run(f, func(*testing.T, string) { tried++ })
}

func run(t *testing.T, dir, how, from string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^FuzzPlanted$")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), planted+"="+how, variable+"="+from)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("the mistake was not found:\n%s", out)
	}
	return string(out)
}

var told = regexp.MustCompile(`write this to (testdata/fuzz/FuzzPlanted/[0-9a-f]{16}):\n( +go test fuzz v1\n +\[\]byte\("[^\n]*"\)\n +string\("[^\n]*"\)\n +uint16\(\d+\)\n +int8\(-?\d+\)\n +bool\(false\))`)

// A mistake is found however it shows itself, and what is told is a seed that go test takes, and that shows it again.
func TestKeepsWhatItFinds(t *testing.T) {
	for _, how := range []string{"error", "fatal", "panic"} {
		out := run(t, t.TempDir(), how, "x")
		m := told.FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("%s: no input is told:\n%s", how, out)
		}
		dir := t.TempDir()
		name := filepath.Join(dir, m[1])
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		seed := regexp.MustCompile(`(?m)^ +`).ReplaceAllString(m[2], "") + "\n"
		if err := os.WriteFile(name, []byte(seed), 0o644); err != nil {
			t.Fatal(err)
		}
		if out := run(t, dir, how, "other"); !strings.Contains(out, "FuzzPlanted/"+filepath.Base(name)) && how != "panic" {
			t.Errorf("%s: the seed that was kept does not show it:\n%s\n%s", how, seed, out)
		}
	}
}

// Equal words try equal inputs, others try others.
func TestFrom(t *testing.T) {
	found := func(from string) string {
		return told.FindString(run(t, t.TempDir(), "fatal", from))
	}
	if a, again := found("a"), found("a"); a != again {
		t.Errorf("twice from the same:\n%s\n%s", a, again)
	}
	if a, b := found("a"), found("b"); a == b {
		t.Errorf("from another, too:\n%s", a)
	}
}

// The number of inputs and the time are bounded, for all seeds together.
func TestBounds(t *testing.T) {
	for _, c := range []struct {
		seeds, inputs int
		limit         time.Duration
		slow          time.Duration
		least, most   int
	}{
		{1, 500, time.Hour, 0, 500, 500},
		{7, 500, time.Hour, 0, 500, 510},
		{600, 500, time.Hour, 0, 600, 600},
		{3, 500, 30 * time.Millisecond, 5 * time.Millisecond, 1, 9},
	} {
		tried := 0
		p := &pass{fn: reflect.ValueOf(func(*testing.T, string, uint8) { tried++; time.Sleep(c.slow) }), inputs: c.inputs, limit: c.limit, n: c.seeds}
		for range c.seeds {
			p.more(t, []reflect.Value{reflect.ValueOf("seed"), reflect.ValueOf(uint8(7))})
		}
		if tried < c.least || tried > c.most {
			t.Errorf("%+v: %d inputs", c, tried)
		}
	}
}

// Inputs are many, not those before, and not much larger; the seed stays as it is.
func TestInputs(t *testing.T) {
	m := mutator{rand.New(rand.NewPCG(1, 2)), [][]byte{[]byte("another seed"), nil}}
	for _, text := range []string{"", "x", strings.Repeat("a text ", 100)} {
		seed := []reflect.Value{reflect.ValueOf([]byte(text)), reflect.ValueOf(text), reflect.ValueOf(int32(-1)), reflect.ValueOf(uint64(1)), reflect.ValueOf(false)}
		seen := map[string]bool{}
		for range 2000 {
			in := m.input(seed)
			seen[file(in)] = true
			if n := in[0].Len() + in[1].Len(); n > 2*(2*len(text)+4096) {
				t.Fatalf("%d bytes of %d", n, len(text))
			}
		}
		if len(seen) < 1000 || string(seed[0].Bytes()) != text {
			t.Errorf("%d of 2000 inputs differ; the seed is %q", len(seen), seed[0].Bytes())
		}
	}
}
