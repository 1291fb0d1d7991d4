// Bhctl is the command line of Bulkhead: it drives nodes through their API, and runs local machines to try it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bulkhead-os/bulkhead/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	app := &app{out: os.Stdout, err: os.Stderr, in: os.Stdin, args: os.Args[1:]}
	cmd := app.root()
	if err := cmd.ExecuteContext(ctx); err != nil {
		var code exitCode
		if errors.As(err, &code) {
			os.Exit(int(code))
		}
		fmt.Fprintln(os.Stderr, "bhctl:", explain(err))
		os.Exit(1)
	}
}

// exitCode ends the program with a code and says nothing: what there was to say has been said.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit %d", int(c)) }

// root returns the whole command tree.
func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use:   "bhctl",
		Short: "Drive Bulkhead nodes through their API",
		Long: `Drive Bulkhead nodes through their API.

Try it:      bhctl up                      a local node in a virtual machine
Look:        bhctl health, services, get links, logs apid -f
Change:      bhctl apply -f node.yaml --dry-run, then without
Kubernetes:  bhctl kubeconfig > kubeconfig && kubectl --kubeconfig kubeconfig get nodes`,
		Version:       version.Version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := c.PersistentFlags()
	f.StringVar(&a.contextName, "context", "", "context to use instead of the current one (see bhctl config)")
	f.StringVar(&a.endpoint, "endpoint", "", "address of the node's API, HOST:PORT, instead of the context's")
	f.StringVar(&a.token, "token", os.Getenv("BHTOKEN"), "bearer token instead of the context's certificate (default $BHTOKEN)")
	f.DurationVar(&a.timeout, "timeout", 0, "give up a call after this long (default 30s; streams have no limit)")
	f.BoolVar(&a.wrongClock, "wrong-clock", false, "take the node's certificate whatever its dates say, to look at a node whose clock is wrong")
	f.StringVarP(&a.format, "output", "o", "table", "table, json or yaml")
	f.StringSliceVarP(&a.nodes, "node", "n", nil, "the node that is to answer, by its name; several, separated by commas, are asked at the same time")
	f.BoolVar(&a.allNodes, "all", false, "ask every node of the cluster")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	_ = c.RegisterFlagCompletionFunc("node", a.completeNodes)
	_ = c.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return a.contextNames(), cobra.ShellCompDirectiveNoFileComp
	})
	c.PersistentPreRunE = func(*cobra.Command, []string) error { return a.checkFormat() }
	c.AddGroup(&cobra.Group{ID: "local", Title: "Local machines"}, &cobra.Group{ID: "node", Title: "Nodes"}, &cobra.Group{ID: "cluster", Title: "Clusters"}, &cobra.Group{ID: "access", Title: "Access"})
	group := func(id string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = id
			c.AddCommand(cmd)
		}
	}
	group("local", a.upCmd(), a.downCmd(), a.statusCmd(), a.lanSwitchCmd())
	group("node", a.versionCmd(), a.healthCmd(), a.servicesCmd(), a.serviceCmd(), a.logsCmd(), a.dmesgCmd(), a.eventsCmd(), a.applyCmd(), a.diffCmd(),
		a.getCmd(), a.storageCmd(), a.secureBootCmd(), a.unlockCmd(), a.whyCmd(), a.upgradeCmd(), a.rollbackCmd(), a.markGoodCmd(), a.rebootCmd(), a.shutdownCmd(), a.resetCmd())
	group("cluster", a.bootstrapCmd(), a.joinCmd(), a.joinTokenCmd(), a.attestCmd(), a.nodeCmd(), a.rollingCmd(), a.etcdCmd())
	group("access", a.configCmd(), a.claimCmd(), a.tokenCmd(), a.certificateCmd(), a.kubeconfigCmd(), a.revokeCmd(), a.trustCmd(), a.auditCmd(), a.loginCmd(), a.logoutCmd(), a.whoamiCmd())
	leaves(c, func(cmd *cobra.Command) {
		run := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.onNodes(cmd, args, run) }
	})
	return c
}
