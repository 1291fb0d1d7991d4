// Package testfuzz gives each fuzz target some random inputs in every run of the tests, besides its seeds: go test -fuzz is too slow to start to be run for each
// commit. What is tried is made of the target's own seeds and follows from BULKHEAD_FUZZ_FROM, which CI sets to the commit; without it every run tries the same.
package testfuzz

import (
	"crypto/sha256"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

const (
	variable = "BULKHEAD_FUZZ_FROM"
	inputs   = 500                    // of one target in one run, as far as the time allows
	limit    = 200 * time.Millisecond // for them
	stuck    = 30 * time.Second       // with one input: it is told then, for go test shows no input when its own time is over
	longest  = 16 << 10               // bytes of an input's text that is printed
)

// Run is f.Fuzz(target), and in a run without -fuzz tries random inputs, too. One that fails is printed as the file that keeps it.
func Run(f *testing.F, target any) {
	f.Helper()
	if fuzzing() {
		f.Fuzz(target)
		return
	}
	fn := reflect.ValueOf(target)
	p := &pass{fn: fn, from: os.Getenv(variable), inputs: inputs, limit: limit}
	if corpus(f).Len() == 0 {
		var zeros []any
		for i := 1; i < fn.Type().NumIn(); i++ {
			zeros = append(zeros, reflect.Zero(fn.Type().In(i)).Interface())
		}
		f.Add(zeros...)
	}
	f.Fuzz(reflect.MakeFunc(fn.Type(), func(args []reflect.Value) []reflect.Value {
		t := args[0].Interface().(*testing.T)
		seed := clone(args[1:])
		fn.Call(args)
		if !t.Failed() {
			p.seeds(f)
			p.more(t, seed)
		}
		return nil
	}).Interface())
}

// fuzzing reports whether go test was told to fuzz: then the seeds run only to show that they pass.
func fuzzing() bool {
	given := flag.Lookup("test.fuzz")
	return given != nil && given.Value.String() != ""
}

// corpus is the list of a target's seeds: those that were added, and within f.Fuzz those of testdata too. testing has no way to ask for it.
func corpus(f *testing.F) reflect.Value {
	c := reflect.ValueOf(f).Elem().FieldByName("corpus")
	if c.Kind() != reflect.Slice {
		panic("testing.F has no list of seeds by the name of corpus any more")
	}
	return c
}

// A pass is what one target tries in one run.
type pass struct {
	fn     reflect.Value
	from   string
	inputs int
	limit  time.Duration

	texts [][]byte // of all seeds, to make others of
	n     int      // how many seeds there are
	done  int      // how many had their turn
	spent time.Duration
	tried int
}

// seeds reads what the target was given. It is known when the first seed runs.
func (p *pass) seeds(f *testing.F) {
	if p.n > 0 {
		return
	}
	all := corpus(f)
	p.n = all.Len()
	for i := range p.n {
		for values, k := all.Index(i).FieldByName("Values"), 0; k < values.Len(); k++ {
			switch v := values.Index(k).Elem(); {
			case v.Kind() == reflect.String:
				p.texts = append(p.texts, []byte(v.String()))
			case v.Kind() == reflect.Slice:
				p.texts = append(p.texts, v.Bytes())
			}
		}
	}
}

// more tries a seed's share of the inputs, each with a change or more from the seed. What it tries depends on nothing else that ran; how many it tries
// depends on the time, of which later seeds get what earlier ones left.
func (p *pass) more(t *testing.T, seed []reflect.Value) {
	p.done++
	m := mutator{rand.New(rand.NewChaCha8(sha256.Sum256([]byte(p.from + "\x00" + t.Name())))), p.texts}
	share := p.limit * time.Duration(p.done) / time.Duration(p.n)
	for range (p.inputs + p.n - 1) / p.n {
		if p.spent >= share || t.Failed() {
			return
		}
		start := time.Now()
		p.try(t, m.input(seed))
		p.spent += time.Since(start)
		p.tried++
	}
}

// try runs the target with one input, and tells it if it did not pass, however it ended.
func (p *pass) try(t *testing.T, input []reflect.Value) {
	kept, passed := clone(input), false
	timer := time.AfterFunc(stuck, func() { fmt.Fprintf(os.Stderr, "%s is at it for %v: %s\n", t.Name(), stuck, describe(t.Name(), kept)) })
	defer func() {
		timer.Stop()
		if !passed || t.Failed() {
			t.Log(describe(t.Name(), kept))
		}
	}()
	p.fn.Call(append([]reflect.Value{reflect.ValueOf(t)}, input...))
	passed = true
}

func clone(args []reflect.Value) (out []reflect.Value) {
	for _, a := range args {
		if a.Kind() == reflect.Slice {
			a = reflect.ValueOf(append([]byte{}, a.Bytes()...))
		}
		out = append(out, a)
	}
	return out
}

// describe says where to keep an input, and as what. One that is too long to be printed it keeps itself.
func describe(test string, input []reflect.Value) string {
	target, _, _ := strings.Cut(test, "/")
	text := file(input)
	name := fmt.Sprintf("testdata/fuzz/%s/%.8x", target, sha256.Sum256([]byte(text)))
	if len(text) <= longest {
		return fmt.Sprintf("a random input did it. To keep it, write this to %s:\n%s", name, strings.TrimSuffix(text, "\n"))
	}
	if err := os.MkdirAll("testdata/fuzz/"+target, 0o755); err != nil {
		return fmt.Sprintf("a random input of %d bytes did it, and is lost: %v", len(text), err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		return fmt.Sprintf("a random input of %d bytes did it, and is lost: %v", len(text), err)
	}
	return "a random input did it, and was written to " + name
}

// file writes an input as go test keeps it.
func file(input []reflect.Value) string {
	b := strings.Builder{}
	b.WriteString("go test fuzz v1\n")
	for _, v := range input {
		switch v.Kind() {
		case reflect.Slice:
			fmt.Fprintf(&b, "[]byte(%+q)\n", v.Bytes())
		case reflect.String:
			fmt.Fprintf(&b, "string(%+q)\n", v.String())
		default:
			fmt.Fprintf(&b, "%s(%v)\n", v.Type(), v.Interface())
		}
	}
	return b.String()
}
