package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/bulkhead-os/bulkhead/internal/client"
)

// contexts is the file with the user's clusters: $BHCONFIG, else ~/.config/bulkhead/config.yaml. It holds private keys: mode 0600.
type contexts struct {
	Current  string                     `json:"current,omitempty"`
	Contexts map[string]*clusterContext `json:"contexts,omitempty"`
}

// clusterContext is one node or cluster and the credentials for it. CA, Certificate and Key are PEM.
type clusterContext struct {
	Endpoint string `json:"endpoint"`
	// Endpoints are further ones, asked when the first does not answer.
	Endpoints   []string `json:"endpoints,omitempty"`
	Gateway     string   `json:"gateway,omitempty"`    // URL of the REST gateway
	Kubernetes  string   `json:"kubernetes,omitempty"` // URL of the API server as reached from here
	CA          string   `json:"ca,omitempty"`
	Certificate string   `json:"certificate,omitempty"`
	Key         string   `json:"key,omitempty"`
	Token       string   `json:"token,omitempty"`
	// SignIn is of who signed in at an issuer. Before it ends it is used instead of the rest.
	SignIn *signIn `json:"signIn,omitempty"`
}

func (c *clusterContext) credentials() client.Credentials {
	if c.SignIn != nil {
		return client.Credentials{CA: []byte(c.CA), Token: c.SignIn.IDToken}
	}
	return client.Credentials{CA: []byte(c.CA), Certificate: []byte(c.Certificate), Key: []byte(c.Key), Token: c.Token}
}

// all returns the endpoints in the order in which they are tried, each once.
func (c *clusterContext) all() []string {
	var out []string
	for _, e := range append([]string{c.Endpoint}, c.Endpoints...) {
		if e != "" && !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return out
}

func contextsPath() (string, error) {
	if p := os.Getenv("BHCONFIG"); p != "" {
		return p, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("%w: set BHCONFIG to the file to use", err)
	}
	return filepath.Join(dir, "bulkhead", "config.yaml"), nil
}

// loadContexts reads the file; no file is an empty one.
func loadContexts() (*contexts, error) {
	path, err := contextsPath()
	if err != nil {
		return nil, err
	}
	cfg := &contexts{Contexts: map[string]*clusterContext{}}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return cfg, nil
	}
	if err != nil {
		return nil, err
	}
	if err := yaml.UnmarshalStrict(data, cfg); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if cfg.Contexts == nil {
		cfg.Contexts = map[string]*clusterContext{}
	}
	return cfg, nil
}

// save writes the file so that a crash leaves the old or the new one.
func (c *contexts) save() error {
	path, err := contextsPath()
	if err != nil {
		return err
	}
	data, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	return writeSecret(path, data)
}

// writeSecret replaces a file by one that only its owner can read.
func writeSecret(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// pick returns a copy of the named context, or of the current one for "".
func (c *contexts) pick(name string) (*clusterContext, error) {
	if name == "" {
		name = c.Current
	}
	if name == "" || len(c.Contexts) == 0 {
		return nil, errors.New("no context yet: bhctl up makes a local node and a context for it; bhctl claim takes over a new one")
	}
	ctx, ok := c.Contexts[name]
	if !ok {
		return nil, fmt.Errorf("no context %q; there are: %s", name, strings.Join(c.names(), ", "))
	}
	cp := *ctx
	return &cp, nil
}

func (c *contexts) names() []string {
	var out []string
	for n := range c.Contexts {
		out = append(out, n)
	}
	sort.Strings(out)
	return out
}

func (a *app) contextNames() []string {
	cfg, err := loadContexts()
	if err != nil {
		return nil
	}
	return cfg.names()
}

// configCmd is about the user's own file, not about a node's configuration: that is apply, diff and get config.
func (a *app) configCmd() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "The contexts of this user: which nodes, with which credentials"}
	named := func(use, short string, f func(cfg *contexts, name string) error) *cobra.Command {
		return &cobra.Command{Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1),
			ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
				return a.contextNames(), cobra.ShellCompDirectiveNoFileComp
			},
			RunE: func(_ *cobra.Command, args []string) error {
				cfg, err := loadContexts()
				if err != nil {
					return err
				}
				if _, err := cfg.pick(args[0]); err != nil {
					return err
				}
				if err := f(cfg, args[0]); err != nil {
					return err
				}
				return cfg.save()
			}}
	}
	c.AddCommand(
		&cobra.Command{Use: "list", Aliases: []string{"contexts"}, Short: "List contexts", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			cfg, err := loadContexts()
			if err != nil {
				return err
			}
			return a.printContexts(cfg)
		}},
		&cobra.Command{Use: "show", Short: "Show the file, without its secrets", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			cfg, err := loadContexts()
			if err != nil {
				return err
			}
			for _, ctx := range cfg.Contexts {
				if ctx.Key != "" {
					ctx.Key = "[secret]"
				}
				if ctx.Token != "" {
					ctx.Token = "[secret]"
				}
				if ctx.SignIn != nil {
					ctx.SignIn.IDToken, ctx.SignIn.RefreshToken = "[secret]", "[secret]"
				}
			}
			data, err := yaml.Marshal(cfg)
			if err != nil {
				return err
			}
			_, err = a.out.Write(data)
			return err
		}},
		&cobra.Command{Use: "ca", Short: "Print the authority of the context's node (PEM), for curl --cacert", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			c, err := a.target()
			if err == nil {
				_, err = fmt.Fprint(a.out, c.CA)
			}
			return err
		}},
		&cobra.Command{Use: "path", Short: "Print the file's path", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			path, err := contextsPath()
			if err == nil {
				fmt.Fprintln(a.out, path)
			}
			return err
		}},
		&cobra.Command{Use: "endpoints HOST[:PORT]...", Short: "Say where the context's nodes are reached, in the order in which they are tried", Args: cobra.MinimumNArgs(1),
			Example: "  bhctl config endpoints 192.0.2.11 192.0.2.12 192.0.2.13", RunE: func(_ *cobra.Command, args []string) error {
				cfg, err := loadContexts()
				if err != nil {
					return err
				}
				if _, err := cfg.pick(a.contextName); err != nil {
					return err
				}
				for i := range args {
					if args[i], err = client.Address(args[i]); err != nil {
						return err
					}
				}
				c := cfg.Contexts[cmp.Or(a.contextName, cfg.Current)]
				c.Endpoint, c.Endpoints = args[0], args[1:]
				return cfg.save()
			}},
		named("use", "Make a context the current one", func(cfg *contexts, name string) error { cfg.Current = name; return nil }),
		named("remove", "Forget a context and its credentials", func(cfg *contexts, name string) error {
			delete(cfg.Contexts, name)
			if cfg.Current == name {
				cfg.Current = ""
			}
			return nil
		}),
	)
	return c
}

func (a *app) printContexts(cfg *contexts) error {
	type row struct {
		Name     string `json:"name"`
		Endpoint string `json:"endpoint"`
		Current  bool   `json:"current"`
		// Further ones; left out if there are none.
		Endpoints []string `json:"endpoints,omitempty"`
	}
	rows := []row{}
	for _, n := range cfg.names() {
		rows = append(rows, row{n, cfg.Contexts[n].Endpoint, n == cfg.Current, cfg.Contexts[n].Endpoints})
	}
	return a.print(rows, func() *table {
		t := newTable("", "NAME", "ENDPOINT")
		for _, r := range rows {
			mark := ""
			if r.Current {
				mark = "*"
			}
			t.add(mark, r.Name, strings.Join(cfg.Contexts[r.Name].all(), ", "))
		}
		return t
	})
}
