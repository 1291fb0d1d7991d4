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

// installedTo is provedBy on a disk that a selector means.
func installedTo(selector string) string {
	return strings.Replace(provedBy, "upgraded", "installed", 1) + "---\napiVersion: bulkhead.dev/v1\nkind: Storage\ninstall:\n  disk: " + selector + "\n"
}

// TestInstall installs a machine as a person does who has the ISO on a stick: through firmware, Secure Boot and TPM, with bhctl and nothing else. The power is
// cut while it copies. Afterwards it runs from its disk, with the medium there and without, as it was configured and encrypted.
func TestInstall(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	image := n.build(t, otherImage{version: "9.0.0"})
	n.run(t, filepath.Join(n.root, "out/bin/mkimage"), "convert", "iso", image)
	up := func(document string) (string, error) {
		file := filepath.Join(n.dir, "node.yaml")
		if err := os.WriteFile(file, []byte(document), 0o600); err != nil {
			t.Fatal(err)
		}
		return n.try(t.Context(), 6*time.Minute, "bhctl", "up", "--install", "--no-bootstrap", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort),
			"--kubernetes-port", fmt.Sprint(n.kubePort), "--image", image, "--memory", "2048", "--cpus", fmt.Sprint(secureCPUs), "--secure-boot", "--tpm", "-f", file)
	}
	start := time.Now()
	for _, c := range []struct{ selector, want string }{
		{"{serial: S1*}", `no disk is like Storage.install.disk says (serial: S1*); correct it: there are /dev/vdb (size 10GiB, transport "virtio")`},
		{"{serial: medi*}", "is the medium that the system was started from; choose another disk with Storage.install.disk: there are /dev/vdb"},
	} {
		if _, err := up(installedTo(c.selector)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Fatalf("%s: %v", c.selector, err)
		}
	}
	t.Logf("» two disks refused %s after power-on", time.Since(start).Round(time.Second))
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	document := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(document, []byte(installedTo(`{size: ">= 5GiB"}`)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := n.run(t, "bhctl", "apply", "-f", document, "--dry-run"); !strings.Contains(out, "install root on /dev/vdb") || !strings.Contains(out, "luks format STATE on /dev/vdb6") {
		t.Errorf("the plan is\n%s", out)
	}
	out, err := n.try(t.Context(), 3*time.Minute, "bhctl", "apply", "-f", document, "--no-wait")
	if err != nil || recoveryKey.FindStringSubmatch(out) == nil {
		t.Fatalf("bhctl apply shows no recovery key: %v\n%s", err, out)
	}
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(m.Dir, "disk.raw")
	if out, _ := n.shell(t, "", "mdir", "-b", "-i", disk+"@@1M", "::/EFI/BOOT"); strings.Contains(out, "BOOTX64.EFI") {
		t.Error("the power was cut too late: the installation was over")
	}
	start = time.Now()
	if out, err = up(installedTo(`{size: ">= 5GiB"}`)); err != nil {
		t.Fatalf("after the cut: %v", err)
	}
	t.Logf("» goes on by itself after a power cut, and runs from its disk %s later:\n%s", time.Since(start).Round(time.Second), out)

	generations := n.run(t, "bhctl", "get", "generations", "-o", "json")
	n.installed(t, m, "/dev/vdb", generations) // the medium is /dev/vda, and has the same root
	if out := n.run(t, "bhctl", "get", "boots"); !strings.Contains(out, "restart: the system was installed on /dev/vdb") {
		t.Errorf("boots:\n%s", out)
	}
	n.run(t, "bhctl", "shutdown")
	if err := m.Wait(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	esp := &machineESP{n: n, m: m, kernel: "EFI/Linux/bulkhead_0001_9.0.0.efi", mtools: disk + "@@1M"}
	esp.judge(t)
	if err := m.Eject(); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	n.installed(t, m, "/dev/vda", generations)
}

// installed wants the node to run from a disk, all of it.
func (n *node) installed(t *testing.T, m qemu.Machine, disk, generations string) {
	t.Helper()
	n.runs(t, "9.0.0", generations)
	console, err := os.ReadFile(m.Console())
	if err != nil || !strings.Contains(string(console), "root verified (dm-verity, "+disk+"2)") {
		t.Errorf("the root is not %s2: %v", disk, err)
	}
	volumes := n.run(t, "bhctl", "get", "volumes")
	for _, v := range []string{"STATE +mounted +" + disk + "6", "VAR +mounted +" + disk + "7"} {
		if !regexp.MustCompile(v).MatchString(volumes) {
			t.Errorf("no %q in\n%s", v, volumes)
		}
	}
	if out := n.run(t, "bhctl", "get", "disks"); !regexp.MustCompile(disk + " .* yes").MatchString(out) {
		t.Errorf("disks:\n%s", out)
	}
	if out := n.run(t, "bhctl", "get", "config"); !strings.Contains(out, "hostname: installed") {
		t.Errorf("config:\n%s", out)
	}
}
