package main

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	clusterv1 "github.com/bulkhead-os/bulkhead/api/cluster/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/version"
)

func (a *app) versionCmd() *cobra.Command {
	var clientOnly bool
	c := &cobra.Command{Use: "version", Short: "Versions of this program and of the node", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		if clientOnly {
			_, err := fmt.Fprintln(a.out, version.Version)
			return err
		}
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			v, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
			if err != nil {
				return err
			}
			return a.print(v, func() *table {
				t := newTable("WHAT", "VERSION")
				t.add("bhctl", version.Version)
				t.add("node", v.Version+" "+v.Platform)
				t.add("kernel", v.Kernel)
				t.add("kubernetes", v.Kubernetes)
				return t
			})
		})
	}}
	c.Flags().BoolVar(&clientOnly, "client", false, "only this program's, without asking a node")
	return c
}

func (a *app) healthCmd() *cobra.Command {
	var wait time.Duration
	c := &cobra.Command{Use: "health", Short: "Is the node healthy, and if not, why", Args: cobra.NoArgs,
		Long: "Is the node healthy, and if not, why. Exits 1 if it is not.\nWith --wait it waits until the node is healthy, at most as long as given.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.health(cmd.Context(), wait)
			if err != nil {
				return err
			}
			if err := a.printHealth(h); err != nil {
				return err
			}
			if !h.Healthy {
				return exitCode(1)
			}
			return nil
		}}
	c.Flags().DurationVar(&wait, "wait", 0, "wait until healthy, at most this long")
	c.Flags().Lookup("wait").NoOptDefVal = "10m"
	return c
}

// health asks once, or until healthy or wait is over; then it returns the last answer.
func (a *app) health(ctx context.Context, wait time.Duration) (*machinev1.GetHealthResponse, error) {
	deadline := time.Now().Add(wait)
	var last *machinev1.GetHealthResponse
	for {
		err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
			last, err = machinev1.NewMachineClient(conn).GetHealth(ctx, &machinev1.GetHealthRequest{})
			return err
		})
		if (err == nil && last.Healthy) || !time.Now().Before(deadline) || ctx.Err() != nil {
			return last, err
		}
		if err := pause(ctx, time.Second); err != nil {
			return last, err
		}
	}
}

func (a *app) printHealth(h *machinev1.GetHealthResponse) error {
	return a.print(h, func() *table {
		t := newTable("CHECK", "OK", "DETAIL")
		for _, c := range h.Checks {
			mark := "yes"
			if !c.Ok {
				mark = "NO"
			}
			t.add(c.Name, mark, c.Detail)
		}
		return t
	})
}

func (a *app) servicesCmd() *cobra.Command {
	return &cobra.Command{Use: "services", Aliases: []string{"ps"}, Short: "List the node's units with state and memory", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			l, err := machinev1.NewMachineClient(conn).ListServices(ctx, &machinev1.ListServicesRequest{})
			if err != nil {
				return err
			}
			return a.print(l, func() *table {
				t := newTable("NAME", "STATE", "PID", "RESTARTS", "MEMORY", "CPU", "SINCE", "LAST EXIT")
				for _, s := range l.Services {
					t.add(s.Name, s.State, fmt.Sprint(s.Pid), fmt.Sprint(s.Restarts), bytesText(s.MemoryBytes),
						fmt.Sprintf("%.1fs", s.CpuSeconds), age(s.Since.AsTime()), s.LastExit)
				}
				return t
			})
		})
	}}
}

// age is how long ago something was, in one or two units.
func age(t time.Time) string {
	if t.Unix() <= 0 {
		return "-"
	}
	d := time.Since(t).Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func (a *app) serviceCmd() *cobra.Command {
	c := &cobra.Command{Use: "service", Short: "Act on one unit"}
	c.AddCommand(&cobra.Command{Use: "restart NAME", Short: "Stop a unit and start it again", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeServices,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := machinev1.NewMachineClient(conn).RestartService(ctx, &machinev1.RestartServiceRequest{Name: args[0]})
				return err
			})
		}})
	return c
}

func (a *app) completeServices(cmd *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	a.timeout = 2 * time.Second
	_ = a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
		l, err := machinev1.NewMachineClient(conn).ListServices(ctx, &machinev1.ListServicesRequest{})
		for _, s := range l.GetServices() {
			names = append(names, s.Name)
		}
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}

// lineFlags are those of every command that prints lines as they come.
type lineFlags struct {
	follow, times bool
	tail          uint32
}

func (l *lineFlags) add(c *cobra.Command) {
	c.Flags().BoolVarP(&l.follow, "follow", "f", false, "keep printing what comes, until Ctrl-C")
	c.Flags().Uint32Var(&l.tail, "tail", 0, "only the last this many; 0 means all that is kept")
	c.Flags().BoolVarP(&l.times, "times", "t", false, "begin each line with its time")
}

func (a *app) printLine(l *lineFlags, m *machinev1.LogLine) error {
	if a.format != "table" {
		return a.printMessage(m)
	}
	if l.times {
		_, err := fmt.Fprintln(a.out, m.Time.AsTime().Local().Format("2006-01-02 15:04:05.000"), m.Text)
		return err
	}
	_, err := fmt.Fprintln(a.out, m.Text)
	return err
}

