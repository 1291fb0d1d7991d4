package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// rollingFlags are those of commands that change all nodes one after the other.
type rollingFlags struct {
	cluster, resume, abort, detach bool
	only                           []string
	drain, node                    time.Duration
	onTimeout                      string
}

func (f *rollingFlags) add(c *cobra.Command) {
	fl := c.Flags()
	fl.BoolVar(&f.cluster, "cluster", false, "all nodes, one after the other; it goes on in the cluster if this command is ended")
	fl.StringSliceVar(&f.only, "only", nil, "with --cluster: these nodes and no others")
	fl.DurationVar(&f.drain, "drain-timeout", 0, "with --cluster: how long a node's pods may take to go (default 5m)")
	fl.StringVar(&f.onTimeout, "on-timeout", "halt", "with --cluster: what to do when they have not gone then, halt or force")
	fl.DurationVar(&f.node, "node-timeout", 0, "with --cluster: how long a node may take until it is ready again (default 15m, and 1h for an upgrade)")
	fl.BoolVar(&f.detach, "detach", false, "with --cluster: do not follow it")
	fl.BoolVar(&f.resume, "resume", false, "with --cluster: go on with the one that has halted")
	fl.BoolVar(&f.abort, "abort", false, "with --cluster: end it before its next node")
	_ = c.RegisterFlagCompletionFunc("on-timeout", cobra.FixedCompletions([]string{"halt", "force"}, cobra.ShellCompDirectiveNoFileComp))
}

// check refuses flags that do not go together.
func (f *rollingFlags) check(cmd *cobra.Command, node string) error {
	if !f.cluster {
		for _, name := range []string{"only", "drain-timeout", "on-timeout", "node-timeout", "detach", "resume", "abort"} {
			if cmd.Flags().Changed(name) {
				return fmt.Errorf("--%s goes with --cluster only", name)
			}
		}
		return nil
	}
	switch {
	case node != "":
		return errors.New("--cluster is about all nodes; leave --node out. --only NAME,… takes some of them")
	case f.resume && f.abort:
		return errors.New("--resume and --abort: choose one")
	case f.drain < 0 || f.node < 0 || f.drain%time.Second != 0 || f.node%time.Second != 0:
		return errors.New("--drain-timeout, --node-timeout: give whole seconds")
	}
	return nil
}

// roll orders a change and follows it. order is asked for only if it is a new one.
func (a *app) roll(ctx context.Context, f *rollingFlags, order func() (*clusterv1.StartRequest, error)) error {
	switch {
	case f.resume:
		return a.resume(ctx, f.detach)
	case f.abort:
		return a.abort(ctx, f.detach)
	}
	q, err := order()
	if err != nil {
		return err
	}
	q.Nodes, q.OnTimeout = f.only, f.onTimeout
	q.DrainTimeoutSeconds, q.NodeTimeoutSeconds = uint64(f.drain/time.Second), uint64(f.node/time.Second)
	var st *clusterv1.RollingStatus
	err = a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterv1.NewRollingClient(conn).Start(ctx, q)
		st = r.GetStatus()
		return err
	})
	if err != nil {
		return err
	}
	return a.follow(ctx, st, f.detach)
}

func (a *app) resume(ctx context.Context, detach bool) error {
	var st *clusterv1.RollingStatus
	err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterv1.NewRollingClient(conn).Resume(ctx, &clusterv1.ResumeRequest{})
		st = r.GetStatus()
		return err
	})
	if err != nil {
		return err
	}
	return a.follow(ctx, st, detach)
}

func (a *app) abort(ctx context.Context, detach bool) error {
	var st *clusterv1.RollingStatus
	err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterv1.NewRollingClient(conn).Abort(ctx, &clusterv1.AbortRequest{})
		st = r.GetStatus()
		return err
	})
	if err != nil {
		return err
	}
	if st.GetState() == "aborted" {
		return a.say("%s is aborted: %s\n", rollingName(st), rollingCount(st))
	}
	if err := a.say("%s ends after the node whose turn it is\n", rollingName(st)); err != nil {
		return err
	}
	if err := a.follow(ctx, st, detach); !errors.Is(err, errAborted) {
		return err
	}
	return nil
}

