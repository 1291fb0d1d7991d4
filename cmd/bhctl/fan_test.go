package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spf13/cobra"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
)

// Whoever adds a command says what it does with several nodes, and whoever removes one takes it from the table.
func TestEveryCommandHasAScope(t *testing.T) {
	root := (&app{}).root()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	known := map[string]bool{}
	leaves(root, func(c *cobra.Command) {
		name := strings.TrimPrefix(c.CommandPath(), "bhctl ")
		known[name] = true
		if _, ok := scopes[name]; !ok {
			t.Errorf("bhctl %s is not in scopes", name)
		}
	})
	for name := range scopes {
		if !known[name] {
			t.Errorf("there is no bhctl %s", name)
		}
	}
}

// run runs a command line in this process.
func run(t *testing.T, ctx context.Context, args ...string) (out, errs string, err error) {
	t.Helper()
	var o, e bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &o, err: &e, args: args}
	root := a.root()
	root.SetArgs(args)
	err = root.ExecuteContext(ctx)
	return o.String(), e.String(), err
}

// A context has several endpoints: a dead one, and one that accepts and says nothing, cost little; the order counts.
func TestEndpointsAreTriedInTurn(t *testing.T) {
	_, c := startFake(t)
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer mute.Close()
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, dead.Close())
	demo := c.Contexts["demo"]
	demo.Endpoints = []string{demo.Endpoint}
	for name, first := range map[string]string{"dead": dead.Addr().String(), "mute": mute.Addr().String()} {
		demo.Endpoint = first
		path := t.TempDir() + "/c.yaml"
		writeContexts(t, path, c)
		t.Setenv("BHCONFIG", path)
		begin := time.Now()
		out, _, err := run(t, t.Context(), "version")
		if err != nil || !strings.Contains(out, "v1-n1") {
			t.Errorf("first endpoint %s: %v\n%s", name, err, out)
		}
		if d := time.Since(begin); d > 10*time.Second {
			t.Errorf("first endpoint %s: answered after %s", name, d)
		}
	}
	demo.Endpoint = "127.0.0.1:1"
	path := t.TempDir() + "/c.yaml"
	writeContexts(t, path, c)
	t.Setenv("BHCONFIG", path)
	if out, _, err := run(t, t.Context(), "config", "list"); err != nil || !strings.Contains(out, "127.0.0.1:1, "+demo.Endpoints[0]) {
		t.Errorf("%v\n%s", err, out)
	}
	if _, _, err := run(t, t.Context(), "--endpoint", "127.0.0.1:1", "--timeout", "100ms", "version"); err == nil {
		t.Error("--endpoint did not replace the context's endpoints")
	}
}

// Many nodes at once: bounded, over one connection, and each has its own answer.
func TestFanOutToManyNodes(t *testing.T) {
	f, c := startFake(t)
	for i := range 300 {
		f.members = append(f.members, fmt.Sprintf("m%03d", i))
	}
	path := t.TempDir() + "/c.yaml"
	writeContexts(t, path, c)
	t.Setenv("BHCONFIG", path)
	out, e, err := run(t, t.Context(), "--all", "version")
	if code, ok := err.(exitCode); !ok || code != 1 || strings.Count(e, "\n") != 1 || !strings.HasPrefix(e, "n3: ") {
		t.Errorf("%v\n%s", err, e)
	}
	if n := strings.Count(out, "\n"); n != 1+303*4 || !strings.Contains(out, "\nm299  node        v1-m299 linux/amd64\n") {
		t.Errorf("%d lines:\n%.300s", n, out)
	}
	_, _, err = run(t, t.Context(), "--all", "logs", "apid", "-f")
	if err == nil || !strings.Contains(err.Error(), "304 nodes; at most 128 can be followed") {
		t.Error(err)
	}
}

// told is where errors go; it says when one has come.
type told struct {
	text string
	once sync.Once
	came chan struct{}
}

func (w *told) Write(p []byte) (int, error) {
	w.text += string(p)
	w.once.Do(func() { close(w.came) })
	return len(p), nil
}

// Errors come when they are known, not when the slowest node has answered; and no more nodes are asked at once than the bound.
func TestErrorsComeAtOnce(t *testing.T) {
	f, c := startFake(t)
	for i := range 200 { // after n3, which is among the first 64
		f.members = append(f.members, fmt.Sprintf("z%03d", i))
	}
	path := t.TempDir() + "/c.yaml"
	writeContexts(t, path, c)
	t.Setenv("BHCONFIG", path)
	e := &told{came: make(chan struct{})}
	var now, most atomic.Int32
	f.late = func(ctx context.Context, node string) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		select {
		case <-e.came: // the others answer once n3's error has been printed
		case <-ctx.Done():
		}
	}
	var out bytes.Buffer
	args := []string{"--all", "--timeout", "20s", "version"}
	a := &app{in: strings.NewReader(""), out: &out, err: e, args: args}
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	if code, ok := err.(exitCode); !ok || code != 1 || strings.Count(e.text, "\n") != 1 || !strings.HasPrefix(e.text, "n3: ") || strings.Count(out.String(), "v1-") != 203 {
		t.Errorf("%v, %d answers, errors:\n%s", err, strings.Count(out.String(), "v1-"), e.text)
	}
	if m := most.Load(); m > 64 || m < 2 {
		t.Errorf("%d nodes were asked at once, at most 64 are allowed", m)
	}
}

// Lines of several nodes never mix, whatever pieces they come in; for a program they are kept with the node.
func TestLinesStayWhole(t *testing.T) {
	var out bytes.Buffer
	f := &fanout{format: "table", width: 3, out: &out, results: map[string]*result{"a": {}, "bbb": {}}}
	a, b := &lineWriter{f: f, node: "a"}, &lineWriter{f: f, node: "bbb"}
	for _, w := range []struct {
		to   *lineWriter
		text string
	}{{a, "one\ntw"}, {b, "un"}, {a, "o\n\nthree"}, {b, "\n"}} {
		_, err := w.to.Write([]byte(w.text))
		must(t, err)
	}
	a.flush()
	if got, want := out.String(), "a    one\na    two\na    \nbbb  un\na    three\n"; got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	f.format = "json"
	_, err := b.Write([]byte("x\ny\n"))
	must(t, err)
	if got := fmt.Sprint(f.results["bbb"].Output); got != "[x y]" {
		t.Errorf("kept %s", got)
	}
}

func TestMissingNode(t *testing.T) {
	want, err := places("demo", 1, 1)
	must(t, err)
	for text, nodes := range map[string][]*clusterv1.Node{
		"demo-1 has not reported yet":          nil,
		"demo-w1 has not reported yet":         {{Name: "demo-1", State: "ready"}},
		"demo-1 is not ready: kubelet is late": {{Name: "demo-w1", State: "ready"}, {Name: "demo-1", State: "not ready", Detail: "kubelet\nis late"}},
		"":                                     {{Name: "demo-w1", State: "ready"}, {Name: "demo-1", State: "ready"}, {Name: "else", State: "lost"}},
	} {
		if got := missingNode(want, nodes); got != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
}
