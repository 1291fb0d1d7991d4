// Vms runs the tests that need virtual machines, as many side by side as the host has turns for, and writes what "go test -json" would. Each package's test
// program is built once.
//
//	go run ./test/vms | REPORT_LIVE=1 go run ./test/report
//	go run ./test/vms -only 'Faults|Upgrade'
//	go run ./test/vms -until 1795874400
//
// With -until, on a host on which there is no time for all, which is said: TestFaults is shorter, the fault matrix has its rows with kills, and a test that would
// not end in time is not begun, by how long it usually takes and how quick this host has been. Rows and tests that are left out are written as skipped, with the reason.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	module = "github.com/bulkhead-os/bulkhead/"
	lanes  = 2                // side by side: what two processors do without one test making another late
	limit  = 75 * time.Minute // for one test: a bound, not a measure
	vague  = 6                // what is usual is known no better than by this part of it
)

// A test is one function of a package's tests, or, with no name, all those of a package that no other entry names.
type test struct {
	pkg, name string
	lanes     int           // that it takes
	usual     time.Duration // how long, on a host that builds Kubernetes in ten minutes
	short     time.Duration // the same where there is no time for all (shorter); 0: as long
}

func (t test) String() string {
	if t.name == "" {
		return "the rest of " + t.pkg
	}
	return "Test" + t.name
}

func main() {
	only := flag.String("only", "", "a regular expression for names of tests, without Test")
	until := flag.Int64("until", 0, "a time, in seconds since 1970: no test is begun that would not end before; 0 leaves nothing out")
	slow := flag.Float64("slow", 1, "how many times slower than usual this host has been before: until a test has ended, it is the measure")
	flag.Parse()
	r := &runner{out: os.Stdout, begun: time.Now(), pace: max(1, *slow)}
	if *until > 0 {
		r.until = time.Unix(*until, 0)
	}
	if err := r.run(*only); err != nil { // who reads has only our output, and must see that this is no success
		r.event("output", test{pkg: "test/vms", name: "Itself"}, err.Error()+"\n")
		r.event("fail", test{pkg: "test/vms", name: "Itself"}, "")
		os.Exit(1)
	}
}

type runner struct {
	programs string // the folder of test programs
	events   string // the program that makes events of what a test program says (go tool test2json)
	begun    time.Time
	until    time.Time // zero: there is time for all
	pace     float64   // before a test has ended: how many times longer than usual things take

	mu          sync.Mutex
	out         io.Writer
	took, usual time.Duration // of what has ended
}

func (r *runner) run(only string) error {
	filter, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	todo := slices.DeleteFunc(slices.Clone(tests), func(t test) bool { return only != "" && (t.name == "" || !filter.MatchString(t.name)) })
	if len(todo) == 0 {
		return fmt.Errorf("-only %q: no test has such a name", only)
	}
	if r.programs, err = filepath.Abs("out/vms"); err != nil {
		return err
	}
	tool, err := exec.Command("go", "tool", "-n", "test2json").Output()
	if err != nil {
		return fmt.Errorf("go tool test2json: %w", err)
	}
	r.events = strings.TrimSpace(string(tool))
	if err := r.build(todo); err != nil {
		return err
	}
	free := make(chan struct{}, lanes)
	for range lanes {
		free <- struct{}{}
	}
	var all sync.WaitGroup
	shortened := false
	for i := range todo {
		t := &todo[i]
		for range t.lanes {
			<-free
		}
		if t.short > 0 && !shortened && r.short(todo[i:]) {
			shortened = true
			for k, v := range shorter {
				os.Setenv(k, v)
			}
		}
		if t.short > 0 && shortened {
			t.usual = t.short
		}
		all.Go(func() {
			r.one(*t)
			for range t.lanes {
				free <- struct{}{}
			}
		})
	}
	all.Wait()
	return nil
}

// short says whether there is not time for all of what is left to do, and says so. It is asked when a test that can be shorter is to begin: the tests before it have shown how quick the host is.
func (r *runner) short(todo []test) bool {
	if r.until.IsZero() {
		return false
	}
	var turns time.Duration
	for _, t := range todo {
		turns += t.usual * time.Duration(t.lanes)
	}
	need, left := r.expected(turns/lanes), time.Until(r.until)
	if need <= left+left/vague {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "vms: this host is slow: it needs %s for what is left, and has %s; what is left out is named; with all: make test-vm\n", need.Round(time.Minute), left.Round(time.Minute))
	return true
}

