package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	kubernetesv1 "github.com/bulkhead-os/bulkhead/api/kubernetes/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	networkv1 "github.com/bulkhead-os/bulkhead/api/network/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
)

// A resource is something that "bhctl get" can show.
type resource struct {
	short string
	head  []string
	// items reads all items once.
	items func(context.Context, *grpc.ClientConn) ([]proto.Message, error)
	// watch calls f with all items now and after each change; nil: the node has no stream for it, so it is read again each second.
	watch func(context.Context, *grpc.ClientConn, func([]proto.Message) error) error
	row   func(proto.Message) []string
}

// of makes a resource from typed parts: S is the daemon's whole status, T one item of it.
func of[S any, T proto.Message](short string, head []string, get func(context.Context, *grpc.ClientConn) (S, error),
	watch func(context.Context, *grpc.ClientConn, func(S) error) error, pick func(S) []T, row func(T) []string) resource {
	all := func(s S) []proto.Message {
		items := []proto.Message{}
		for _, i := range pick(s) {
			items = append(items, i)
		}
		return items
	}
	r := resource{short: short, head: head, row: func(m proto.Message) []string { return row(m.(T)) }}
	r.items = func(ctx context.Context, conn *grpc.ClientConn) ([]proto.Message, error) {
		s, err := get(ctx, conn)
		if err != nil {
			return nil, err
		}
		return all(s), nil
	}
	if watch != nil {
		r.watch = func(ctx context.Context, conn *grpc.ClientConn, f func([]proto.Message) error) error {
			return watch(ctx, conn, func(s S) error { return f(all(s)) })
		}
	}
	return r
}

func getNetwork(ctx context.Context, conn *grpc.ClientConn) (*networkv1.Status, error) {
	return networkv1.NewNetworkClient(conn).GetStatus(ctx, &networkv1.GetStatusRequest{})
}

