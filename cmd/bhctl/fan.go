package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// fanLimit is how many nodes are asked at the same time. Those that are followed must be all at the same time: at most client.MaxEach.
const fanLimit = 64

// A fanout is one command that asks several nodes. The command as the user typed it is run once for each node, with an app of its own, over one connection; what it
// prints comes here.
type fanout struct {
	format string
	live   bool // it goes on until Ctrl-C, so what comes is printed as it comes
	width  int  // of the longest name

	mu       sync.Mutex
	out, err io.Writer          // guarded by mu
	results  map[string]*result // guarded by mu
	failed   bool               // guarded by mu
}

// result is what one node answered.
type result struct {
	Node   string          `json:"node"`
	Result json.RawMessage `json:"result,omitempty"`
	Output []string        `json:"output,omitempty"` // of commands that print text
	Error  string          `json:"error,omitempty"`
	Code   string          `json:"code,omitempty"` // of gRPC, as REST names it: "NotFound"
	tab    *table
}

// onNodes runs a command for the nodes that --node and --all name. Commands say in scopes what they can do with several.
func (a *app) onNodes(cmd *cobra.Command, args []string, run func(*cobra.Command, []string) error) error {
	if a.fan != nil || len(a.nodes) == 0 && !a.allNodes {
		return run(cmd, args)
	}
	what := strings.TrimPrefix(cmd.CommandPath(), "bhctl ")
	s := scopes[what]
	if s.kind == nowhere {
		return fmt.Errorf("--node and --all: bhctl %s %s", what, s.why)
	}
	if a.allNodes && len(a.nodes) > 0 {
		return errors.New("--node and --all: give one of the two")
	}
	for _, n := range a.nodes {
		if n == "" || strings.ContainsFunc(n, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return fmt.Errorf("--node: %q is no node's name; bhctl get nodes lists them", n)
		}
	}
	if s.kind == single && (a.allNodes || len(a.nodes) > 1) {
		return fmt.Errorf("bhctl %s is for one node at a time%s: name one with --node", what, s.why)
	}
	if !a.allNodes && len(a.nodes) == 1 {
		a.node = a.nodes[0]
		return run(cmd, args)
	}
	return a.fanOut(cmd, s.kind)
}

func (a *app) fanOut(cmd *cobra.Command, kind scopeKind) error {
	ctx := cmd.Context()
	names := slices.Clone(a.nodes)
	if a.allNodes {
		var err error
		if names, err = a.memberNames(ctx); err != nil {
			return fmt.Errorf("--all: which nodes there are: %w", err)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	f := &fanout{format: a.format, live: isSet(cmd, "follow") || isSet(cmd, "watch"), out: a.out, err: a.err, results: map[string]*result{}}
	limit := fanLimit
	if f.live {
		if limit = client.MaxEach; len(names) > limit {
			return fmt.Errorf("%d nodes; at most %d can be followed at the same time: name some with --node", len(names), limit)
		}
	}
	conn, err := a.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, n := range names {
		f.width = max(f.width, len(n))
		f.results[n] = &result{Node: n}
	}
	for r := range client.Each(ctx, names, limit, func(ctx context.Context, node string) (struct{}, error) {
		return struct{}{}, a.runAt(ctx, conn, f, node)
	}) {
		if r.Err != nil {
			f.fail(r.Node, r.Err)
		}
	}
	if !f.live && kind != lines {
		if err := a.printResults(f, names); err != nil {
			return err
		}
	}
	if f.failed {
		return exitCode(1)
	}
	return nil
}

// runAt runs the same command line for one node.
func (a *app) runAt(ctx context.Context, conn *grpc.ClientConn, f *fanout, node string) error {
	out := &lineWriter{f: f, node: node}
	sub := &app{in: strings.NewReader(""), out: out, err: &lineWriter{f: f, node: node, toErr: true}, args: a.args, fan: f, node: node, shared: conn}
	root := sub.root()
	root.SetArgs(a.args)
	err := root.ExecuteContext(ctx)
	out.flush()
	return err
}

func isSet(cmd *cobra.Command, flag string) bool {
	f := cmd.Flags().Lookup(flag)
	return f != nil && f.Value.String() == "true"
}

// memberNames asks the cluster for its nodes: those that have joined, also those that never reported.
func (a *app) memberNames(ctx context.Context) (names []string, err error) {
	err = a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := trustv1.NewMembershipClient(conn).ListMembers(ctx, &trustv1.ListMembersRequest{})
		for _, m := range r.GetMembers() {
			names = append(names, m.GetName())
		}
		return err
	})
	if err == nil && len(names) == 0 {
		err = errors.New("the cluster has no members yet (bhctl bootstrap)")
	}
	return names, err
}

