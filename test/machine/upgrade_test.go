package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// provedBy is a node in no cluster, whose versions are good when the API answers and the configuration stands.
const provedBy = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: upgraded\n---\napiVersion: bulkhead.dev/v1\nkind: Update\nhealth: [api, config]\n"

// secureCPUs is for machines with Secure Boot: their firmware stores its variables in system management mode, where all processors wait for each other in loops. Emulated, two of them
// take most of a boot's time so.
const secureCPUs = 1

// recoveryKey is how bhctl shows it.
var recoveryKey = regexp.MustCompile(`(?m)^ +((?:[0-9A-Z]{4}-){7}[0-9A-Z]{4})$`)

// TestUpgrade is a node's life through firmware, Secure Boot and TPM: its volumes are encrypted and open by themselves for every signed version, a
// good version stays, a bad one gives way to the last good one, and on another machine nothing opens without the recovery key.
func TestUpgrade(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	first := n.build(t, otherImage{version: firstVersion})
	m, key := n.upSecure(t, first, provedBy, 2048)
	generations := n.run(t, "bhctl", "get", "generations", "-o", "json")
	n.encrypted(t)
	good := n.bundleOf(t, poison{}, "9.1.0", false)
	bad := n.bundleOf(t, poison{file: "init/pid1-ends"}, "9.2.0", false)

	t.Run("a good version stays", func(t *testing.T) {
		start := time.Now()
		out, err := n.try(t.Context(), 8*time.Minute, "bhctl", "upgrade", "--image", good)
		if err != nil || !strings.Contains(out, "9.1.0 runs and was found good") {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		t.Logf("» upgraded and found good after %s", time.Since(start).Round(time.Second))
		n.runs(t, "9.1.0", generations)
		n.remembers(t, `installed +9\.1\.0`, `started +9\.1\.0`, `good +9\.1\.0`)
	})
	t.Run("back by hand, and forward again", func(t *testing.T) {
		for _, to := range []string{firstVersion, "9.1.0"} {
			if out, err := n.try(t.Context(), 8*time.Minute, "bhctl", "rollback"); err != nil {
				t.Fatalf("bhctl rollback: %v\n%s", err, out)
			}
			n.runs(t, to, generations)
		}
	})
	t.Run("a bad version gives way", func(t *testing.T) {
		start := time.Now()
		out, err := n.try(t.Context(), 12*time.Minute, "bhctl", "upgrade", "--image", bad)
		if err == nil || !strings.Contains(err.Error(), "9.2.0 was left: the kernel panicked: Attempted to kill init!") || !strings.Contains(err.Error(), "the node runs 9.1.0 again") {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		t.Logf("» back after %s, three tries included", time.Since(start).Round(time.Second))
		n.runs(t, "9.1.0", generations)
		if out, _ := n.try(t.Context(), time.Minute, "bhctl", "why"); !strings.Contains(out, "9.2.0") {
			t.Errorf("bhctl why does not tell of the version that was left:\n%s", out)
		}
		n.remembers(t, `good +9\.1\.0`, `failed +9\.2\.0`)
	})
	t.Run("others agree", func(t *testing.T) {
		s := n.says(t)
		n.off(t, m)
		s.agree(t, m, filepath.Join(first, "db.crt"), key)
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.runs(t, "9.1.0", generations)
	})
	running := "9.1.0"
	t.Run("no key for what was changed", func(t *testing.T) { running = n.refusals(t, &m, running, generations) })
	t.Run("another machine's TPM", func(t *testing.T) {
		n.off(t, m)
		if err := os.RemoveAll(filepath.Join(m.Dir, "tpm")); err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		e := &machineESP{n: n, m: m}
		e.console(t, 3*time.Minute, "STATE is locked", "This node is now owned")
		if out, err := n.try(t.Context(), time.Minute, "bhctl", "--timeout", "5s", "get", "config"); err == nil {
			t.Errorf("the node gives its configuration away:\n%s", out)
		}
		if out, err := n.unlock(t, strings.Repeat("0000-", 7)+"0000"); err == nil {
			t.Errorf("a wrong key unlocks:\n%s", out)
		}
		if out, err := n.unlock(t, key); err != nil {
			t.Fatalf("bhctl unlock: %v\n%s", err, out)
		}
		eventually(t, 2*time.Minute, "the node knows its owner again", func() error {
			_, err := n.try(t.Context(), 20*time.Second, "bhctl", "get", "config")
			return err
		})
		n.runs(t, running, generations)
	})
}

// upSecure boots an image as the README's tour does, configured, in no cluster, and returns its recovery key.
func (n *node) upSecure(t *testing.T, image, documents string, memory int) (qemu.Machine, string) {
	t.Helper()
	document := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(document, []byte(documents), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := n.try(t.Context(), 6*time.Minute, "bhctl", "up", "--no-bootstrap", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
		"--kubernetes-port", fmt.Sprint(n.kubePort), "--image", image, "--memory", fmt.Sprint(memory), "--cpus", fmt.Sprint(secureCPUs), "--firmware", "uefi", "--secure-boot", "--tpm", "-f", document)
	if err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
	key := recoveryKey.FindStringSubmatch(out)
	if key == nil {
		t.Fatalf("bhctl up shows no recovery key:\n%s", out)
	}
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	return m, key[1]
}

// encrypted wants both volumes encrypted and mounted.
func (n *node) encrypted(t *testing.T) {
	t.Helper()
	eventually(t, 2*time.Minute, "the volumes are encrypted and mounted", func() error {
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "get", "volumes")
		if err == nil && (strings.Count(out, "luks2") != 2 || strings.Count(out, "mounted") != 2) {
			err = fmt.Errorf("volumes:\n%s", out)
		}
		return err
	})
}

// runs wants a version to run, found good, with the configuration and the volumes as they were.
func (n *node) runs(t *testing.T, version, generations string) {
	t.Helper()
	line := regexp.MustCompile(`(?m)^[AB] +` + regexp.QuoteMeta(version) + ` +good +yes`) // slot, version, status, running
	eventually(t, 3*time.Minute, version+" runs and is good", func() error {
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "get", "slots")
		if err == nil && !line.MatchString(out) {
			err = fmt.Errorf("slots:\n%s", out)
		}
		return err
	})
	if out := n.run(t, "bhctl", "get", "generations", "-o", "json"); out != generations {
		t.Errorf("generations %s, were %s", out, generations)
	}
	n.encrypted(t)
}

// remembers wants lines of the versions' history, which outlives the versions.
func (n *node) remembers(t *testing.T, lines ...string) {
	t.Helper()
	out := n.run(t, "bhctl", "get", "versions")
	for _, l := range lines {
		if !regexp.MustCompile(l).MatchString(out) {
			t.Errorf("the history has no line %q:\n%s", l, out)
		}
	}
}

func (n *node) unlock(t *testing.T, key string) (string, error) {
	t.Helper()
	cmd := n.command(t.Context(), "bhctl", "unlock", fmt.Sprintf("127.0.0.1:%d", n.apiPort))
	cmd.Stdin = strings.NewReader(key + "\n")
	out, err := cmd.CombinedOutput()
	return string(out), err
}