func watchNetwork(ctx context.Context, conn *grpc.ClientConn, f func(*networkv1.Status) error) error {
	s, err := networkv1.NewNetworkClient(conn).WatchStatus(ctx, &networkv1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	return receive(s, f)
}

func getStorage(ctx context.Context, conn *grpc.ClientConn) (*storagev1.Status, error) {
	return storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
}

func watchStorage(ctx context.Context, conn *grpc.ClientConn, f func(*storagev1.Status) error) error {
	s, err := storagev1.NewStorageClient(conn).WatchStatus(ctx, &storagev1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	return receive(s, f)
}

func getKubernetes(ctx context.Context, conn *grpc.ClientConn) (*kubernetesv1.Status, error) {
	return kubernetesv1.NewKubernetesClient(conn).GetStatus(ctx, &kubernetesv1.GetStatusRequest{})
}

func watchKubernetes(ctx context.Context, conn *grpc.ClientConn, f func(*kubernetesv1.Status) error) error {
	s, err := kubernetesv1.NewKubernetesClient(conn).WatchStatus(ctx, &kubernetesv1.WatchStatusRequest{})
	if err != nil {
		return err
	}
	return receive(s, f)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// resources is the table of all that can be shown.
func resources() map[string]resource {
	all := map[string]resource{
		"links": of("network interfaces", []string{"NAME", "KIND", "UP", "CARRIER", "MTU", "HARDWARE ADDRESS", "RECEIVED", "SENT"}, getNetwork, watchNetwork,
			(*networkv1.Status).GetLinks, func(l *networkv1.Link) []string {
				return []string{l.Name, l.Kind, yes(l.Up), yes(l.Carrier), fmt.Sprint(l.Mtu), l.HardwareAddress, bytesText(l.ReceivedBytes), bytesText(l.SentBytes)}
			}),
		"addresses": of("addresses of interfaces", []string{"LINK", "ADDRESS", "ORIGIN"}, getNetwork, watchNetwork,
			(*networkv1.Status).GetAddresses, func(x *networkv1.Address) []string { return []string{x.Link, x.Address, x.Origin} }),
		"routes": of("routes", []string{"DESTINATION", "GATEWAY", "LINK", "METRIC", "ORIGIN"}, getNetwork, watchNetwork,
			(*networkv1.Status).GetRoutes, func(r *networkv1.Route) []string {
				return []string{r.Destination, r.Gateway, r.Link, fmt.Sprint(r.Metric), r.Origin}
			}),
		"rules": of("firewall rules for what comes in", []string{"RULE", "PACKETS", "BYTES"}, getNetwork, watchNetwork,
			(*networkv1.Status).GetRules, func(r *networkv1.Rule) []string {
				return []string{r.Text, fmt.Sprint(r.Packets), fmt.Sprint(r.Bytes)}
			}),
		"leases": of("DHCP leases", []string{"LINK", "ADDRESS", "SERVER", "REMAINING"}, getNetwork, watchNetwork,
			(*networkv1.Status).GetLeases, func(l *networkv1.Lease) []string {
				return []string{l.Link, l.Address, l.Server, (time.Duration(l.RemainingSeconds) * time.Second).String()}
			}),
		"disks": of("disks", []string{"DEVICE", "SIZE", "TRANSPORT", "MODEL", "SERIAL", "CONTENT", "SYSTEM"}, getStorage, watchStorage,
			(*storagev1.Status).GetDisks, func(d *storagev1.Disk) []string {
				return []string{d.Device, bytesText(d.SizeBytes), d.Transport, d.Model, d.Serial, d.Content, yes(d.System)}
			}),
		"partitions": of("partitions", []string{"DEVICE", "LABEL", "START", "SIZE", "GUID"}, getStorage, watchStorage,
			(*storagev1.Status).GetPartitions, func(p *storagev1.Partition) []string {
				return []string{p.Device, p.Label, bytesText(p.StartBytes), bytesText(p.SizeBytes), p.Guid}
			}),
		"volumes": of("STATE and VAR", []string{"NAME", "STATE", "DEVICE", "FILESYSTEM", "SIZE", "FREE", "ENCRYPTION", "DETAIL"}, getStorage, watchStorage,
			(*storagev1.Status).GetVolumes, func(v *storagev1.Volume) []string {
				return []string{v.Name, v.State, v.Device, v.Filesystem, bytesText(v.SizeBytes), bytesText(v.FreeBytes), v.Encryption, v.Detail}
			}),
		"install": of("the disk that the node is to run from", []string{"DISK", "STATE", "STEP", "DONE", "TOTAL", "ELAPSED", "EXPECTED"}, getStorage, watchStorage,
			func(s *storagev1.Status) []*storagev1.Install {
				if s.GetInstall() == nil {
					return nil
				}
				return []*storagev1.Install{s.Install}
			}, func(i *storagev1.Install) []string {
				if i.Step == "" {
					return []string{i.Disk, i.State, "", "", "", "", ""}
				}
				seconds := func(n uint32) string { return (time.Duration(n) * time.Second).String() }
				return []string{i.Disk, i.State, i.Step, bytesText(i.DoneBytes), bytesText(i.TotalBytes), seconds(i.ElapsedSeconds), seconds(i.ExpectedSeconds)}
			}),
		"mounts": of("mounts", []string{"TARGET", "SOURCE", "FILESYSTEM", "OPTIONS"}, getStorage, watchStorage,
			(*storagev1.Status).GetMounts, func(m *storagev1.Mount) []string { return []string{m.Target, m.Source, m.Filesystem, m.Options} }),
		"components": of("Kubernetes components", []string{"NAME", "STATE", "HEALTHY", "DETAIL"}, getKubernetes, watchKubernetes,
			(*kubernetesv1.Status).GetComponents, func(c *kubernetesv1.Component) []string {
				return []string{c.Name, c.State, yes(c.Healthy), c.Detail}
			}),
		"kubernetes": of("the Kubernetes side of the node", []string{"NODE", "VERSION", "API", "READY", "REASON"}, getKubernetes, watchKubernetes,
			func(s *kubernetesv1.Status) []*kubernetesv1.Status { return []*kubernetesv1.Status{s} }, func(s *kubernetesv1.Status) []string {
				return []string{s.NodeName, s.Version, yes(s.ApiReady), yes(s.NodeReady), s.NodeReason}
			}),
		"services": of("units", []string{"NAME", "STATE", "PID", "RESTARTS", "LAST EXIT"},
			func(ctx context.Context, conn *grpc.ClientConn) (*machinev1.ListServicesResponse, error) {
				return machinev1.NewMachineClient(conn).ListServices(ctx, &machinev1.ListServicesRequest{})
			}, nil, (*machinev1.ListServicesResponse).GetServices, func(s *machinev1.Service) []string {
				return []string{s.Name, s.State, fmt.Sprint(s.Pid), fmt.Sprint(s.Restarts), s.LastExit}
			}),
		"security": of("how the kernel and the machine are hardened, wanted and actual", []string{"SETTING", "WANTED", "ACTUAL", "OK", "WHY"},
			func(ctx context.Context, conn *grpc.ClientConn) (*machinev1.GetSecurityResponse, error) {
				return machinev1.NewMachineClient(conn).GetSecurity(ctx, &machinev1.GetSecurityRequest{})
			}, nil, (*machinev1.GetSecurityResponse).GetSettings, securityRow),
		"boots": of("the newest boots and how each ended", []string{"BOOT", "VERSION", "STARTED", "END", "DETAIL"},
			func(ctx context.Context, conn *grpc.ClientConn) (*machinev1.ListBootsResponse, error) {
				return machinev1.NewMachineClient(conn).ListBoots(ctx, &machinev1.ListBootsRequest{})
			}, nil, (*machinev1.ListBootsResponse).GetBoots, bootRow),
		"certificates": of("authorities, and what they signed since boot", []string{"PROFILE", "SUBJECT", "ISSUER", "SERIAL", "UNTIL", "LEFT", "GENERATION", "NAMES"},
			func(ctx context.Context, conn *grpc.ClientConn) (*trustv1.ListCertificatesResponse, error) {
				return trustv1.NewTrustClient(conn).ListCertificates(ctx, &trustv1.ListCertificatesRequest{})
			}, nil, (*trustv1.ListCertificatesResponse).GetCertificates, func(c *trustv1.Certificate) []string {
				return []string{c.Profile, c.Subject, c.Issuer, c.Serial, c.NotAfter.AsTime().Local().Format(time.DateTime), left(c.NotAfter.AsTime(), time.Now()), generationText(c), strings.Join(c.Names, ",")}
			}),
		"generations": of("stored configurations", []string{"GENERATION", "APPLIED", "BY", "SHA-256"},
			func(ctx context.Context, conn *grpc.ClientConn) (*configv1.ListHistoryResponse, error) {
				return configv1.NewConfigClient(conn).ListHistory(ctx, &configv1.ListHistoryRequest{})
			}, nil, (*configv1.ListHistoryResponse).GetGenerations, func(g *configv1.Generation) []string {
				return []string{fmt.Sprint(g.Generation), g.Applied.AsTime().Local().Format(time.DateTime), g.Caller, g.Sha256}
			}),
		"specs": of("what each daemon works towards", []string{"DAEMON", "GENERATION", "CONVERGED", "PENDING", "ERROR"},
			func(ctx context.Context, conn *grpc.ClientConn) (*configv1.ListSpecsResponse, error) {
				return configv1.NewConfigClient(conn).ListSpecs(ctx, &configv1.ListSpecsRequest{})
			}, nil, (*configv1.ListSpecsResponse).GetSpecs, func(s *configv1.SpecState) []string {
				return []string{s.Daemon, fmt.Sprint(s.Generation), yes(s.Converged), strings.Join(s.Pending, "; "), oneLine(s.Error)}
			}),
	}
	maps.Copy(all, updateResources())
	maps.Copy(all, clusterResources())
	return all
}

// generationText says of an authority the how-manieth it is, and whether it signs.
func generationText(c *trustv1.Certificate) string {
	if c.Generation == 0 {
		return ""
	}
	return fmt.Sprintf("%d, %s", c.Generation, c.State)
}

func (a *app) getCmd() *cobra.Command {
	res := resources()
	names := append([]string{"config"}, sortedKeys(res)...)
	var watch, effective bool
	var generation uint64
	long := "Show a resource of the node:\n\n  config         the document itself (--effective: with its defaults; --generation N: an older one)\n"
	for _, n := range sortedKeys(res) {
		long += fmt.Sprintf("  %-14s %s\n", n, res[n].short)
	}
	c := &cobra.Command{Use: "get RESOURCE", Short: "Show the node's state: config, links, addresses, routes, disks, volumes, certificates, …", Long: long, Args: cobra.ExactArgs(1), ValidArgs: names,
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "config" {
				if watch {
					return errors.New("--watch: a document cannot be watched; bhctl get generations --watch shows when there is a new one")
				}
				return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
					return a.getConfig(ctx, conn, generation, effective)
				})
			}
			r, ok := res[args[0]]
			if !ok {
				return fmt.Errorf("no resource %q; there are %s", args[0], strings.Join(names, ", "))
			}
			if watch {
				return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error { return a.watchResource(ctx, conn, r) })
			}
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				items, err := r.items(ctx, conn)
				if err != nil {
					return err
				}
				return a.printItems(r, items)
			})
		}}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "print it again after each change, until Ctrl-C")
	c.Flags().BoolVar(&effective, "effective", false, "config: with every default filled in")
	c.Flags().Uint64Var(&generation, "generation", 0, "config: an older generation")
	return c
}

