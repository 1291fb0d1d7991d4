package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/internal/auditchain"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// auditFlags are what a user asks of an audit log.
type auditFlags struct {
	since, user, method, file string
	changed, follow, verify   bool
	anchors                   []string
}

func (a *app) auditCmd() *cobra.Command {
	var f auditFlags
	c := &cobra.Command{Use: "audit", Short: "Print a node's audit log, and check that nobody changed it", Args: cobra.NoArgs,
		Long: `Print a node's audit log: every call of a method that a reader may not call, who made it and what became of it. -o json prints the records as they are stored, one
a line: such a file can be checked later, also without the node.

Each record has the hash of the one before. --verify checks that chain, here and not on the node, and compares it with the anchors: the ends of the log that the cluster
remembers since the node told them. It says where the log breaks, and exits 1: changed, removed, inserted, reordered, cut (the end is missing), rewritten (sound by itself, but not
what was anchored). What came after the newest anchor could be cut without a trace.`,
		Example: "  bhctl audit --since 1h --changed\n  bhctl -n w1 audit --user ann --method Config/Apply\n  bhctl -n w1 audit --verify\n" +
			"  bhctl audit -o json > audit.jsonl && bhctl audit --verify --file audit.jsonl --anchor 5f0c…:812:9a44…",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(a); err != nil {
				return err
			}
			switch {
			case f.file != "":
				return a.verifyFile(f)
			case f.verify:
				return a.verifyNode(cmd.Context(), f)
			}
			return a.streamAudit(cmd.Context(), f)
		}}
	fl := c.Flags()
	fl.StringVar(&f.since, "since", "", "only from then on: a duration before now (90m, 24h), or a time (2026-11-26T15:04:05Z)")
	fl.StringVar(&f.user, "user", "", "only calls of this caller")
	fl.StringVar(&f.method, "method", "", "only calls of methods with this in their name: Apply, machine.v1")
	fl.BoolVar(&f.changed, "changed", false, "only calls that changed something")
	fl.BoolVarP(&f.follow, "follow", "f", false, "keep printing what comes, until Ctrl-C")
	fl.BoolVar(&f.verify, "verify", false, "check the chain instead of printing it")
	fl.StringVar(&f.file, "file", "", "with --verify: check this file of records (\"-\": standard input) and ask nobody")
	fl.StringArrayVar(&f.anchors, "anchor", nil, "with --verify: an end of the log that you noted, CHAIN:RECORD:HASH; may be given more than once")
	return c
}

// check refuses flags that do not go together.
func (f auditFlags) check(a *app) error {
	filtered := f.since != "" || f.user != "" || f.method != "" || f.changed
	switch {
	case f.file != "" && !f.verify:
		return errors.New("--file: a file is only checked; add --verify")
	case len(f.anchors) > 0 && !f.verify:
		return errors.New("--anchor: it is for checking; add --verify")
	case f.verify && f.follow:
		return errors.New("--follow: a log is checked as it is now; leave it out, or leave out --verify")
	case f.verify && filtered:
		return errors.New("--verify checks the whole log; leave out --since, --user, --method and --changed")
	case f.file != "" && (a.node != "" || a.fan != nil):
		return errors.New("--file asks no node; leave out --node and --all")
	}
	return nil
}

// sinceTime reads a duration before now, or a time; nil for "".
func sinceTime(text string, now time.Time) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return timestamppb.New(now.Add(-d)), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return nil, fmt.Errorf("--since: %q is neither a duration (90m, 24h) nor a time (2026-11-26T15:04:05Z)", text)
	}
	return timestamppb.New(t), nil
}

func (a *app) streamAudit(ctx context.Context, f auditFlags) error {
	since, err := sinceTime(f.since, time.Now())
	if err != nil {
		return err
	}
	return a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		s, err := machinev1.NewMachineClient(conn).GetAudit(ctx, &machinev1.GetAuditRequest{Since: since, User: f.user, Method: f.method, Changed: f.changed, Follow: f.follow})
		if err != nil {
			return err
		}
		return receive(s, a.printAudit)
	})
}

