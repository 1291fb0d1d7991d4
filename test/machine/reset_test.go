package machine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/storaged/luks"
)

// encryptedNode is a node in no cluster that insists on encryption by the TPM.
const encryptedNode = provedBy + "---\napiVersion: bulkhead.dev/v1\nkind: Storage\nencryption: luks2\nkeys:\n  - kind: tpm\n"

// claimCode is how the console shows it.
var claimCode = regexp.MustCompile(`Claim code:  ([0-9A-Z-]+)`)

// TestReset ends two lives of a machine: after the first its disk has no volume and nobody's credentials count, and a second owner claims it and
// encrypts anew with the same TPM; after the other the firmware finds nothing to start. In between the firmware learns its keys from the node.
func TestReset(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	image := n.build(t, otherImage{version: "9.1.0"})
	m, key := n.upSecure(t, image, encryptedNode, 1024)
	e := &machineESP{n: n, m: m, mtools: filepath.Join(m.Dir, "disk.raw") + "@@1M"}
	n.encrypted(t)
	volumes := n.volumesOf(t, m)
	if len(volumes) != 2 {
		t.Fatalf("volumes on the disk: %v", volumes)
	}
	n.resetRefused(t)

	out, err := n.try(t.Context(), 3*time.Minute, "bhctl", "reset", "--yes", "--power-off")
	if err != nil || strings.Count(out, "no key opens it") != 2 || !strings.Contains(out, "The TPM has no owner any more") {
		t.Fatalf("bhctl reset: %v\n%s", err, out)
	}
	t.Logf("» bhctl reset:\n%s", out)
	if err := m.Wait(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	n.noVolumes(t, m, volumes)

	t.Run("a second life", func(t *testing.T) {
		e.withoutKeys(t)
		second := n.claimedAgain(t, e, key)
		t.Run("Secure Boot's keys", func(t *testing.T) { n.enrols(t, e, second) })
	})
	t.Run("without a system", func(t *testing.T) {
		out, err := n.try(t.Context(), 3*time.Minute, "bhctl", "reset", "--yes", "--remove-os")
		if err != nil || !strings.Contains(out, "The TPM has no owner any more") || !strings.Contains(out, "nothing on /dev/vda can be started any more") {
			t.Fatalf("bhctl reset: %v\n%s", err, out)
		}
		e.console(t, 3*time.Minute, `(restarting[\s\S]*){2}No bootable option or device was found`, `(restarting[\s\S]*){2}root verified`)
		if err := m.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		noSystem(t, m, image)
	})
}

// resetRefused asks for a reset as those who may not, and without the node's name.
func (n *node) resetRefused(t *testing.T) {
	t.Helper()
	token := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "operator"))
	if out, err := n.try(t.Context(), time.Minute, "bhctl", "--token", token, "reset", "--yes"); err == nil || !strings.Contains(err.Error(), "needs role admin") {
		t.Errorf("an operator resets: %v\n%s", err, out)
	}
	cmd := n.command(t.Context(), "bhctl", "reset")
	cmd.Stdin = strings.NewReader("another\n")
	if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("that is not the name; nothing was changed")) {
		t.Errorf("reset with another name: %v\n%s", err, out)
	}
	n.encrypted(t)
}

