package networkd

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/bulkhead-os/bulkhead/internal/reconcile"
)

const (
	firewallFresh = 20 * time.Second // how long a reading of the firewall may be used; others do not change networkd's chains
	execTimeout   = 20 * time.Second // under emulation a program takes long to start
	maxSave       = 4 << 20          // bytes of iptables-save
)

// firewall is the real one. It reads with iptables-save and builds chains with iptables-restore, because each of these is one
// look and one transaction, and uses go-iptables for the rest. Programs run as networkd itself: the nf_tables flavour needs
// NET_ADMIN and no lock file.
type firewall struct {
	families []Family

	mu     sync.Mutex
	tables []Table   // guarded by mu; not changed in place
	readAt time.Time // guarded by mu; zero: read again
	failed bool      // guarded by mu; a chain could not be built or entered since the last reading
	tools  map[Family]*iptables.IPTables
}

func newFirewall() *firewall {
	f := &firewall{families: []Family{IPv4}, tools: map[Family]*iptables.IPTables{}}
	if _, err := os.Stat("/proc/self/net/if_inet6"); err == nil {
		f.families = append(f.families, IPv6)
	}
	return f
}

func (f *firewall) read(ctx context.Context) ([]Table, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.readAt.IsZero() && time.Since(f.readAt) < firewallFresh {
		return f.tables, nil
	}
	var tables []Table
	for _, family := range f.families {
		out, err := run(ctx, program(family)+"-save", "", "-c", "-t", "filter")
		if err != nil {
			return nil, fmt.Errorf("read firewall: %w", err)
		}
		t, err := parseSave(family, out)
		if err != nil {
			return nil, err
		}
		tables = append(tables, t)
	}
	f.tables, f.readAt, f.failed = tables, time.Now(), false
	return tables, nil
}

// do does one step. Once a new chain could not be built or entered, the old one stays until the next plan: steps that would open
// the firewall are skipped.
func (f *firewall) do(ctx context.Context, s Step) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.readAt = time.Time{}
	switch s.Op {
	case opChainBuild, opJumpAdd:
		err := f.install(ctx, s)
		f.failed = f.failed || err != nil
		return err
	}
	if f.failed {
		return reconcile.ErrSkipped
	}
	t, err := f.tool(s.Family)
	if err != nil {
		return err
	}
	if s.Op == opJumpDel {
		return gone(t.Delete("filter", "INPUT", "-j", s.Name))
	}
	chains, err := t.ListChains("filter")
	if err != nil || !slices.Contains(chains, s.Name) {
		return err
	}
	return gone(t.ClearAndDeleteChain("filter", s.Name))
}

func (f *firewall) install(ctx context.Context, s Step) error {
	if s.Op == opJumpAdd {
		t, err := f.tool(s.Family)
		if err != nil {
			return err
		}
		return t.Insert("filter", "INPUT", 1, "-j", s.Name)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*filter\n:%s - [0:0]\n", s.Name) // empties the chain if it is there, in the same transaction
	for _, r := range s.Rules {
		fmt.Fprintf(&b, "-A %s %s\n", s.Name, r)
	}
	b.WriteString("COMMIT\n")
	_, err := run(ctx, program(s.Family)+"-restore", b.String(), "--noflush", "--wait", "5")
	return err
}

// tool returns go-iptables for a family. It asks the program for its version, so it is made once.
func (f *firewall) tool(family Family) (*iptables.IPTables, error) {
	if t := f.tools[family]; t != nil {
		return t, nil
	}
	protocol := iptables.ProtocolIPv4
	if family == IPv6 {
		protocol = iptables.ProtocolIPv6
	}
	t, err := iptables.New(iptables.IPFamily(protocol), iptables.Timeout(5))
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", program(family), err)
	}
	f.tools[family] = t
	return t, nil
}

// gone makes removing what is not there a success.
func gone(err error) error {
	if e, ok := err.(*iptables.Error); ok && e.IsNotExist() {
		return nil
	}
	return err
}

func program(f Family) string {
	if f == IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// run runs one program to its end and returns what it printed.
func run(ctx context.Context, name, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &bounded{&stdout}, &bounded{&stderr}
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	if stdout.Len() >= maxSave {
		return "", fmt.Errorf("%s: printed more than %d bytes; somebody else has filled the filter table", name, maxSave)
	}
	return stdout.String(), nil
}

// bounded keeps the first maxSave bytes and drops the rest. The buffer is not embedded: os/exec would use its ReadFrom.
type bounded struct{ kept *bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), maxSave-b.kept.Len())])
	return len(p), nil
}