// printAudit prints one record: as it is stored, so that it can be checked, or as a line for a person.
func (a *app) printAudit(r *machinev1.AuditRecord) error {
	switch a.format {
	case "json":
		return a.printRaw([]byte(r.Line))
	case "yaml":
		return a.printMessage(r)
	}
	_, err := fmt.Fprintf(a.out, "%6d  %s  %s\n", r.Sequence, r.Time.AsTime().Local().Format(time.DateTime), auditText(r))
	return err
}

// printRaw prints JSON as it is, or as one of several nodes' answers.
func (a *app) printRaw(data []byte) error {
	if a.fan != nil {
		return a.fan.event(a.node, "event", data)
	}
	_, err := fmt.Fprintf(a.out, "%s\n", data)
	return err
}

// auditText is what a record says, without number and time.
func auditText(r *machinev1.AuditRecord) string {
	if r.Method == "" {
		return r.Kind + ": " + r.Note
	}
	who := r.Who
	if who == "" {
		who = "(nobody)"
	}
	text := fmt.Sprintf("%s (%s) from %s: %s: %s", who, strings.Join(r.Roles, ","), r.Peer, strings.TrimPrefix(r.Method, "/"), r.Code)
	if r.Target != "" {
		text += ", passed on to " + r.Target
	}
	if r.Via != "" {
		text += ", through " + r.Via
	}
	return text
}

// verifyNode checks the log of a node against what the cluster remembers of it.
func (a *app) verifyNode(ctx context.Context, f auditFlags) error {
	own, err := parseAnchors(f.anchors)
	if err != nil {
		return err
	}
	var all [][]byte
	name := a.node
	err = a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		s, err := machinev1.NewMachineClient(conn).GetAudit(ctx, &machinev1.GetAuditRequest{})
		if err != nil {
			return err
		}
		return receive(s, func(r *machinev1.AuditRecord) error {
			if r.Node != "" && a.node == "" {
				name = r.Node
			}
			all = append(all, []byte(r.Line))
			return nil
		})
	})
	if err != nil {
		return err
	}
	anchors, why := a.anchorsOf(ctx, name)
	v := &auditchain.Verifier{Anchors: append(anchors, own...)}
	for _, line := range all {
		v.Add(line)
	}
	return a.verdict(v.Report(true), len(v.Anchors) > 0, why)
}

// anchorsOf asks the cluster, at the node that is connected with and not at the one whose log it is: that one could say what fits.
func (a *app) anchorsOf(ctx context.Context, name string) (all []auditchain.Anchor, why string) {
	if name == "" {
		return nil, "the log has no call that names the node; name it with --node"
	}
	asker := *a
	asker.node = ""
	err := asker.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r, err := clusterv1.NewRegistryClient(conn).ListAuditAnchors(client.OnNode(ctx, ""), &clusterv1.ListAuditAnchorsRequest{Name: name})
		for _, x := range r.GetAnchors() {
			h := x.GetHead()
			all = append(all, auditchain.Anchor{Head: auditchain.Head{Chain: h.GetChain(), Sequence: h.GetSequence(), Hash: h.GetHash()}, At: x.GetAt().AsTime()})
		}
		return err
	})
	if err != nil {
		why = errs.Text(err)
	}
	return all, why
}

func parseAnchors(texts []string) (out []auditchain.Anchor, err error) {
	for _, t := range texts {
		part := strings.Split(t, ":")
		if len(part) != 3 || part[0] == "" || len(part[2]) != 64 {
			return nil, fmt.Errorf("--anchor: %q is not CHAIN:RECORD:HASH, as bhctl audit --verify prints it", t)
		}
		n, err := strconv.ParseUint(part[1], 10, 64)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("--anchor: %q is no number of a record, which begin with 1", part[1])
		}
		out = append(out, auditchain.Anchor{Head: auditchain.Head{Chain: part[0], Sequence: n, Hash: part[2]}})
	}
	return out, nil
}

