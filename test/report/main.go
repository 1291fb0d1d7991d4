// Report reads "go test -json" on standard input and prints it for people: one line a package, the output of what failed, what was
// skipped and why. It adds its counts to the file named by REPORT_SUM, so that several runs make one sum, and exits 1 if anything failed.
//
//	go test -json ./... | go run ./test/report
//	go run ./test/report -sum        prints what failed once more, and "N passed, N failed, N skipped", of that file
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// event is one line of "go doc test2json".
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

type counts struct {
	Passed, Failed, Skipped int

	Failures []string // the end of what each that failed said: who reads a long run's end should not have to look for its middle
}

// failed counts a test and prints all of what it said.
func (c *counts) failed(how, name string, out []string) {
	c.Failed++
	text := how + " " + name + "\n" + strings.Join(out, "")
	fmt.Print(text)
	const most = 2000
	if len(text) > most {
		text = how + " " + name + "\n[…]" + text[len(text)-most:]
	}
	c.Failures = append(c.Failures, text)
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run() error {
	file := os.Getenv("REPORT_SUM")
	if len(os.Args) > 1 && os.Args[1] == "-sum" {
		c, err := load(file)
		if err != nil {
			return err
		}
		fmt.Print(strings.Join(c.Failures, ""))
		fmt.Printf("%d passed, %d failed, %d skipped\n", c.Passed, c.Failed, c.Skipped)
		if c.Failed > 0 || c.Passed == 0 {
			os.Exit(1)
		}
		return nil
	}
	c, err := read()
	if err != nil {
		return err
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", c.Passed, c.Failed, c.Skipped)
	if file != "" {
		sum, err := load(file)
		if err != nil {
			return err
		}
		sum.Passed, sum.Failed, sum.Skipped = sum.Passed+c.Passed, sum.Failed+c.Failed, sum.Skipped+c.Skipped
		sum.Failures = append(sum.Failures, c.Failures...)
		data, err := json.Marshal(sum)
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			return err
		}
	}
	if c.Failed > 0 {
		os.Exit(1)
	}
	return nil
}

// load reads a sum; no file is an empty one.
func load(file string) (c counts, err error) {
	data, err := os.ReadFile(file)
	if os.IsNotExist(err) || file == "" {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(data, &c)
}

func read() (c counts, err error) {
	output := map[string][]string{} // by package and test
	sc := bufio.NewScanner(os.Stdin)
	sc.Buffer(nil, 4<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Println(sc.Text()) // not test2json's: a build error
			continue
		}
		key := e.Package + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			output[key] = append(output[key], e.Output)
			if os.Getenv("REPORT_LIVE") != "" && strings.Contains(e.Output, ": » ") { // a step that a long test reports
				fmt.Print(e.Output)
			}
		case "build-fail":
			c.failed("NOT BUILT", e.Package, output[key])
		case "pass", "skip", "fail":
			finish(&c, e, output[key])
			delete(output, key)
			if e.Test == "" {
				unfinished(&c, e.Package, output)
			}
		}
	}
	return c, sc.Err()
}

// unfinished counts and prints the tests that had begun and not ended when their package did: it was killed, or took too long.
func unfinished(c *counts, pkg string, output map[string][]string) {
	for _, key := range slices.Sorted(maps.Keys(output)) {
		if test, ok := strings.CutPrefix(key, pkg+" "); ok && test != "" {
			c.failed("NOT ENDED", key, output[key])
			delete(output, key)
		}
	}
}

// finish counts a test, or prints a package's line. A test with subtests counts as one more.
func finish(c *counts, e event, out []string) {
	took := time.Duration(e.Elapsed * float64(time.Second)).Round(10 * time.Millisecond)
	if e.Action == "pass" && os.Getenv("REPORT_LIVE") != "" && took > 10*time.Second && e.Test != "" { // where the time goes
		fmt.Printf("pass %s (%s)\n", e.Test, took)
	}
	if e.Test == "" {
		if e.Action != "skip" { // no test files
			fmt.Printf("%-4s %s (%s)\n", e.Action, e.Package, took)
		}
		if e.Action == "fail" {
			if len(out) == 0 || strings.Contains(strings.Join(out, ""), "panic") {
				c.failed("FAILED", e.Package, out)
			} else {
				fmt.Print(strings.Join(out, ""))
			}
		}
		return
	}
	switch e.Action {
	case "pass":
		c.Passed++
	case "skip":
		c.Skipped++
		fmt.Printf("SKIPPED %s %s\n%s", e.Package, e.Test, strings.Join(out, ""))
	case "fail":
		c.failed("FAILED", e.Package+" "+e.Test, out)
	}
}