// build builds each package's test program.
func (r *runner) build(todo []test) error {
	done := map[string]bool{}
	for _, t := range todo {
		if done[t.pkg] {
			continue
		}
		done[t.pkg] = true
		cmd := exec.Command("go", "test", "-c", "-vet=off", "-ldflags=-s -w", "-o", r.program(t), "./"+t.pkg)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", cmd, err, out)
		}
	}
	return nil
}

func (r *runner) program(t test) string {
	return filepath.Join(r.programs, strings.ReplaceAll(t.pkg, "/", "-")+".test")
}

// one runs a test, or writes why not.
func (r *runner) one(t test) {
	expected := r.expected(t.usual)
	if !r.until.IsZero() && time.Now().Add(expected+expected/vague).After(r.until) {
		r.event("output", t, fmt.Sprintf("    no time is left: on this host it takes %s, and %s are left; by itself: BULKHEAD_VM=1 go run ./test/vms -only '^%s$'\n",
			expected.Round(time.Second), max(0, time.Until(r.until)).Round(time.Second), t.name))
		r.event("skip", t, "")
		return
	}
	r.say(t, "begins; it takes about %s", expected.Round(time.Second))
	pattern, err := r.pattern(t)
	if err != nil {
		r.event("output", t, err.Error()+"\n")
		r.event("fail", t, "")
		return
	}
	cmd := exec.Command(r.events, "-t", "-p", module+t.pkg, r.program(t), "-test.v=test2json", "-test.timeout="+limit.String(), "-test.run="+pattern)
	cmd.Dir = t.pkg
	var out bytes.Buffer // lines of several tests would mingle
	cmd.Stdout, cmd.Stderr = &out, &out
	if t.lanes == lanes {
		cmd.Stdout, cmd.Stderr = r.out, r.out // as it says it: nobody else does
	}
	start := time.Now()
	err = cmd.Run()
	r.ended(t, time.Since(start), out.Bytes())
	if err != nil && cmd.ProcessState.ExitCode() != 1 { // with 1 the events say what failed; else it did not get as far
		r.event("output", t, fmt.Sprintf("%s: %v\n", cmd, err))
		r.event("fail", t, "")
	}
}

// pattern is the argument of -test.run.
func (r *runner) pattern(t test) (string, error) {
	if t.name != "" {
		return "^Test" + t.name + "$", nil
	}
	cmd := exec.Command(r.program(t), "-test.list=.")
	cmd.Dir = t.pkg
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", cmd, err)
	}
	rest := slices.DeleteFunc(strings.Fields(string(out)), func(name string) bool {
		return slices.ContainsFunc(tests, func(o test) bool { return o.pkg == t.pkg && "Test"+o.name == name })
	})
	return "^(" + strings.Join(rest, "|") + ")$", nil
}

// expected is how long something will take that usually takes as long as said, if this host goes on as it was.
func (r *runner) expected(usual time.Duration) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	pace := r.pace
	if r.usual > 0 {
		pace = float64(r.took) / float64(r.usual)
	}
	return time.Duration(float64(usual) * pace)
}

func (r *runner) ended(t test, took time.Duration, out []byte) {
	r.say(t, "ended after %s, where %s are usual", took.Round(time.Second), t.usual)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.took += took
	r.usual += t.usual
	_, _ = r.out.Write(out)
}

// say is for people: whoever reads the events passes on what is none.
func (r *runner) say(t test, format string, a ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "vms: [%4d s] %s %s\n", int(time.Since(r.begun).Seconds()), t, fmt.Sprintf(format, a...))
}

// event writes a line as test2json does.
func (r *runner) event(action string, t test, output string) {
	line, err := json.Marshal(struct{ Action, Package, Test, Output string }{action, module + t.pkg, strings.ReplaceAll(t.String(), " ", "_"), output})
	if err != nil {
		panic(err) // four strings
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "%s\n", line)
}