func (a *app) rollingCmd() *cobra.Command {
	c := &cobra.Command{Use: "rolling", Short: "A change of all nodes, one after the other"}
	watch, detach := false, false
	st := &cobra.Command{Use: "status", Short: "Show the change that runs, or the last one", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		var now *clusterv1.RollingStatus
		err := a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) (err error) {
			now, err = clusterv1.NewRollingClient(conn).GetStatus(ctx, &clusterv1.GetStatusRequest{})
			return err
		})
		switch {
		case err != nil:
			return err
		case watch && now.GetId() != "":
			return a.follow(cmd.Context(), now, false)
		}
		return a.printRolling(now)
	}}
	st.Flags().BoolVarP(&watch, "watch", "w", false, "follow it to its end; Ctrl-C ends the following, not the change")
	resume := &cobra.Command{Use: "resume", Short: "Go on with the change that has halted", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.resume(cmd.Context(), detach) }}
	abort := &cobra.Command{Use: "abort", Short: "End the change before its next node", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.abort(cmd.Context(), detach) }}
	for _, x := range []*cobra.Command{resume, abort} {
		x.Flags().BoolVar(&detach, "detach", false, "do not follow it")
	}
	c.AddCommand(st, resume, abort)
	return c
}

func rollingName(st *clusterv1.RollingStatus) string {
	name := "rolling " + st.GetKind()
	if st.GetVersion() != "" {
		name += " to " + st.GetVersion()
	}
	return name + " " + st.GetId()
}

func rollingCount(st *clusterv1.RollingStatus) string {
	over := 0
	for _, n := range st.GetNodes() {
		if n.GetState() == "done" || n.GetState() == "skipped" {
			over++
		}
	}
	return fmt.Sprintf("%d of %d nodes are done", over, len(st.GetNodes()))
}

func (a *app) printRolling(st *clusterv1.RollingStatus) error {
	if a.format != "table" {
		return a.print(st, nil)
	}
	if st.GetId() == "" {
		return a.say("there was no rolling change yet; bhctl reboot --cluster begins one\n")
	}
	head := fmt.Sprintf("%s, ordered by %s: %s, %s, after %s", rollingName(st), st.GetOrderedBy(), st.GetState(), rollingCount(st), seconds(st.GetElapsedSeconds()))
	if st.GetState() == "running" && st.GetExpectedSeconds() > 0 {
		head += " of about " + seconds(st.GetExpectedSeconds())
	}
	if st.GetDetail() != "" {
		head += "\n" + oneLine(st.GetDetail())
	}
	if err := a.say("%s\n", head); err != nil {
		return err
	}
	return a.print(st, func() *table {
		t := newTable("NODE", "ROLE", "STATE", "TOOK", "DETAIL")
		for _, n := range st.GetNodes() {
			took := ""
			if n.GetEnded() != nil && n.GetDraining() != nil {
				took = round(n.GetEnded().AsTime().Sub(n.GetDraining().AsTime()).Round(time.Second))
			}
			t.add(n.GetName(), n.GetRole(), n.GetState(), took, oneLine(n.GetDetail()))
		}
		return t
	})
}

func seconds(n uint64) string { return (time.Duration(n) * time.Second).String() }

var errAborted = errors.New("it was aborted")

// silence is how long no control plane may say anything before bhctl gives up following: a leader that goes down is replaced much sooner.
const silence = 3 * time.Minute

