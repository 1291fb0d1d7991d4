package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// readDocuments reads files ("-" is standard input) as one document set, and checks it here first, so that a mistake
// never reaches a node and is named with its file and line.
func (a *app) readDocuments(files []string) (name, text string, err error) {
	if len(files) == 0 {
		return "", "", fmt.Errorf("name the file with the documents: -f node.yaml (or - for standard input)")
	}
	var parts []string
	for _, f := range files {
		var data []byte
		if f == "-" {
			data, err = io.ReadAll(io.LimitReader(a.in, 2<<20))
		} else {
			data, err = os.ReadFile(f)
		}
		if err != nil {
			return "", "", err
		}
		if _, err := config.Parse(f, data); err != nil {
			return "", "", err
		}
		parts = append(parts, strings.TrimSuffix(string(data), "\n")+"\n")
	}
	text = strings.Join(parts, "---\n")
	name = strings.Join(files, "+")
	_, err = config.Parse(name, []byte(text)) // together: no kind twice
	return name, text, err
}

func (a *app) applyCmd() *cobra.Command {
	var files []string
	var dry, noWait bool
	c := &cobra.Command{Use: "apply -f FILE", Short: "Give the node a new configuration", Args: cobra.NoArgs,
		Long:    "Give the node a new configuration. It is checked whole here and on the node, and applied whole or refused whole.\nThe documents replace the running ones; a kind that is left out gets its defaults.",
		Example: "  bhctl apply -f node.yaml --dry-run\n  bhctl apply -f node.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			name, text, err := a.readDocuments(files)
			if err != nil {
				return err
			}
			// The first apply makes file systems: that is slow on slow disks.
			err = a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := configv1.NewConfigClient(conn).Apply(ctx, &configv1.ApplyRequest{Documents: text, Name: name, DryRun: dry})
				if err != nil {
					return err
				}
				if err := a.printApply(r, dry); err != nil || dry {
					return err
				}
				_, err = a.showRecovery(ctx, storagev1.NewKeysClient(conn)) // of volumes that this has made
				return err
			})
			if err != nil || dry || noWait || a.format != "table" || !wantsInstall(text) {
				return err
			}
			return a.install(cmd.Context(), a.progress())
		}}
	c.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until the node runs from the disk that it is installed on (Storage.install)")
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "file with documents; - is standard input; may be given more than once")
	c.Flags().BoolVar(&dry, "dry-run", false, "print what would be done, and do nothing")
	return c
}

func (a *app) printApply(r *configv1.ApplyResponse, dry bool) error {
	if a.format != "table" {
		return a.print(r, nil)
	}
	for _, p := range r.Plans {
		for _, s := range p.Steps {
			fmt.Fprintf(a.out, "%-10s %s\n", p.Daemon, s)
		}
		if p.Error != "" {
			fmt.Fprintf(a.out, "%-10s cannot say: %s\n", p.Daemon, p.Error)
		}
	}
	switch {
	case dry && r.Changed:
		fmt.Fprintf(a.out, "would become generation %d\n", r.Generation)
	case !r.Changed:
		fmt.Fprintf(a.out, "unchanged, generation %d\n", r.Generation)
	default:
		fmt.Fprintf(a.out, "applied as generation %d\n", r.Generation)
	}
	return nil
}

func (a *app) diffCmd() *cobra.Command {
	var files []string
	c := &cobra.Command{Use: "diff [-f FILE]", Short: "What differs: between a file and the node, or between the node's document and its kernel", Args: cobra.NoArgs,
		Long: "With -f: what applying the file would change in the node's document.\nWithout: what the daemons have still to do, or cannot do: drift between document and kernel.\nExits 1 if anything differs.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var lines []string
			err := a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				if len(files) > 0 {
					lines, err = a.diffDocuments(ctx, conn, files)
				} else {
					lines, err = diffSpecs(ctx, conn)
				}
				return err
			})
			if err != nil {
				return err
			}
			for _, l := range lines {
				fmt.Fprintln(a.out, l)
			}
			if len(lines) > 0 {
				return exitCode(1)
			}
			return nil
		}}
	c.Flags().StringArrayVarP(&files, "file", "f", nil, "file with documents; - is standard input; may be given more than once")
	return c
}

func (a *app) diffDocuments(ctx context.Context, conn *grpc.ClientConn, files []string) ([]string, error) {
	name, text, err := a.readDocuments(files)
	if err != nil {
		return nil, err
	}
	want, err := config.Parse(name, []byte(text))
	if err != nil {
		return nil, err
	}
	r, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
	if err != nil && !errs.Is(err, errs.NotFound) {
		return nil, err
	}
	have, err := config.Parse("the node's document", []byte(r.GetDocuments()))
	if err != nil {
		return nil, err
	}
	return config.Diff(have, want), nil
}

func diffSpecs(ctx context.Context, conn *grpc.ClientConn) ([]string, error) {
	r, err := configv1.NewConfigClient(conn).ListSpecs(ctx, &configv1.ListSpecsRequest{})
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, s := range r.Specs {
		for _, p := range s.Pending {
			lines = append(lines, fmt.Sprintf("%s: %s", s.Daemon, p))
		}
		if s.Error != "" {
			lines = append(lines, fmt.Sprintf("%s: error: %s", s.Daemon, oneLine(s.Error)))
		}
	}
	return lines, nil
}
