package main

import (
	"context"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// versionsTime bounds the question about versions: updated may be what is not well.
const versionsTime = 5 * time.Second

func (a *app) whyCmd() *cobra.Command {
	var lines int
	c := &cobra.Command{Use: "why", Short: "Why the node is not well, and why the last version was left", Args: cobra.NoArgs,
		Long: "Why the node is not well: from what fails, step by step, to what failed first, and the command that helps. Then what a version on trial still\n" +
			"has to prove, and why the last one was left, with its last lines. With -o json or yaml it is machine.v1.WhyResponse, as GET /v1/why has it.\nExits 1 if the node is not well now.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				w, err := askWhy(ctx, conn)
				if err != nil {
					return err
				}
				if a.format != "table" {
					err = a.print(w, nil)
				} else {
					short, cancel := context.WithTimeout(ctx, versionsTime)
					st, verr := updatev1.NewUpdateClient(conn).GetStatus(short, &updatev1.GetStatusRequest{})
					cancel()
					_, err = fmt.Fprint(a.out, whyText(w, a.node)+versionsText(st, verr, lines))
				}
				if err == nil && !w.GetHealthy() {
					return exitCode(1)
				}
				return err
			})
		}}
	c.Flags().IntVar(&lines, "lines", 20, "how many of the last lines of a version that was left")
	return c
}

// askWhy asks a node of an older version for its health: each check that fails is a cause of its own then.
func askWhy(ctx context.Context, conn *grpc.ClientConn) (*machinev1.WhyResponse, error) {
	m := machinev1.NewMachineClient(conn)
	w, err := m.Why(ctx, &machinev1.WhyRequest{})
	if status.Code(err) != codes.Unimplemented {
		return w, err
	}
	h, err := m.GetHealth(ctx, &machinev1.GetHealthRequest{})
	w = &machinev1.WhyResponse{Healthy: h.GetHealthy()}
	for _, c := range h.GetChecks() {
		if !c.GetOk() {
			w.Causes = append(w.Causes, &machinev1.Cause{Steps: []*machinev1.WhyStep{{Subject: c.GetName(), Text: c.GetDetail()}}})
		}
	}
	return w, err
}

// whyWidth is what fits everywhere, also where the output is no terminal.
const whyWidth = 80

// whyText is why the node is not well. node is what --node named. It is pure.
func whyText(w *machinev1.WhyResponse, node string) string {
	var b strings.Builder
	switch n := len(w.GetCauses()); {
	case n == 0:
		b.WriteString("the node is well\n")
	case n == 1:
		b.WriteString("the node is not well, for one reason:\n")
	default:
		fmt.Fprintf(&b, "the node is not well, for %d reasons:\n", n)
	}
	for i, c := range w.GetCauses() {
		fmt.Fprintf(&b, "\n%d. ", i+1)
		for j, s := range c.GetSteps() {
			if j > 0 {
				b.WriteString("   because ")
			}
			b.WriteString(s.GetSubject() + sinceText(s, w.GetTime().AsTime()) + "\n")
			text := oneLine(s.GetText())
			if j < len(c.GetSteps())-1 { // what matters most is below
				text = cut(text, 2*(whyWidth-5))
			}
			wrap(&b, "     ", "     ", text)
			for _, l := range s.GetLastWords() {
				wrap(&b, "     | ", "     | ", l)
			}
		}
		if c.GetCommand() != "" {
			b.WriteString("   try:  " + aimed(c.GetCommand(), node) + "\n")
		}
		if len(c.GetAlso()) > 0 {
			wrap(&b, "   also: ", "         ", strings.Join(c.GetAlso(), ", "))
		}
	}
	first := true
	for _, s := range w.GetRemarks() {
		if !strings.HasSuffix(s.GetSubject(), ".up") { // versions, of which more is said below
			continue
		}
		if first {
			b.WriteString("\nof late:\n")
			first = false
		}
		b.WriteString("   " + s.GetSubject() + sinceText(s, w.GetTime().AsTime()) + "\n")
		wrap(&b, "     ", "     ", oneLine(s.GetText()))
	}
	return b.String()
}

// sinceText is when a step began, in the time of who reads it, and how long that was ago by the node's own clock.
func sinceText(s *machinev1.WhyStep, now time.Time) string {
	if s.GetSince() == nil {
		return ""
	}
	at := s.GetSince().AsTime()
	layout := time.TimeOnly
	if now.Sub(at) >= 12*time.Hour {
		layout = time.DateTime
	}
	text := fmt.Sprintf(", since %s (%s)", at.Local().Format(layout), briefly(now.Sub(at)))
	if s.GetOrEarlier() {
		text += " or before"
	}
	return text
}

// briefly is a duration with one unit: "40s", "12m", "5h", "3d".
func briefly(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// aimed is a command for the node that was asked.
func aimed(command, node string) string {
	if rest, ok := strings.CutPrefix(command, "bhctl "); ok && node != "" {
		return "bhctl -n " + node + " " + rest
	}
	return command
}

// wrap writes a text in lines of at most whyWidth characters; a word that is longer stays whole, so that it can be copied.
func wrap(b *strings.Builder, first, next, text string) {
	line := first
	empty := true
	for _, word := range strings.Fields(text) {
		if !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > whyWidth {
			b.WriteString(line + "\n")
			line, empty = next, true
		}
		if !empty {
			line += " "
		}
		line, empty = line+word, false
	}
	if !empty {
		b.WriteString(line + "\n")
	}
}

// versionsText is what a version on trial has to prove, and why the last one was left. It is pure.
func versionsText(st *updatev1.Status, err error, lines int) string {
	var b strings.Builder
	if err != nil {
		fmt.Fprintf(&b, "\nnothing is known of versions: %s\n", oneLine(errs.Text(err)))
	}
	if len(st.GetProofs()) > 0 {
		fmt.Fprintf(&b, "\n%s is on trial. To be found good, it has to prove:\n", runningVersion(st))
		for _, p := range st.GetProofs() {
			mark, detail := "proved", ""
			if !p.GetOk() {
				mark, detail = "MISSING", oneLine(p.GetDetail())
			}
			fmt.Fprintf(&b, "  %-8s  %-8s  %s\n", p.GetName(), mark, detail)
		}
		fmt.Fprintf(&b, "If it has not at %s, the machine restarts.\n", st.GetDeadline().AsTime().Local().Format(time.TimeOnly))
	}
	if f := st.GetFailure(); f != nil {
		fmt.Fprintf(&b, "\n%s was left after %d tries, seen at %s: %s\n", f.GetVersion(), f.GetTries(), f.GetTime().AsTime().Local().Format(time.DateTime), f.GetReason())
		last := f.GetLines()
		if n := len(last) - lines; n > 0 {
			last = last[n:]
		}
		for _, l := range last {
			fmt.Fprintf(&b, "  | %s\n", l)
		}
	}
	if st.GetError() != "" && len(st.GetSlots()) == 0 {
		fmt.Fprintf(&b, "\nno other version can be installed: %s\n", oneLine(st.GetError()))
	}
	return b.String()
}
