// Fuzz runs every fuzz target of the tree, one after the other, each for the same time, and says for each how much it tried and what was
// new; it finds the targets by itself. It goes on after a target that fails, and exits 1 at the end if one failed, or ran for less than its time.
//
//	go run ./test/fuzz -time 5m
//	go run ./test/fuzz -time 30s -only 'luks|FuzzParse'
//	go run ./test/fuzz -list
package main

import (
	"bufio"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// A target is one function of a package.
type target struct{ Package, Dir, Name string }

// A result is what go test said of one run.
type result struct {
	elapsed    time.Duration
	executions int
	fresh      int // inputs that reached something new
	corpus     int // inputs that are kept, the fresh ones included
	seed       string
	output     []string // the end of it
	err        error
}

func main() {
	each := flag.Duration("time", 20*time.Second, "for each target; a minute or more finds things, a second only shows that it works")
	only := flag.String("only", "", "a regular expression for packages and names")
	parallel := flag.Int("parallel", runtime.NumCPU(), "processes that try inputs at once")
	list := flag.Bool("list", false, "only name the targets")
	flag.Parse()
	if err := run(*each, *parallel, *only, *list); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(each time.Duration, parallel int, only string, list bool) error {
	filter, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if each < time.Second {
		return fmt.Errorf("-time: %v is below a second; say 20s, or 5m", each)
	}
	all, module, err := targets(filter)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fmt.Errorf("no target matches %q; go run ./test/fuzz -list names them", only)
	}
	var bad []string
	sum, start := result{}, time.Now()
	for _, t := range all {
		name := strings.TrimPrefix(t.Package, module+"/") + " " + t.Name
		if list {
			fmt.Println(name)
			continue
		}
		r := fuzz(t, each, parallel)
		sum.elapsed, sum.executions, sum.fresh, sum.corpus = sum.elapsed+r.elapsed, sum.executions+r.executions, sum.fresh+r.fresh, sum.corpus+r.corpus
		state := "ok"
		switch {
		case r.err != nil && !(r.elapsed >= each && r.cutOff()):
			state = "FAILED"
			if r.seed != "" {
				state += ", keep " + filepath.Join(t.Dir, r.seed)
			}
		case r.elapsed < each:
			state = fmt.Sprintf("FAILED: it ran for %v only", r.elapsed)
		}
		fmt.Printf("%-55s %6.0f s %12d runs %8.0f/s %6d new %6d kept  %s\n", name, r.elapsed.Seconds(), r.executions,
			float64(r.executions)/max(r.elapsed.Seconds(), 1), r.fresh, r.corpus, state)
		if state != "ok" {
			bad = append(bad, name)
			fmt.Printf("    %s\n", strings.Join(r.output, "\n    "))
		}
	}
	if list {
		return nil
	}
	fmt.Printf("%d targets, %d runs in %.0f s of fuzzing (%.0f s in all), %d new, %d kept, %d failed\n", len(all), sum.executions, sum.elapsed.Seconds(),
		time.Since(start).Seconds(), sum.fresh, sum.corpus, len(bad))
	if len(bad) > 0 {
		return fmt.Errorf("failed: %s", strings.Join(bad, ", "))
	}
	return nil
}

// cutOff reports whether go test found nothing, and only says that the end of its time came while it was looking for a shorter input: it
// takes that for a failure.
func (r result) cutOff() bool {
	found := false
	for i, line := range r.output {
		if strings.HasPrefix(strings.TrimSpace(line), "--- FAIL") {
			if found || i+1 >= len(r.output) || strings.TrimSpace(r.output[i+1]) != "context deadline exceeded" {
				return false
			}
			found = true
		}
	}
	return found && r.seed == ""
}

// targets finds all of them in the module of the working folder.
func targets(filter *regexp.Regexp) (all []target, module string, err error) {
	out, err := exec.Command("go", "list", "-f", "{{.Module.Path}}\t{{.ImportPath}}\t{{.Dir}}\t{{range .TestGoFiles}}{{.}},{{end}}{{range .XTestGoFiles}}{{.}},{{end}}", "./...").Output()
	if err != nil {
		return nil, "", fmt.Errorf("go list: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 4 {
			return nil, "", fmt.Errorf("go list said %q", line)
		}
		module = f[0]
		for file := range strings.SplitSeq(strings.TrimSuffix(f[3], ","), ",") {
			if file == "" {
				continue
			}
			names, err := functions(filepath.Join(f[2], file))
			if err != nil {
				return nil, "", err
			}
			for _, name := range names {
				if filter.MatchString(f[1] + " " + name) {
					all = append(all, target{f[1], f[2], name})
				}
			}
		}
	}
	return all, module, nil
}

// functions are the targets of a file, as go test sees them.
func functions(path string) (names []string, err error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Recv != nil || !strings.HasPrefix(f.Name.Name, "Fuzz") || len(f.Type.Params.List) != 1 {
			continue
		}
		if star, ok := f.Type.Params.List[0].Type.(*ast.StarExpr); ok {
			if s, ok := star.X.(*ast.SelectorExpr); ok && s.Sel.Name == "F" {
				names = append(names, f.Name.Name)
			}
		}
	}
	return names, nil
}

func fuzz(t target, each time.Duration, parallel int) (r result) {
	// Told nothing, Go makes each new input smaller for up to a minute, which is not looking for others: a parser of large documents saw 14 inputs a second.
	cmd := exec.Command("go", "test", "-run", "^$", "-fuzz", "^"+t.Name+"$", "-fuzztime", each.String(), "-fuzzminimizetime", "1s", "-parallel", strconv.Itoa(parallel), t.Package)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return result{err: err}
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return result{err: err}
	}
	r.read(out)
	r.err = cmd.Wait()
	return r
}

var (
	progress = regexp.MustCompile(`^fuzz: elapsed: (\S+), execs: (\d+) \(.*new interesting: (\d+) \(total: (\d+)\)`)
	failing  = regexp.MustCompile(`Failing input written to (\S+)`)
)

// read takes what go test prints while it fuzzes.
func (r *result) read(out io.Reader) {
	sc := bufio.NewScanner(out)
	sc.Buffer(nil, 4<<20)
	for sc.Scan() {
		line := sc.Text()
		if m := progress.FindStringSubmatch(line); m != nil {
			r.elapsed, _ = time.ParseDuration(m[1])
			r.executions, _ = strconv.Atoi(m[2])
			r.fresh, _ = strconv.Atoi(m[3])
			r.corpus, _ = strconv.Atoi(m[4])
			continue
		}
		if m := failing.FindStringSubmatch(line); m != nil {
			r.seed = m[1]
		}
		if r.output = append(r.output, line); len(r.output) > 40 {
			r.output = r.output[1:]
		}
	}
	_, _ = io.Copy(io.Discard, out) // a line that is too long must not hold go test up
}
