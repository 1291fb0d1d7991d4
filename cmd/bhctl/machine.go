package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/deploy/qemu/lan"
	"github.com/bulkhead-os/bulkhead/internal/claim"
)

// otherClocks says that a machine's clocks are not as asked for: nothing would tell, and they cannot change while anything is on its disk.
func otherClocks(f upFlags, m qemu.Machine) error {
	return fmt.Errorf("--slow-clocks %d: machine %s was made with %d (0: none), and machines of one cluster have one time: leave it out, or remove what is there (bhctl down --name %s)", f.slow, m.Name, m.Slow, f.name)
}

// openMachine returns the machine of that name, made if there is none. One that is there keeps what it was made with; to ask for another
// firmware than it has is an error, because nothing would tell.
func openMachine(f upFlags) (*qemu.Machine, error) {
	if f.secureBoot && f.firmware != qemu.UEFI {
		return nil, fmt.Errorf("--secure-boot needs --firmware %s: it is the firmware that refuses", qemu.UEFI)
	}
	m, err := qemu.Load(f.name)
	if err == nil {
		if f.firmware != "" && f.firmware != m.Firmware || f.secureBoot && !m.SecureBoot || f.tpm && !m.TPM || f.install && !m.Medium {
			return nil, fmt.Errorf("machine %s was made with another firmware, without a TPM or without an installation medium: bhctl down --name %s removes it, with all that is on it", m.Name, m.Name)
		}
		if m.LAN != f.lan {
			return nil, fmt.Errorf("machine %s was made for another cluster (%q): bhctl down --name %s removes it", m.Name, m.LAN, m.Name)
		}
		if f.slow != 0 && f.slow != m.Slow {
			return nil, otherClocks(f, m)
		}
		return &m, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if m, err = qemu.New(f.name); err != nil {
		return nil, err
	}
	m.Memory, m.CPUs, m.DiskSize = f.memoryMiB, f.cpus, int64(f.diskGiB)<<30
	m.LAN, m.LANAddress = f.lan, f.lanAddress
	if m.Slow = f.slow; m.Slow != 0 {
		m.SlowSince = f.slowSince
	}
	m.Firmware, m.SecureBoot, m.TPM, m.Medium = f.firmware, f.secureBoot, f.tpm, f.install
	m.Forwards = []qemu.Forward{
		{Name: "api", Host: f.apiPort, Guest: 50000, Flag: "--api-port"},
		{Name: "gateway", Host: f.gatewayPort, Guest: 50001, Flag: "--gateway-port"},
		{Name: "kubernetes", Host: f.kubernetesPort, Guest: 6443, Flag: "--kubernetes-port"},
	}
	for _, s := range f.forwards {
		fw := qemu.Forward{Name: "forward", Flag: "--forward"}
		if _, err := fmt.Sscanf(s, "%d:%d", &fw.Host, &fw.Guest); err != nil {
			return nil, fmt.Errorf("--forward: %q is not HOSTPORT:NODEPORT, for example 8080:30080", s)
		}
		m.Forwards = append(m.Forwards, fw)
	}
	if err := errors.Join(m.Validate(), m.Check()); err != nil {
		return nil, err
	}
	key, err := claim.NewCode(rand.Reader)
	if err != nil {
		return nil, err
	}
	image, err := filepath.Abs(f.image)
	if err != nil {
		return nil, err
	}
	return &m, m.Create(image, []byte(key))
}

// claimKey is what the machine's firmware shows the guest.
func claimKey(m *qemu.Machine) (string, error) {
	key, err := os.ReadFile(filepath.Join(m.Dir, qemu.ClaimKeyFile))
	return strings.TrimSpace(string(key)), err
}

func (a *app) downCmd() *cobra.Command {
	var name string
	c := &cobra.Command{Use: "down", Short: "Remove a local machine or cluster, its disks and its context", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		members, err := qemu.Members(name)
		if err != nil {
			return err
		}
		for _, m := range members {
			if err := removeMachine(ctx, m.Name); err != nil {
				return err
			}
		}
		if err := errors.Join(removeMachine(ctx, name), qemu.StopLAN(ctx, name)); err != nil {
			return err
		}
		cfg, err := loadContexts()
		if err != nil {
			return err
		}
		if _, ok := cfg.Contexts[name]; !ok {
			return nil
		}
		delete(cfg.Contexts, name)
		if cfg.Current == name {
			cfg.Current = ""
		}
		return cfg.save()
	}}
	c.Flags().StringVar(&name, "name", "local", "name of the machine or cluster")
	return c
}

func removeMachine(ctx context.Context, name string) error {
	m, err := qemu.Load(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := m.Stop(ctx, 0); err != nil {
		return err
	}
	return m.Remove()
}

func (a *app) statusCmd() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "List local machines", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		names, err := qemu.List()
		if err != nil {
			return err
		}
		type row struct {
			Name  string    `json:"name"`
			State string    `json:"state"`
			PID   int       `json:"pid"`
			Since time.Time `json:"since"`
			API   string    `json:"api"`
			Dir   string    `json:"dir"`
			// The cluster's network, and the address in it; left out for a single machine.
			LAN     string       `json:"lan,omitempty"`
			Address netip.Prefix `json:"lan_address,omitzero"`
			// Plugged says that the network's switch carries the machine's frames.
			Plugged bool `json:"plugged,omitempty"`
		}
		rows := []row{}
		plugged := pluggedIn(cmd.Context())
		for _, n := range names {
			m, err := qemu.Load(n)
			if err != nil {
				return err
			}
			s := m.Status()
			rows = append(rows, row{n, string(s.State), s.PID, s.Since, fmt.Sprintf("127.0.0.1:%d", m.Port(50000)), m.Dir, m.LAN, m.LANAddress, plugged(m)})
		}
		return a.print(rows, func() *table {
			t := newTable("NAME", "STATE", "PID", "UP FOR", "API", "LAN", "FOLDER")
			for _, r := range rows {
				network := "-"
				if r.LAN != "" {
					network = r.LAN + " " + r.Address.Addr().String()
				}
				if r.LAN != "" && r.State == string(qemu.Running) && !r.Plugged {
					network += " (unplugged: bhctl up starts the switch)"
				}
				t.add(r.Name, r.State, fmt.Sprint(r.PID), age(r.Since), r.API, network, r.Dir)
			}
			return t
		})
	}}
}

// pluggedIn returns a function that tells whether a machine is connected to its network; each network's switch is asked once.
func pluggedIn(ctx context.Context) func(qemu.Machine) bool {
	ports := map[string][]lan.PortStatus{}
	return func(m qemu.Machine) bool {
		if m.LAN == "" {
			return false
		}
		if _, asked := ports[m.LAN]; !asked {
			ports[m.LAN] = nil
			if c, err := qemu.LANControl(m.LAN); err == nil {
				st, _ := c.Status(ctx) // a switch that does not answer has no ports
				ports[m.LAN] = st.Ports
			}
		}
		return slices.ContainsFunc(ports[m.LAN], func(p lan.PortStatus) bool { return p.Name == m.Name })
	}
}
