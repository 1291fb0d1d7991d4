package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// upFlags are what a user may choose about a local machine.
type upFlags struct {
	name, image, firmware                string
	secureBoot, tpm                      bool
	files, forwards                      []string
	apiPort, gatewayPort, kubernetesPort int
	memoryMiB, cpus, diskGiB, slow       int
	noBootstrap, install                 bool
	controlPlanes, workers               int

	portsChosen bool         // by the user
	slowSince   time.Time    // with slow
	lan         string       // of a cluster's machine; see qemu.Machine
	lanAddress  netip.Prefix //
}

func (a *app) upCmd() *cobra.Command {
	var f upFlags
	c := &cobra.Command{Use: "up", Short: "Boot a local node, or a cluster, in QEMU and bring it up to Ready Kubernetes nodes", Args: cobra.NoArgs,
		Long: `Boot a local node in QEMU, claim it, configure and bootstrap it through its API, and wait until Kubernetes is Ready.
Again on a node that is up, it is quick and changes nothing.

With --controlplanes or --workers: several machines NAME-1, NAME-2, … and NAME-w1, … with a private network between them (10.5.0.11, … and 10.5.0.101, …), in one
cluster. Again with larger numbers, it adds machines. Documents (-f) go to all of them; Machine, Network and Cluster are made here.`,
		Example: "  bhctl up\n  bhctl up --name demo --controlplanes 3 --workers 1 --memory 3072",
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, flag := range []string{"api-port", "gateway-port", "kubernetes-port"} {
				f.portsChosen = f.portsChosen || cmd.Flags().Changed(flag)
			}
			return a.up(cmd.Context(), f)
		}}
	fl := c.Flags()
	fl.StringVar(&f.name, "name", "local", "name of the machine, and of the context to make")
	fl.StringVar(&f.image, "image", "out/image", "folder with the image that \"make image\" built")
	fl.StringArrayVarP(&f.files, "file", "f", nil, "documents to apply instead of the default ones")
	fl.StringArrayVar(&f.forwards, "forward", nil, "HOSTPORT:NODEPORT to forward too, on 127.0.0.1, 0 for a port that is free; may be given more than once")
	fl.IntVar(&f.apiPort, "api-port", 50000, "port on 127.0.0.1 for the node's API")
	fl.IntVar(&f.gatewayPort, "gateway-port", 50001, "port on 127.0.0.1 for REST")
	fl.IntVar(&f.kubernetesPort, "kubernetes-port", 6443, "port on 127.0.0.1 for Kubernetes' API")
	fl.IntVar(&f.memoryMiB, "memory", 4096, "memory in MiB")
	fl.IntVar(&f.cpus, "cpus", 2, "processors")
	fl.IntVar(&f.diskGiB, "disk", 10, "disk in GiB; it takes only what is used")
	fl.IntVar(&f.slow, "slow-clocks", 0, "clocks that run so many times slower than this host's, 2 to 10: under emulation, a cluster too large for the host's processors has time enough")
	fl.StringVar(&f.firmware, "firmware", "", "uefi boots the disk as a real machine does; without it QEMU starts the image's kernel, which is quicker")
	fl.BoolVar(&f.secureBoot, "secure-boot", false, "with --firmware uefi: start nothing that the image's keys have not signed")
	fl.BoolVar(&f.tpm, "tpm", false, "a TPM 2.0 in software, which is kept with the machine")
	fl.BoolVar(&f.install, "install", false, "start the image's installation medium beside an empty disk, and install to that; implies --firmware uefi")
	fl.IntVar(&f.controlPlanes, "controlplanes", 1, "how many machines run etcd and the control plane")
	fl.IntVar(&f.workers, "workers", 0, "how many further machines there are")
	fl.BoolVar(&f.noBootstrap, "no-bootstrap", false, "stop after the configuration: no cluster, no Kubernetes")
	return c
}

