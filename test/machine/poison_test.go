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

// impatient is a node in no cluster that waits for a minute only for a version to prove itself.
const impatient = "apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: poisoned\n---\napiVersion: bulkhead.dev/v1\nkind: Update\nhealth: [api, config]\npatience: 1\n"

// backLimit is how long after its last try has begun a bad version may keep the old one from answering.
const backLimit = 3 * time.Minute

// rollback reports whether everything is tried that takes long: "make test-rollback".
func rollback() bool { return os.Getenv("BULKHEAD_ROLLBACK") != "" }

// hasty is for work on these tests: a bad version has one try only, and no limit of time, for other machines run here too; few good ones follow one another.
func hasty() bool { return os.Getenv("BULKHEAD_HASTY") != "" }

// TestPoison installs versions of which each has one thing wrong with it. Every one gives way to the old version by itself, within its three tries, and the node then
// says why in one sentence; what is on the disk is as it was.
func TestPoison(t *testing.T) {
	n := newNode(t)
	m := n.upFirmware(t, n.build(t, otherImage{version: firstVersion}), impatient, 2048, secureCPUs, "--no-bootstrap")
	generations := n.run(t, "bhctl", "get", "generations", "-o", "json")
	n.encrypted(t)
	only := os.Getenv("BULKHEAD_POISON") // for work on some: a pattern of their names
	for i, p := range poisons {
		if !rollback() && !p.quick && only == "" || !regexp.MustCompile(only).MatchString(p.name) {
			continue
		}
		if !t.Run(p.name, func(t *testing.T) {
			n.givesWay(t, m, p, n.bundleOf(t, p, version(i), false), version(i))
			n.runs(t, "9.0.0", generations)
		}) {
			t.FailNow() // the others would begin from nobody knows where
		}
	}
}

// upFirmware boots an image as a real machine does, with Secure Boot and TPM, and QEMU's events to be read.
func (n *node) upFirmware(t *testing.T, image, documents string, memory, cpus int, more ...string) qemu.Machine {
	t.Helper()
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	m, err := qemu.New(n.name)
	if err != nil {
		t.Fatal(err)
	}
	m.Memory, m.CPUs, m.Firmware, m.SecureBoot, m.TPM, m.DiskSize = memory, cpus, qemu.UEFI, true, true, 10<<30
	m.Forwards = []qemu.Forward{{Name: "api", Host: n.apiPort, Guest: 50000}, {Name: "gateway", Host: n.gatewayPort, Guest: 50001}, {Name: "kubernetes", Host: n.kubePort, Guest: 6443}, {Name: "pod", Host: n.nodePort, Guest: 30080}}
	m.Extra = []string{"-qmp", "unix:" + eventSocket + ",server=on,wait=off"}
	if err := m.Create(image, []byte(cutKey)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(file, []byte(documents), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"up", "--name", n.name, "--image", image, "-f", file}, more...)
	out, err := n.try(t.Context(), 25*time.Minute, "bhctl", args...)
	if err != nil {
		t.Fatalf("bhctl up: %v", err)
	}
	if key := recoveryKey.FindStringSubmatch(out); key == nil {
		t.Fatalf("bhctl up shows no recovery key:\n%s", out)
	}
	return m
}