// verifyFile checks records that were stored or shipped.
func (a *app) verifyFile(f auditFlags) error {
	anchors, err := parseAnchors(f.anchors)
	if err != nil {
		return err
	}
	in := a.in
	if f.file != "-" {
		file, err := os.Open(f.file)
		if err != nil {
			return err
		}
		defer file.Close()
		in = file
	}
	v := &auditchain.Verifier{Anchors: anchors}
	if err := readLines(in, v); err != nil {
		return fmt.Errorf("--file %s: %w", f.file, err)
	}
	return a.verdict(v.Report(false), len(anchors) > 0, "a file alone cannot tell; give one with --anchor")
}

func readLines(in io.Reader, v *auditchain.Verifier) error {
	b := bufio.NewReader(in)
	for {
		line, err := b.ReadBytes('\n')
		if err == nil {
			v.Add(line[:len(line)-1])
			continue
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		if len(line) == 0 {
			return nil
		}
		if _, perr := auditchain.Parse(line); perr == nil { // whole, but for the newline: an editor took it
			v.Add(line)
		} else {
			v.Torn(line)
		}
		return nil
	}
}

// verdict prints what was found, and makes it the exit code. anchored says that there was an anchor to compare with, and why says why not.
func (a *app) verdict(r auditchain.Report, anchored bool, why string) error {
	if a.format != "table" {
		problems := []map[string]any{}
		for _, p := range r.Problems {
			problems = append(problems, map[string]any{"line": p.Line, "sequence": p.Sequence, "fault": p.Fault, "text": p.Text})
		}
		earlier := []map[string]any{}
		for _, e := range r.Earlier {
			earlier = append(earlier, map[string]any{"chain": e.Chain, "last": e.Sequence, "at": e.At})
		}
		out := map[string]any{"ok": len(r.Problems) == 0, "records": r.Records, "first": r.First, "last": r.Last, "chain": r.Head.Chain, "hash": r.Head.Hash, "anchored": r.Anchored.Sequence, "earlier": earlier, "problems": problems}
		data, err := compactJSON(out)
		if err == nil {
			err = a.printRaw(data)
		}
		return errors.Join(err, failed(r))
	}
	for _, p := range r.Problems {
		fmt.Fprintln(a.out, p)
	}
	switch {
	case r.Records == 0:
		fmt.Fprintln(a.out, "there are no records")
	case len(r.Problems) == 0:
		fmt.Fprintf(a.out, "sound: %d records, %d to %d; the last is %s:%d:%s\n", r.Records, r.First, r.Last, r.Head.Chain, r.Last, r.Head.Hash)
	default:
		fmt.Fprintf(a.out, "NOT SOUND: %d records that could be read, %d to %d\n", r.Records, r.First, r.Last)
	}
	for _, e := range r.Earlier {
		fmt.Fprintf(a.out, "note: the node had another log, %s, up to %s, and began anew: a reset does that, and so does who deletes a log\n", e.Chain, e)
	}
	switch {
	case !anchored:
		fmt.Fprintf(a.out, "no anchor: whether the end was cut, or all of it rewritten, is not known: %s\n", why)
	case r.Anchored.Sequence > 0:
		fmt.Fprintf(a.out, "agrees with the anchor of %s; what is after it could have been cut\n", r.Anchored)
	}
	return failed(r)
}

func failed(r auditchain.Report) error {
	if len(r.Problems) > 0 {
		return exitCode(1)
	}
	return nil
}

// left is how long a certificate is good from now on. It is rough, so that a list that is watched is not another one each minute.
func left(until, now time.Time) string {
	switch d := until.Sub(now); {
	case d <= 0:
		return "EXPIRED"
	case d < time.Hour:
		return "<1h"
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}