// volumesOf returns the partitions STATE and VAR of a machine's disk.
func (n *node) volumesOf(t *testing.T, m qemu.Machine) (out []gpt.Partition) {
	t.Helper()
	f, err := os.Open(filepath.Join(m.Dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, _, err := gpt.Read(f, m.DiskSize)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"STATE", "VAR"} {
		if p, ok := table.ByName(name); ok {
			out = append(out, p)
		}
	}
	return out
}

// noVolumes wants nothing to be left where volumes were, by our own eyes and by cryptsetup's.
func (n *node) noVolumes(t *testing.T, m qemu.Machine, were []gpt.Partition) {
	t.Helper()
	if left := n.volumesOf(t, m); len(left) > 0 {
		t.Errorf("in the table there are still %v", left)
	}
	disk, err := os.Open(filepath.Join(m.Dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	for _, p := range were {
		head := make([]byte, luks.DataOffset)
		if _, err := disk.ReadAt(head, p.Start()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := luks.Read(bytes.NewReader(head)); !errors.Is(err, luks.ErrNone) || len(bytes.Trim(head, "\x00")) > 0 {
			t.Errorf("%s: header or keyslots are left: %v", p.Name, err)
		}
		file := filepath.Join(t.TempDir(), p.Name)
		if err := os.WriteFile(file, head, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := n.shell(t, "", "cryptsetup", "repair", "--batch-mode", file); err == nil {
			t.Errorf("cryptsetup repairs %s:\n%s", p.Name, out)
		}
	}
}

// withoutKeys gives the machine a firmware in setup mode, and a boot loader that has no keys to enrol by itself.
func (e *machineESP) withoutKeys(t *testing.T) {
	t.Helper()
	empty, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(e.m.Dir, qemu.VarsFile), empty, 0o600); err != nil {
		t.Fatal(err)
	}
	e.tool(t, "mdel", "-i", e.mtools, "::/loader/keys/auto/*.auth")
}

// claimedAgain starts the machine without the key that its first owner put into its firmware, becomes the second owner, and returns their
// recovery key.
func (n *node) claimedAgain(t *testing.T, e *machineESP, key string) (second string) {
	t.Helper()
	if err := os.Remove(filepath.Join(e.m.Dir, qemu.ClaimKeyFile)); err != nil {
		t.Fatal(err)
	}
	if err := e.m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	code := claimCode.FindStringSubmatch(e.console(t, 3*time.Minute, claimCode.String(), "STATE is locked"))
	if out, err := n.try(t.Context(), time.Minute, "bhctl", "--timeout", "10s", "get", "config"); err == nil {
		t.Errorf("the first owner's credentials count:\n%s", out)
	}
	if out, err := n.unlock(t, key); err == nil {
		t.Errorf("the first owner's recovery key opens something:\n%s", out)
	}
	eventually(t, 2*time.Minute, "the node is claimed", func() error {
		_, err := n.try(t.Context(), time.Minute, "bhctl", "claim", fmt.Sprintf("127.0.0.1:%d", n.apiPort), "--code", code[1], "--as", "second")
		return err
	})
	out, err := n.try(t.Context(), 3*time.Minute, "bhctl", "--context", "second", "apply", "-f", filepath.Join(n.dir, "node.yaml"))
	shown := recoveryKey.FindStringSubmatch(out)
	if err != nil || shown == nil || shown[1] == key {
		t.Fatalf("bhctl apply: %v\n%s", err, out)
	}
	n.run(t, "bhctl", "config", "use", "second")
	n.encrypted(t)
	eventually(t, time.Minute, "storaged has done all, taking the TPM included", func() error {
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "health") // the node is in no cluster, and not healthy
		if regexp.MustCompile(`storaged\.converged +yes`).MatchString(out) {
			return nil
		}
		return fmt.Errorf("%w\n%s", err, out)
	})
	return shown[1]
}

// enrols writes the image's keys into the firmware: from the next start on Secure Boot is on, and STATE opens by the recovery key only.
func (n *node) enrols(t *testing.T, e *machineESP, key string) {
	n.secureBoot(t, "off", "on")
	if out, err := n.try(t.Context(), time.Minute, "bhctl", "secureboot", "enroll", "--yes"); err == nil || !strings.Contains(err.Error(), "the next start needs the recovery key") {
		t.Errorf("enrolled without a word about STATE: %v\n%s", err, out)
	}
	out, err := n.try(t.Context(), time.Minute, "bhctl", "secureboot", "enroll", "--yes", "--allow-locked")
	if err != nil || !strings.Contains(out, "STATE will be locked then") {
		t.Fatalf("bhctl secureboot enroll: %v\n%s", err, out)
	}
	if out, err := n.try(t.Context(), time.Minute, "bhctl", "secureboot", "enroll", "--yes", "--allow-locked"); err == nil || !strings.Contains(err.Error(), "not in setup mode") {
		t.Errorf("enrolled once more: %v\n%s", err, out)
	}
	n.run(t, "bhctl", "reboot")
	e.console(t, 3*time.Minute, "restarting[\\s\\S]*STATE is locked", denied)
	if out, err := n.unlock(t, key); err != nil {
		t.Fatalf("bhctl unlock: %v\n%s", err, out)
	}
	n.secureBoot(t, "on", "off")
	if log := n.run(t, "bhctl", "dmesg"); !strings.Contains(log, "Secure boot enabled") {
		t.Error("the kernel does not say that Secure Boot is on")
	}
	sealed := regexp.MustCompile(`(?m)^(STATE-\d+) .* tpm `).FindStringSubmatch(n.run(t, "bhctl", "storage", "keys", "list"))
	if sealed == nil {
		t.Fatal("STATE has no key in the TPM")
	}
	n.run(t, "bhctl", "storage", "keys", "rotate", sealed[1])
}

// secureBoot waits until the node says of the firmware that Secure Boot and setup mode are so.
func (n *node) secureBoot(t *testing.T, secure, setup string) {
	t.Helper()
	eventually(t, 2*time.Minute, "Secure Boot is "+secure, func() error {
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "get", "security", "-o", "json")
		if err != nil {
			return err
		}
		var all []struct{ Name, Actual string }
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			return err
		}
		got := map[string]string{}
		for _, s := range all {
			got[s.Name] = s.Actual
		}
		if got["firmware.secure-boot"] != secure || got["firmware.setup-mode"] != setup {
			return errors.New(out)
		}
		return nil
	})
}

// noSystem wants neither a table on a machine's disk nor a signature where the image had its partitions.
func noSystem(t *testing.T, m qemu.Machine, image string) {
	t.Helper()
	disk, err := os.Open(filepath.Join(m.Dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if table, _, err := gpt.Read(disk, m.DiskSize); !errors.Is(err, gpt.ErrNone) {
		t.Errorf("the disk has a table: %v, %v", table.Partitions, err)
	}
	file, err := os.Open(filepath.Join(image, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	table, _, err := gpt.Read(file, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range table.Partitions {
		start := make([]byte, 4096)
		if _, err := disk.ReadAt(start, p.Start()); err != nil || len(bytes.Trim(start, "\x00")) > 0 {
			t.Errorf("%s starts with %q, %v", p.Name, start[:64], err)
		}
	}
}