// givesWay upgrades to a version that must not stay, and judges how the node comes back.
func (n *node) givesWay(t *testing.T, m qemu.Machine, p poison, bundle, version string) {
	t.Helper()
	args, tries := []string{"upgrade", "--image", bundle}, 3
	if hasty() {
		tries = 1
	}
	outside := p.rot || hasty()
	if outside {
		if out, err := n.try(t.Context(), 5*time.Minute, "bhctl", append(args, "--no-reboot")...); err != nil {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
		n.off(t, m)
		if p.rot {
			n.rot(t, m)
		}
		if hasty() {
			n.lastTry(t, m)
		}
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	w := n.watch(t, m)
	if outside {
		n.left(t, version)
	} else {
		out, err := n.try(t.Context(), 20*time.Minute, "bhctl", args...)
		if err == nil || !strings.Contains(err.Error(), version+" was left") {
			t.Fatalf("bhctl upgrade: %v\n%s", err, out)
		}
	}
	boots := w.boots(t)
	if len(boots) != tries+1 {
		t.Errorf("%d starts of the machine, want %d tries and the old version: %v", len(boots), tries, boots)
	}
	if len(boots) < 2 {
		t.Fatal("no tries were seen")
	}
	last, back := boots[len(boots)-2], boots[len(boots)-1]
	took := back.answered.Sub(last.began)
	t.Logf("» %s: %s after the last try began the old version answers; the try took %s, all tries %s", p.name, took.Round(time.Second), back.began.Sub(last.began).Round(time.Second), back.began.Sub(boots[0].began).Round(time.Second))
	if took > backLimit && !hasty() {
		t.Errorf("back after %s, want at most %s", took, backLimit)
	}
	n.explains(t, p, version)
}

// left waits until the node runs again and has found out why a version was left.
func (n *node) left(t *testing.T, version string) {
	t.Helper()
	eventually(t, 15*time.Minute, version+" was left", func() error {
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "--timeout", "5s", "get", "slots")
		if err == nil && !regexp.MustCompile(regexp.QuoteMeta(version)+` +failed`).MatchString(out) {
			err = fmt.Errorf("slots:\n%s", out)
		}
		return err
	})
}

// explains wants the reason in "bhctl why", in the history, and as an event.
func (n *node) explains(t *testing.T, p poison, version string) {
	t.Helper()
	var out string
	eventually(t, time.Minute, "the reason is known", func() (err error) {
		if out, err = n.try(t.Context(), 20*time.Second, "bhctl", "why"); strings.Contains(out, version+" was left after 3 tries") {
			return nil
		}
		return fmt.Errorf("bhctl why: %w\n%s", err, out)
	})
	line := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(version) + ` was left after 3 tries, .*$`).FindString(out)
	t.Logf("» %s", line)
	if !regexp.MustCompile(p.why).MatchString(line) {
		t.Errorf("bhctl why says %q, want %q; all of it:\n%s", line, p.why, out)
	}
	if events := n.run(t, "bhctl", "events"); !regexp.MustCompile(regexp.QuoteMeta(version) + ` was left after 3 tries: .*` + p.why).MatchString(events) {
		t.Errorf("no event says why:\n%s", events)
	}
	n.remembers(t, `failed +`+regexp.QuoteMeta(version)+` .*`+p.why)
}

// lastTry takes two tries from the version that was installed, on the disk of a machine that is off.
func (n *node) lastTry(t *testing.T, m qemu.Machine) {
	t.Helper()
	esp := &machineESP{n: n, m: m, mtools: filepath.Join(m.Dir, "disk.raw") + "@@1M"}
	name := regexp.MustCompile(`EFI/Linux/(\S+)\+3\.efi`).FindStringSubmatch(esp.tool(t, "mdir", "-b", "-i", esp.mtools, "::/EFI/Linux"))
	if name == nil {
		t.Fatal("no version has three tries")
	}
	esp.tool(t, "mren", "-i", esp.mtools, "::/EFI/Linux/"+name[1]+"+3.efi", name[1]+"+1-2.efi")
}

// rot changes one bit of the file system's first block in the slot that does not run, on the disk of a machine that is off.
func (n *node) rot(t *testing.T, m qemu.Machine) {
	t.Helper()
	disk := openDisk(t, m)
	const at = 8 // the time of a squashfs: not even its own magic would show
	b, where := make([]byte, 1), disk.partition(t, "ROOT-B").Start()+at
	if _, err := disk.file.ReadAt(b, where); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := disk.file.WriteAt(b, where); err != nil {
		t.Fatal(err)
	}
}