// up does the steps that are not done yet. Each looks first, so that a second call is quick and changes nothing.
func (a *app) up(ctx context.Context, f upFlags) error {
	if f.install && f.firmware == "" {
		f.firmware = qemu.UEFI
	}
	if c, err := a.cluster(f); err != nil {
		return err
	} else if c != nil {
		return a.upCluster(ctx, c)
	}
	f.slowSince = time.Now()
	m, err := openMachine(f)
	if err != nil {
		return err
	}
	p := a.progress()
	p.slow = m.Slow
	start := func(ctx context.Context) error { return m.Start(ctx, p.say) }
	if err := p.step(ctx, "start machine "+f.name, 15*time.Second, start); err != nil {
		return err
	}
	endpoint := fmt.Sprintf("127.0.0.1:%d", m.Port(50000))
	if err := p.step(ctx, "claim the node", 30*time.Second, func(ctx context.Context) error { return a.claimLocal(ctx, m, m.Name, endpoint) }); err != nil {
		return a.withConsole(err, m)
	}
	a.contextName, a.endpoint = f.name, ""
	if err := p.step(ctx, "apply the configuration", 60*time.Second, func(ctx context.Context) error { return a.applyLocal(ctx, f) }); err != nil {
		return a.withConsole(err, m)
	}
	if m.Medium {
		if err := a.install(ctx, p); err != nil {
			return a.withConsole(err, m)
		}
	}
	if f.noBootstrap {
		return nil
	}
	if err := p.step(ctx, "bootstrap the cluster", 20*time.Second, a.bootstrapLocal); err != nil {
		return a.withConsole(err, m)
	}
	if err := p.step(ctx, "wait for Kubernetes", 5*time.Minute, func(ctx context.Context) error { return a.waitReady(ctx, m, func(why string) { p.say("· " + why) }) }); err != nil {
		return a.withConsole(err, m)
	}
	a.printNext(f)
	return nil
}

// withConsole adds where to look to an error of a machine.
func (a *app) withConsole(err error, m *qemu.Machine) error {
	return fmt.Errorf("%w\n  The node's console: %s", err, m.Console())
}

// claimLocal takes the node over with the key that the machine was started with, unless this user owns it already: as says the context.
func (a *app) claimLocal(ctx context.Context, m *qemu.Machine, as, endpoint string) error {
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	key, err := claimKey(m)
	if err != nil {
		return err
	}
	known := cfg.Contexts[as]
	deadline := time.Now().Add(m.HostTime(3 * time.Minute))
	for {
		if known != nil && known.Endpoint == endpoint {
			if err = askVersion(ctx, known); err == nil {
				return nil
			}
		}
		if m.Status().State != qemu.Running {
			return errors.New("the machine ended while it booted")
		}
		if there, _ := answers(ctx, endpoint, ""); there {
			// A claim whose answer is lost cannot be made again: it has all the time that it takes.
			try, cancel := context.WithTimeout(ctx, time.Minute)
			cred, e := client.Claim(try, endpoint, key, "admin")
			cancel()
			if e == nil {
				return a.saveLocal(m, as, endpoint, cred)
			}
			if errs.Is(e, errs.Precondition) && strings.Contains(e.Error(), "bhctl unlock") {
				return e // nothing here opens STATE: a person must
			}
			if known == nil || !errs.Is(e, errs.Precondition) {
				err = e
			}
		} else if err == nil {
			err = errors.New("nobody is there yet")
		}
		if errs.Is(err, errs.Precondition) {
			return fmt.Errorf("somebody owns this machine already, and this user has no credentials for it: bhctl down --name %s removes it", as)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the node's API does not answer at %s: %w", endpoint, err)
		}
		if err := pause(ctx, 300*time.Millisecond); err != nil {
			return err
		}
	}
}

// askVersion tells whether a context's credentials open its node.
func askVersion(ctx context.Context, c *clusterContext) error {
	conn, err := client.DialAny(c.all(), c.credentials())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	_, err = machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{})
	return err
}

func (a *app) saveLocal(m *qemu.Machine, as, endpoint string, cred client.Credentials) error {
	if err := saveContext(as, endpoint, cred); err != nil {
		return err
	}
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	c := cfg.Contexts[as]
	c.Gateway, c.Kubernetes = localURLs(m)
	return cfg.save()
}