func (a *app) logsCmd() *cobra.Command {
	var l lineFlags
	var boot int64
	c := &cobra.Command{Use: "logs NAME", Short: "Print a unit's log, or the last lines of an earlier boot", ValidArgsFunction: a.completeServices,
		Long: `Print a unit's log. With --boot, print the last lines of one boot, of everything on the node together or of what is named: a unit,
kernel, panic (what a kernel that panicked left) or events. bhctl get boots lists the boots.`,
		Example: "  bhctl logs apid -f\n  bhctl logs --boot -1 --tail 50\n  bhctl logs --boot -1 panic",
		Args:    cobra.MaximumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("boot") {
				if l.follow {
					return errors.New("--follow: an earlier boot says nothing more; leave --boot out")
				}
				return a.bootLog(cmd.Context(), boot, strings.Join(args, ""), l)
			}
			if len(args) == 0 {
				return errors.New("which unit? bhctl services lists them")
			}
			return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				s, err := machinev1.NewMachineClient(conn).StreamLogs(ctx, &machinev1.StreamLogsRequest{Name: args[0], Follow: l.follow, Tail: l.tail})
				if err != nil {
					return err
				}
				return receive(s, func(m *machinev1.LogLine) error { return a.printLine(&l, m) })
			})
		}}
	l.add(c)
	c.Flags().Int64Var(&boot, "boot", 0, "the last lines of this boot: its number, 0 for the running one, -1 for the one before it")
	return c
}

func (a *app) dmesgCmd() *cobra.Command {
	var l lineFlags
	c := &cobra.Command{Use: "dmesg", Short: "Print the kernel's log", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			s, err := machinev1.NewMachineClient(conn).StreamKernelLog(ctx, &machinev1.StreamKernelLogRequest{Follow: l.follow, Tail: l.tail})
			if err != nil {
				return err
			}
			return receive(s, func(m *machinev1.LogLine) error { return a.printLine(&l, m) })
		})
	}}
	l.add(c)
	return c
}

func (a *app) eventsCmd() *cobra.Command {
	var l lineFlags
	c := &cobra.Command{Use: "events", Short: "Print what changed on the node", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			s, err := machinev1.NewMachineClient(conn).StreamEvents(ctx, &machinev1.StreamEventsRequest{Follow: l.follow, Tail: l.tail})
			if err != nil {
				return err
			}
			return receive(s, func(e *machinev1.Event) error {
				if a.format != "table" {
					return a.printMessage(e)
				}
				_, err := fmt.Fprintf(a.out, "%s  %-10s %-16s %s\n", e.Time.AsTime().Local().Format("15:04:05.000"), e.Type, e.Source, e.Text)
				return err
			})
		})
	}}
	l.add(c)
	return c
}

func (a *app) rebootCmd() *cobra.Command {
	var wait time.Duration
	var f rollingFlags
	c := &cobra.Command{Use: "reboot", Short: "Stop everything in order and restart the machine, or all nodes one after the other", Args: cobra.NoArgs,
		Long: `Stop everything in order and restart the machine.

With --cluster all nodes restart one after the other, control planes first: each is emptied of pods, restarts, and must be ready again before the next one's turn. While etcd could
not spare a member, it waits. It goes on in the cluster, whatever becomes of this command; bhctl rolling status -w follows it.`,
		Example: "  bhctl -n node2 reboot --wait\n  bhctl reboot --cluster --drain-timeout 10m --on-timeout force",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(cmd, a.node); err != nil {
				return err
			}
			if f.cluster {
				if cmd.Flags().Changed("wait") {
					return errors.New("--wait is for one node; with --cluster the command follows to the end, unless --detach is given")
				}
				return a.roll(cmd.Context(), &f, func() (*clusterv1.StartRequest, error) { return &clusterv1.StartRequest{Kind: "reboot"}, nil })
			}
			err := a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				_, err := machinev1.NewMachineClient(conn).Reboot(ctx, &machinev1.RebootRequest{})
				return err
			})
			if err != nil || wait == 0 {
				return err
			}
			return a.waitReboot(cmd.Context(), wait)
		}}
	c.Flags().DurationVar(&wait, "wait", 0, "wait until the node is back and healthy, at most this long")
	c.Flags().Lookup("wait").NoOptDefVal = "10m"
	f.add(c)
	return c
}

// waitReboot waits first for the node to go away, else the old system's last answers would pass for the new one's.
func (a *app) waitReboot(ctx context.Context, wait time.Duration) error {
	deadline := time.Now().Add(wait)
	probe := *a
	probe.timeout = time.Second
	for time.Now().Before(deadline) {
		if err := probe.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
			return err
		}); err != nil {
			break
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	h, err := a.health(ctx, time.Until(deadline))
	if err != nil {
		return err
	}
	if err := a.printHealth(h); err != nil {
		return err
	}
	if !h.Healthy {
		return exitCode(1)
	}
	return nil
}

func (a *app) shutdownCmd() *cobra.Command {
	return &cobra.Command{Use: "shutdown", Short: "Stop everything in order and power the machine off", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := machinev1.NewMachineClient(conn).Shutdown(ctx, &machinev1.ShutdownRequest{})
			return err
		})
	}}
}

func (a *app) bootstrapCmd() *cobra.Command {
	return &cobra.Command{Use: "bootstrap", Short: "Make this configured node the first of its cluster", Args: cobra.NoArgs,
		Long: "Make this configured node the first of its cluster: its certificate authorities are made, etcd and Kubernetes start.\nDoing it again changes nothing.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := trustv1.NewTrustClient(conn).Bootstrap(ctx, &trustv1.BootstrapRequest{})
				if err != nil {
					return err
				}
				said := "bootstrapped; watch it come up: bhctl health --wait"
				if r.Already {
					said = "was bootstrapped already; nothing changed"
				}
				_, err = fmt.Fprintln(a.out, said)
				return err
			})
		}}
}

// pause waits without holding up Ctrl-C.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// sortedKeys returns a map's keys in order.
func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