func (a *app) getConfig(ctx context.Context, conn *grpc.ClientConn, generation uint64, effective bool) error {
	r, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{Generation: generation})
	if err != nil {
		return err
	}
	if a.format == "json" || a.format == "yaml" && a.fan != nil {
		return a.print(r, nil)
	}
	text := r.Documents
	if effective {
		text = r.Effective
	}
	_, err = fmt.Fprint(a.out, text)
	return err
}

func (a *app) printItems(r resource, items []proto.Message) error {
	return a.print(items, func() *table {
		t := newTable(r.head...)
		for _, m := range items {
			t.add(r.row(m)...)
		}
		return t
	})
}

// watchResource prints all items whenever one of them changed.
func (a *app) watchResource(ctx context.Context, conn *grpc.ClientConn, r resource) error {
	var last []proto.Message
	show := func(items []proto.Message) error {
		if last != nil && sameRows(r, last, items) {
			return nil
		}
		if last != nil && a.format == "table" {
			fmt.Fprintln(a.out)
		}
		last = items
		return a.printItems(r, items)
	}
	if r.watch != nil {
		return r.watch(ctx, conn, show)
	}
	for {
		items, err := r.items(ctx, conn)
		if err == nil {
			err = show(items)
		}
		if err == nil {
			err = pause(ctx, time.Second)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func sameRows(r resource, a, b []proto.Message) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if strings.Join(r.row(a[i]), "\x00") != strings.Join(r.row(b[i]), "\x00") {
			return false
		}
	}
	return true
}