// localURLs are a local machine's gateway and API server as reached from here.
func localURLs(m *qemu.Machine) (gateway, kubernetes string) {
	return fmt.Sprintf("https://localhost:%d", m.Port(50001)), fmt.Sprintf("https://127.0.0.1:%d", m.Port(6443))
}

// localDocuments is what a local machine gets unless the user has documents: its own name, and the names under which the
// forwarded ports reach it.
const localDocuments = `apiVersion: bulkhead.dev/v1
kind: Machine
hostname: %s
---
apiVersion: bulkhead.dev/v1
kind: Cluster
name: %s
names: [localhost, 127.0.0.1]
`

// localInstall is for a machine that is installed: its only disk.
const localInstall = `---
apiVersion: bulkhead.dev/v1
kind: Storage
install:
  disk: {size: ">= 1GiB"}
`

func (a *app) applyLocal(ctx context.Context, f upFlags) error {
	name, text := "the default document", fmt.Sprintf(localDocuments, f.name, f.name)
	if f.install {
		text += localInstall
	}
	if len(f.files) > 0 {
		var err error
		if name, text, err = a.readDocuments(f.files); err != nil {
			return err
		}
	}
	return a.applyText(ctx, name, text, len(f.files) > 0)
}

// applyText gives a local node documents. A node that has a configuration keeps it unless replace says otherwise: up is no way to lose one.
func (a *app) applyText(ctx context.Context, name, text string, replace bool) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		cc := configv1.NewConfigClient(conn)
		if !replace {
			if _, err := cc.Get(ctx, &configv1.GetRequest{}); !errs.Is(err, errs.NotFound) {
				return err
			}
		}
		if _, err := cc.Apply(ctx, &configv1.ApplyRequest{Documents: text, Name: name}); err != nil {
			return err
		}
		_, err := a.showRecovery(ctx, storagev1.NewKeysClient(conn)) // of volumes that this has made
		return err
	})
}

func (a *app) bootstrapLocal(ctx context.Context) error {
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
			_, err := trustv1.NewTrustClient(conn).Bootstrap(ctx, &trustv1.BootstrapRequest{})
			return err
		})
		// Right after a boot trustd may not have its section yet.
		if !errs.Is(err, errs.Precondition) && !errs.Is(err, errs.Unavailable) || time.Now().After(deadline) {
			return err
		}
		if err := pause(ctx, 500*time.Millisecond); err != nil {
			return err
		}
	}
}

// waitReady waits until every check of the node passes, and says which is the first that does not.
func (a *app) waitReady(ctx context.Context, m *qemu.Machine, say func(string)) error {
	limit := m.HostTime(15 * time.Minute)
	deadline := time.Now().Add(limit)
	for {
		h, err := a.health(ctx, 0)
		if err == nil && h.Healthy {
			return nil
		}
		why := explainHealth(h, err)
		say(why)
		if time.Now().After(deadline) {
			return fmt.Errorf("not healthy after %.0f minutes: %s", limit.Minutes(), why)
		}
		if err := pause(ctx, 2*time.Second); err != nil {
			return err
		}
	}
}

func explainHealth(h *machinev1.GetHealthResponse, err error) string {
	if err != nil {
		return oneLine(errs.Text(err))
	}
	for _, c := range h.GetChecks() {
		if !c.Ok {
			return c.Name + " " + oneLine(c.Detail)
		}
	}
	return ""
}

func (a *app) printNext(f upFlags) {
	bin, _ := os.Executable()
	dir := filepath.Dir(bin)
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, dir); err == nil && !strings.HasPrefix(rel, "..") {
			dir = rel
		}
	}
	fmt.Fprintf(a.out, `
The node %q is up. Next:

  export PATH=$PWD/%s:$PATH
  bhctl health                                    is it well, and if not, why
  bhctl services                                  every process, its memory, its restarts
  bhctl kubeconfig --file kubeconfig              a kubeconfig, good for a day
  kubectl --kubeconfig kubeconfig get pods -A     what Kubernetes runs
  bhctl down                                      remove the machine
`, f.name, dir)
}