// completeNodes offers names for the last of those that --node has.
func (a *app) completeNodes(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
	a.timeout, a.nodes = 2*time.Second, nil
	before := typed[:strings.LastIndexByte(typed, ',')+1]
	names, _ := a.memberNames(cmd.Context()) // no answer, no offer
	for i, n := range names {
		names[i] = before + n
	}
	return names, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// fail keeps a node's error and shows it at once.
func (f *fanout) fail(node string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed = true
	var code exitCode
	if errors.As(err, &code) {
		return // what there was to say has been said
	}
	r := f.results[node]
	r.Error, r.Code = errs.Text(err), status.Code(err).String()
	fmt.Fprintf(f.err, "%s: %s\n", node, r.Error)
}

// print takes a node's answer; see app.print.
func (f *fanout) print(node string, v any, tab func() *table) error {
	if f.format == "table" && f.live {
		var b bytes.Buffer
		if err := tab().write(&b, 0); err != nil {
			return err
		}
		f.write(node, false, strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n"))
		return nil
	}
	var raw []byte
	var t *table
	if f.format == "table" {
		t = tab()
	} else {
		var err error
		if raw, err = compactJSON(v); err != nil {
			return err
		}
	}
	if f.live {
		return f.event(node, "result", raw)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results[node].Result, f.results[node].tab = raw, t
	return nil
}

// event prints one line of JSON: what a node sent under a key, and which node.
func (f *fanout) event(node, key string, raw []byte) error {
	line, err := json.Marshal(map[string]any{"node": node, key: json.RawMessage(raw)})
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err = fmt.Fprintf(f.out, "%s\n", line)
	return err
}

// write prints whole lines of a node, so that those of two nodes never mix. For a program they are kept with the node's result.
func (f *fanout) write(node string, toErr bool, text []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := f.out
	switch {
	case toErr:
		w = f.err
	case f.format != "table":
		f.results[node].Output = append(f.results[node].Output, text...)
		return
	}
	for _, l := range text {
		fmt.Fprintf(w, "%-*s  %s\n", f.width, node, l)
	}
}

// lineWriter is what one node's command writes to.
type lineWriter struct {
	f     *fanout
	node  string
	toErr bool
	rest  []byte // of a line that is not complete; at most what one command prints without a newline
}

func (w *lineWriter) Write(b []byte) (int, error) {
	w.rest = append(w.rest, b...)
	if i := bytes.LastIndexByte(w.rest, '\n'); i >= 0 {
		w.f.write(w.node, w.toErr, strings.Split(string(w.rest[:i]), "\n"))
		w.rest = append([]byte(nil), w.rest[i+1:]...)
	}
	return len(b), nil
}

func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		w.f.write(w.node, w.toErr, []string{string(w.rest)})
		w.rest = nil
	}
}

// printResults prints all answers together, in the order of the names: one table with the node in the first column, or one list.
func (a *app) printResults(f *fanout, names []string) error {
	if a.format != "table" {
		all := []*result{}
		for _, n := range names {
			all = append(all, f.results[n])
		}
		data, err := json.MarshalIndent(all, "", "  ")
		if err == nil && a.format == "yaml" {
			data, err = yaml.JSONToYAML(data)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.out, strings.TrimSuffix(string(data), "\n"))
		return err
	}
	var t *table
	for _, n := range names {
		one := f.results[n].tab
		if one == nil {
			continue
		}
		if t == nil {
			t = newTable(append([]string{"NODE"}, one.head...)...)
		}
		for _, row := range one.rows {
			t.add(append([]string{n}, row...)...)
		}
	}
	if t == nil {
		return nil
	}
	return t.write(a.out, a.width())
}

// printMessage prints one message of a stream as a line of JSON.
func (a *app) printMessage(m proto.Message) error {
	data, err := compactJSON(m)
	if err != nil {
		return err
	}
	if a.fan != nil {
		return a.fan.event(a.node, "event", data)
	}
	_, err = fmt.Fprintf(a.out, "%s\n", data)
	return err
}
