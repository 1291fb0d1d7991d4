package machine

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// refusals change what the disk's key is bound to, one thing at a time, on a machine that is off. Each time no key is had: the node knows nobody, gives nothing
// away, and the console says why. Undone, everything is as it was. It ends with a version of epoch 2, which it installs, and returns that one's name.
func (n *node) refusals(t *testing.T, m *qemu.Machine, running, generations string) string {
	t.Run("words added to the command line", func(t *testing.T) {
		n.off(t, *m)
		plain := m.Extra
		m.Extra = append(slices.Clone(plain), "-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=bulkhead.debug=1")
		n.staysLocked(t, m, `something was added to the image's command line`)
		m.Extra = plain
	})
	t.Run("an edited header", func(t *testing.T) {
		header := n.header(t, *m, nil)
		n.header(t, *m, spoilToken(t, n, header))
		n.staysLocked(t, m, `tpm: `)
		n.header(t, *m, header)
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.runs(t, running, generations)
	})
	const next = "9.3.0"
	t.Run("an image of an older epoch", func(t *testing.T) {
		dir := n.build(t, otherImage{version: next, epoch: 2})
		if out, err := n.try(t.Context(), 8*time.Minute, "bhctl", "upgrade", "--image", dir); err != nil {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		n.runs(t, next, generations)
		const why = "of epoch 1, this node starts only 2 and later"
		eventually(t, time.Minute, "the older version is refused", func() error {
			_, err := n.try(t.Context(), 30*time.Second, "bhctl", "rollback")
			if err != nil && strings.Contains(err.Error(), why) {
				return nil
			}
			return err
		})
		n.off(t, *m)
		// Who has the disk renames what systemd-boot sees.
		esp := &machineESP{n: n, m: *m, mtools: filepath.Join(m.Dir, "disk.raw") + "@@1M"}
		old := regexp.MustCompile(`EFI/Linux/(bulkhead_\d+_` + regexp.QuoteMeta(running) + `\.efi)`).FindStringSubmatch(esp.tool(t, "mdir", "-b", "-i", esp.mtools, "::/EFI/Linux"))
		if old == nil {
			t.Fatalf("no kernel of %s", running)
		}
		first := "bulkhead_9999_" + running + ".efi"
		esp.tool(t, "mren", "-i", esp.mtools, "::/EFI/Linux/"+old[1], first)
		n.staysLocked(t, m, `the image is of epoch 1, and this machine has run one of epoch 2: start a newer image`)
		esp.tool(t, "mren", "-i", esp.mtools, "::/EFI/Linux/"+first, old[1])
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.runs(t, next, generations)
	})
	return next
}

// staysLocked starts a machine that is off, wants its STATE to stay locked for a reason that the console shows, and turns it off.
func (n *node) staysLocked(t *testing.T, m *qemu.Machine, why string) {
	t.Helper()
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	e := &machineESP{n: n, m: *m}
	// All of it: a slow machine's console shows the first line long before the last one.
	text := e.console(t, 5*time.Minute, `STATE is locked, and nothing on this machine opens it\.\r?\n(.*\r?\n)?  On your own machine, with its recovery key:`, "This node is now owned|Claim code")
	if !regexp.MustCompile(`STATE is locked, and nothing on this machine opens it\.\r?\n .*` + why).MatchString(text) {
		t.Errorf("the console does not say %q:\n%s", why, text)
	}
	var asked sync.WaitGroup // each waits for its time-out
	for _, args := range [][]string{{"get", "config"}, {"get", "volumes"}, {"kubeconfig"}, {"token"}} {
		asked.Go(func() {
			if out, err := n.try(t.Context(), time.Minute, "bhctl", append([]string{"--timeout", "5s"}, args...)...); err == nil {
				t.Errorf("bhctl %s: the node gives away:\n%s", strings.Join(args, " "), out)
			}
		})
	}
	asked.Wait()
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// header writes the 16 MiB before STATE's data, if there are any to write, and returns what was there.
func (n *node) header(t *testing.T, m qemu.Machine, with []byte) []byte {
	t.Helper()
	disk := openDisk(t, m)
	state := disk.partition(t, "STATE")
	was := make([]byte, 16<<20)
	if _, err := disk.file.ReadAt(was, state.Start()); err != nil {
		t.Fatal(err)
	}
	if with != nil {
		if _, err := disk.file.WriteAt(with, state.Start()); err != nil {
			t.Fatal(err)
		}
	}
	return was
}

// spoilToken lets cryptsetup change one bit of what the TPM has sealed, in a header that is right in all else, checksums too.
func spoilToken(t *testing.T, n *node, header []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	file, token := filepath.Join(dir, "header"), filepath.Join(dir, "token")
	if err := os.WriteFile(file, header, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 64<<20); err != nil { // cryptsetup wants some data behind it
		t.Fatal(err)
	}
	e := &machineESP{n: n}
	var dump struct {
		Tokens map[string]map[string]any
	}
	if err := json.Unmarshal([]byte(e.tool(t, "cryptsetup", "luksDump", "--dump-json-metadata", file)), &dump); err != nil {
		t.Fatal(err)
	}
	for id, fields := range dump.Tokens {
		sealed, ok := fields["private"].(string)
		if fields["type"] != "bulkhead-tpm2" || !ok {
			continue
		}
		at := len(sealed) / 2
		other := "A"
		if sealed[at] == 'A' {
			other = "B"
		}
		fields["private"] = sealed[:at] + other + sealed[at+1:]
		text, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(token, text, 0o600); err != nil {
			t.Fatal(err)
		}
		e.tool(t, "cryptsetup", "token", "remove", "--token-id", id, file)
		e.tool(t, "cryptsetup", "token", "import", "--token-id", id, "--json-file", token, file)
		spoilt, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return spoilt[:len(header)]
	}
	t.Fatalf("no token of the TPM in %v", dump.Tokens)
	return nil
}
