package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
)

func (a *app) whyCmd() *cobra.Command {
	var lines int
	c := &cobra.Command{Use: "why", Short: "Why the node is not well, and why the last version was left", Args: cobra.NoArgs,
		Long: "Every check that does not pass, what a version on trial still has to prove, and why the last one was left, with its last lines.\nExits 1 if the node is not well now.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				h, err := machinev1.NewMachineClient(conn).GetHealth(ctx, &machinev1.GetHealthRequest{})
				if err != nil {
					return err
				}
				st, err := updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
				if err != nil {
					return err
				}
				if _, err := fmt.Fprint(a.out, whyText(h, st, lines)); err != nil {
					return err
				}
				if !h.GetHealthy() {
					return exitCode(1)
				}
				return nil
			})
		}}
	c.Flags().IntVar(&lines, "lines", 20, "how many of the last lines of a version that was left")
	return c
}

// whyText is what there is to say. It is pure.
func whyText(h *machinev1.GetHealthResponse, st *updatev1.Status, lines int) string {
	var b strings.Builder
	for _, c := range h.GetChecks() {
		if !c.GetOk() {
			fmt.Fprintf(&b, "%s: %s\n", c.GetName(), oneLine(c.GetDetail()))
		}
	}
	if b.Len() == 0 {
		b.WriteString("the node is well\n")
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