// follow shows a change until it is over or has halted. Control planes come and go meanwhile; so the stream is opened again as long as the user wants.
func (a *app) follow(ctx context.Context, st *clusterv1.RollingStatus, detach bool) error {
	if detach {
		return a.say("%s goes on in the cluster; bhctl rolling status -w follows it\n", rollingName(st))
	}
	v := &rollingView{a: a, w: a.out, width: a.width(), start: time.Now()}
	if a.format != "table" {
		v.w = io.Discard
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	if v.width > 0 && a.format == "table" {
		wg.Go(func() { v.tick(stop) })
	}
	last, err := v.run(ctx, st)
	close(stop)
	wg.Wait()
	v.end()
	switch {
	case ctx.Err() != nil:
		return a.say("%s goes on in the cluster; bhctl rolling status -w follows it again\n", rollingName(st))
	case err != nil:
		return fmt.Errorf("%w\n  It goes on in the cluster; bhctl rolling status -w follows it again", err)
	case last.GetId() != st.GetId():
		return fmt.Errorf("another one was ordered meanwhile: %s, by %s", rollingName(last), last.GetOrderedBy())
	}
	switch last.GetState() {
	case "halted":
		return fmt.Errorf("halted at %s\n  %s. When it is mended: bhctl rolling resume; to leave it: bhctl rolling abort%s", last.GetDetail(), rollingCount(last), ready(last))
	case "aborted":
		return fmt.Errorf("%w: %s%s", errAborted, rollingCount(last), ready(last))
	}
	return a.say("%s is done: %s, in %s\n", rollingName(last), rollingCount(last), seconds(last.GetElapsedSeconds()))
}

// ready tells that nodes would try a version by themselves.
func ready(st *clusterv1.RollingStatus) string {
	if st.GetKind() != "upgrade" {
		return ""
	}
	var names []string
	for _, n := range st.GetNodes() {
		if n.GetState() == "pending" {
			names = append(names, n.GetName())
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("\n  %s lies ready on %s still, and is tried at a restart; bhctl -n NAME rollback cancels that", st.GetVersion(), strings.Join(names, ", "))
}

// rollingView shows a change: on a terminal one line that is written again each second, elsewhere a line for each step of a node; as JSON each message.
type rollingView struct {
	a     *app
	w     io.Writer
	width int
	start time.Time

	mu   sync.Mutex
	last *clusterv1.RollingStatus // guarded by mu
	at   time.Time                // guarded by mu; when it came
	told map[string]string        // guarded by mu; by node
}

// run follows until the change goes on no more.
func (v *rollingView) run(ctx context.Context, st *clusterv1.RollingStatus) (*clusterv1.RollingStatus, error) {
	heard := time.Now()
	if err := v.show(st); err != nil {
		return st, err
	}
	for {
		var over *clusterv1.RollingStatus
		err := v.a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			s, err := clusterv1.NewRollingClient(conn).WatchStatus(ctx, &clusterv1.WatchStatusRequest{})
			if err != nil {
				return err
			}
			for {
				m, err := s.Recv()
				if err != nil {
					return err
				}
				heard = time.Now()
				if m.GetId() != st.GetId() || !slices.Contains([]string{"running", "aborting"}, m.GetState()) {
					over = m
					return nil
				}
				if err := v.show(m); err != nil {
					return err
				}
			}
		})
		switch {
		case over != nil:
			return over, v.show(over)
		case ctx.Err() != nil:
			return st, ctx.Err()
		case time.Since(heard) > silence, err != nil && slices.Contains([]errs.Kind{errs.Denied, errs.Unauthenticated, errs.NotFound}, errs.Of(err)):
			return st, err
		}
		if err := pause(ctx, time.Second); err != nil {
			return st, err
		}
	}
}

func (v *rollingView) show(st *clusterv1.RollingStatus) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last, v.at = st, time.Now()
	if v.a.format != "table" {
		return v.a.printMessage(st)
	}
	if v.told == nil {
		v.told = map[string]string{}
	}
	for i, n := range st.GetNodes() {
		text := n.GetState() + " " + n.GetDetail()
		if text == v.told[n.GetName()] || n.GetState() == "pending" && n.GetDetail() == "" {
			continue
		}
		v.told[n.GetName()] = text
		if v.width > 0 && n.GetState() != "done" && n.GetState() != "skipped" {
			continue // the line that is written again has it
		}
		line := fmt.Sprintf("%5s  %s (%d of %d): %s", seconds(st.GetElapsedSeconds()), n.GetName(), i+1, len(st.GetNodes()), n.GetState())
		if n.GetDetail() != "" {
			line += ", " + oneLine(n.GetDetail())
		}
		if v.width > 0 {
			line = "\r\x1b[K" + line
		}
		if _, err := fmt.Fprintln(v.w, line); err != nil {
			return err
		}
	}
	return nil
}

// tick writes the line again.
func (v *rollingView) tick(stop <-chan struct{}) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		v.mu.Lock()
		if v.last != nil {
			fmt.Fprintf(v.w, "\r\x1b[K%s", cut(rollingLine(v.last, time.Since(v.at)), v.width-1))
		}
		v.mu.Unlock()
		select {
		case <-stop:
			return
		case <-t.C:
		}
	}
}

// end takes the line away.
func (v *rollingView) end() {
	if v.width > 0 && v.a.format == "table" {
		fmt.Fprint(v.w, "\r\x1b[K")
	}
}

// rollingLine is the step, the time that all took, and will take.
func rollingLine(st *clusterv1.RollingStatus, since time.Duration) string {
	elapsed := time.Duration(st.GetElapsedSeconds())*time.Second + since.Round(time.Second)
	line := fmt.Sprintf("%5s", elapsed)
	if st.GetExpectedSeconds() > 0 {
		line += " of about " + seconds(max(st.GetExpectedSeconds(), uint64(elapsed/time.Second)))
	}
	for i, n := range st.GetNodes() {
		switch n.GetState() {
		case "done", "skipped":
			continue
		}
		line += fmt.Sprintf("  %s (%d of %d): %s", n.GetName(), i+1, len(st.GetNodes()), n.GetState())
		if n.GetDetail() != "" {
			line += ", " + oneLine(n.GetDetail())
		}
		break
	}
	return strings.TrimRight(line, " ")
}
