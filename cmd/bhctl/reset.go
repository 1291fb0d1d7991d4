package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

func (a *app) resetCmd() *cobra.Command {
	r := &machinev1.ResetRequest{}
	yes := false
	c := &cobra.Command{Use: "reset", Short: "Destroy all that a node has, and make it one that nobody owns", Args: cobra.NoArgs,
		Long: "Destroy all that a node has: its workloads are stopped, the keys of its volumes STATE and VAR are overwritten, so that nothing opens them any more, the\n" +
			"recovery key included, and the volumes are taken off the disk. Then it restarts as a node that nobody owns, with a code on its console; with --remove-os\n" +
			"the system is gone, too, and the disk boots nothing.\n\n" +
			"A member of etcd leaves it first, which is refused if the others would have no quorum, and at the end the cluster takes the node off its list; --force leaves out both.\n" +
			"The node's name has to be typed, or --yes given. A reset that was begun goes on when this command is ended, and by itself after a power cut.",
		Example: "  bhctl reset\n  bhctl reset --remove-os --power-off --yes",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				if r.Node, err = nodeName(ctx, conn); err != nil {
					return err
				}
				if err := a.confirmReset(r, yes); err != nil {
					return err
				}
				return a.reset(ctx, conn, r)
			})
		}}
	f := c.Flags()
	f.BoolVar(&r.RemoveOs, "remove-os", false, "remove the system, too: the disk can be given away, or another system installed")
	f.BoolVar(&r.PowerOff, "power-off", false, "turn the machine off afterwards instead of restarting it")
	f.BoolVar(&r.Force, "force", false, "go on where the node cannot leave its cluster, or its TPM does not take its owner's authorisation back")
	f.BoolVar(&yes, "yes", false, "do not ask for the node's name")
	return c
}

// nodeName is the node's own, "" if it has no configuration.
func nodeName(ctx context.Context, conn *grpc.ClientConn) (string, error) {
	g, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
	if errs.Is(err, errs.NotFound) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	set, err := config.Parse("", []byte(g.Effective))
	if err != nil {
		return "", fmt.Errorf("the node's configuration: %w", err)
	}
	return set.Machine.Hostname, nil
}

// confirmReset wants the node's name from a person. A node that has none is typed as "reset".
func (a *app) confirmReset(r *machinev1.ResetRequest, yes bool) error {
	if yes {
		return nil
	}
	word, what := r.Node, "STATE and VAR of the node"
	if word == "" {
		word = "reset"
	}
	if r.RemoveOs {
		what += ", and its system"
	}
	fmt.Fprintf(a.err, "This destroys %s, for ever. Type %s to go on.\n", what, word)
	if typed, err := a.typed(); err != nil || typed != word {
		return errors.Join(err, errors.New("that is not the name; nothing was changed"))
	}
	return nil
}

// typed reads a line that is no secret.
func (a *app) typed() (string, error) {
	line, err := bufio.NewReader(io.LimitReader(a.in, 4<<10)).ReadString('\n')
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return strings.TrimSpace(line), err
}

// lastWords are facts that come after the first ones: what did not succeed at the very end. The stream may be lost meanwhile, as the cluster lets go of the node.
func lastWords(stream grpc.ServerStreamingClient[machinev1.ResetProgress]) (facts []string) {
	for {
		p, err := stream.Recv()
		if err != nil {
			return facts
		}
		facts = append(facts, p.Facts...)
	}
}

// reset shows the steps as they come, and at the end what is true now.
func (a *app) reset(ctx context.Context, conn *grpc.ClientConn, r *machinev1.ResetRequest) error {
	stream, err := machinev1.NewMachineClient(conn).Reset(ctx, r)
	if err != nil {
		return err
	}
	var last *machinev1.ResetProgress
	for {
		p, err := stream.Recv()
		if err != nil {
			if last.GetBegun() {
				return fmt.Errorf("%w\n  The reset was begun: the volumes are not opened any more, and the node's next start destroys what is left of them", err)
			}
			return err
		}
		if last = p; len(p.Facts) > 0 {
			last.Facts = append(last.Facts, lastWords(stream)...)
			break
		}
		if a.format == "table" {
			fmt.Fprintf(a.out, "%6s  %s\n", round(time.Duration(p.ElapsedMs)*time.Millisecond), p.Step)
		}
	}
	if a.format != "table" {
		return a.print(last, nil)
	}
	fmt.Fprintln(a.out)
	for _, f := range last.Facts {
		fmt.Fprintln(a.out, "  "+f)
	}
	switch {
	case r.PowerOff:
		fmt.Fprintln(a.out, "  The machine turns off.")
	case r.RemoveOs:
		fmt.Fprintln(a.out, "  The machine restarts, and its firmware looks for something else to start.")
	default:
		fmt.Fprintln(a.out, "  The node restarts. Nobody owns it: claim it with the code on its console (bhctl claim).")
	}
	return nil
}
