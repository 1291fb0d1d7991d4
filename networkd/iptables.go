package networkd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
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

// firewall is the real one. It reads with iptables-save and builds, enters and deletes chains with iptables-restore, because each of
// these is one look and one transaction, and uses go-iptables for the rest. Programs run as networkd itself: the nf_tables flavour needs
// NET_ADMIN and no lock file.
type firewall struct {
	families []Family

	mu     sync.Mutex
	tables []Table   // guarded by mu; not changed in place
	pods   []Table   // guarded by mu; not changed in place; masquerading
	readAt time.Time // guarded by mu; zero: read again
	// failed has the parts of which a chain could not be built or entered since the last reading. Guarded by mu.
	failed map[Part]bool
	tools  map[Family]*iptables.IPTables
}

func newFirewall() *firewall {
	f := &firewall{families: []Family{IPv4}, tools: map[Family]*iptables.IPTables{}, failed: map[Part]bool{}}
	if _, err := os.Stat("/proc/self/net/if_inet6"); err == nil {
		f.families = append(f.families, IPv6)
	}
	return f
}

// read returns the tables of the families that can be read, and what is wrong with the others: no IPv6 must not mean no firewall for IPv4.
func (f *firewall) read(ctx context.Context) (tables, pods []Table, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.readAt.IsZero() && time.Since(f.readAt) < firewallFresh {
		return f.tables, f.pods, nil
	}
	var failed []error
	for _, family := range f.families {
		out, err := run(ctx, program(family)+"-save", "", "-c")
		var parts map[Part]Table
		if err == nil {
			parts, err = parseSave(family, out)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("read firewall: %w", err))
			continue
		}
		for part, list := range map[Part]*[]Table{Ingress: &tables, Masquerading: &pods} {
			t := parts[part]
			t.Family = family // a table that there is not yet is empty
			*list = append(*list, t)
		}
	}
	if len(failed) > 0 {
		f.readAt, f.failed = time.Time{}, map[Part]bool{}
		return tables, pods, errors.Join(failed...)
	}
	f.tables, f.pods, f.readAt, f.failed = tables, pods, time.Now(), map[Part]bool{}
	return tables, pods, nil
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
		f.failed[s.Part] = f.failed[s.Part] || err != nil
		return err
	}
	if f.failed[s.Part] {
		return reconcile.ErrSkipped
	}
	if s.Op == opChainDel {
		return restore(ctx, s.Family, s.Part, ":"+s.Name+" - [0:0]", "-X "+s.Name)
	}
	t, err := f.tool(s.Family)
	if err != nil {
		return err
	}
	return gone(t.Delete(places[s.Part].table, places[s.Part].hook, "-j", s.Name))
}

// install builds a chain, and enters it if the step says so, in one transaction.
func (f *firewall) install(ctx context.Context, s Step) error {
	lines := []string{":" + s.Name + " - [0:0]"}
	for _, r := range s.Rules {
		lines = append(lines, "-A "+s.Name+" "+r)
	}
	if s.Op == opJumpAdd {
		lines = append(lines, "-I "+places[s.Part].hook+" 1 -j "+s.Name)
	}
	return restore(ctx, s.Family, s.Part, lines...)
}

// restore changes a part's table in one transaction. A chain that is declared there is empty at first, whether it was there or not.
func restore(ctx context.Context, family Family, part Part, lines ...string) error {
	_, err := run(ctx, program(family)+"-restore", "*"+places[part].table+"\n"+strings.Join(lines, "\n")+"\nCOMMIT\n", "--noflush", "--wait", "5")
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
		return "", fmt.Errorf("%s: printed more than %d bytes; somebody else has filled its tables", name, maxSave)
	}
	return stdout.String(), nil
}

// bounded keeps the first maxSave bytes and drops the rest. The buffer is not embedded: os/exec would use its ReadFrom.
type bounded struct{ kept *bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), maxSave-b.kept.Len())])
	return len(p), nil
}
