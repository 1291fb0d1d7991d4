package machine

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/gpt"
	"github.com/bulkhead-os/bulkhead/internal/hardening"
)

// TestBootSecurity reads every setting back through the API, on the real image, and lets the kernel's own log agree.
func TestBootSecurity(t *testing.T) {
	n := newNode(t)
	n.upBare(t, cutDocuments("secure"))
	conn := n.connect(t)
	settings := n.security(t, conn)
	seen := map[string]*machinev1.SecuritySetting{}
	for _, s := range settings {
		seen[s.Name] = s
		t.Logf("» %-44s wanted %-14s is %-24s ok %v", s.Name, s.Wanted, s.Actual, s.Ok)
		if s.Wanted != "" && s.Ok != (s.Actual == s.Wanted) && s.Name != "watchdog" {
			t.Errorf("%s: wanted %q, is %q, ok %v", s.Name, s.Wanted, s.Actual, s.Ok)
		}
	}
	var wanted []string
	for _, w := range hardening.Words {
		wanted = append(wanted, w.Name)
	}
	for _, p := range hardening.Params {
		wanted = append(wanted, p.Name)
	}
	for _, name := range append(wanted, "lsm.landlock", "lsm.lockdown", "lsm.yama", "root.verity", "watchdog") {
		if s := seen[name]; !s.GetOk() || s.GetAdvisory() {
			t.Errorf("%s is not as wanted: %v", name, s)
		}
	}
	// A machine that starts the kernel itself, without a TPM.
	for name, actual := range map[string]string{"firmware.secure-boot": "no UEFI", "firmware.setup-mode": "no UEFI", "tpm": "none", "encryption.STATE": "none"} {
		if s := seen[name]; s.GetActual() != actual || s.GetOk() || !s.GetAdvisory() {
			t.Errorf("%s: want %q, told and not counted: %v", name, actual, s)
		}
	}
	log := n.run(t, "bhctl", "dmesg")
	for _, want := range []string{"heap alloc:on", "Kernel is locked down from command line"} {
		if !strings.Contains(log, want) {
			t.Errorf("the kernel's log does not say %q", want)
		}
	}
	if strings.Contains(log, " is not ") && strings.Contains(log, "init: bulkhead: kernel.") {
		t.Error("PID 1 could not set a kernel parameter: see the log")
	}
	out := n.run(t, "bhctl", "get", "security")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != len(settings)+1 || !strings.Contains(out, " no ") || strings.Contains(out, " NO ") {
		t.Errorf("bhctl get security:\n%s", out)
	}
	out, _ = n.try(t.Context(), time.Minute, "bhctl", "health") // not healthy: there is no Kubernetes
	if !slices.ContainsFunc(strings.Split(out, "\n"), func(l string) bool { return strings.HasPrefix(l, "security ") && strings.Contains(l, " yes") }) {
		t.Errorf("bhctl health:\n%s", out)
	}
	token := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "reader"))
	if code, body, err := n.get(t, "/v1/security", token); err != nil || code != 200 || !strings.Contains(body, "kernel.modules_disabled") {
		t.Errorf("GET /v1/security: %d, %v, %.200s", code, err, body)
	}
}

// security waits until the kernel is closed for modules, which is the last thing that a boot does, and returns all settings.
func (n *node) security(t *testing.T, conn *grpc.ClientConn) (all []*machinev1.SecuritySetting) {
	t.Helper()
	eventually(t, 2*time.Minute, "the kernel is closed", func() error {
		r, err := machinev1.NewMachineClient(conn).GetSecurity(t.Context(), &machinev1.GetSecurityRequest{})
		if err != nil {
			return err
		}
		all = r.Settings
		for _, s := range all {
			if s.Name == "kernel.modules_disabled" && s.Ok {
				return nil
			}
		}
		return fmt.Errorf("%v", all)
	})
	return all
}

// TestBootEnds ends a node's boots in every way there is, and asks the next one how they ended: as ordered, by a cut of the power, by a
// kernel panic, and by a hang before there is a STATE. The image is the product's: the panic is a non-maskable interrupt that the kernel
// is told to panic on, the hang a second disk that stops answering.
func TestBootEnds(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	n.upBare(t, cutDocuments("ends"))
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	n.off(t, m)
	m.Append = "unknown_nmi_panic"
	m.Extra = []string{"-drive", "file=" + secondDisk(t, n.dir) + ",format=raw,if=none,id=second", "-device", "virtio-blk-pci,drive=second"}
	n.restart(t, m).Close()
	n.ends(t, "2 running", "1 clean shutdown ordered by ")

	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.restart(t, m).Close()
	n.ends(t, "3 running", "2 unknown no trace", "1 clean")
	if out := n.run(t, "bhctl", "logs", "--boot", "-1"); !strings.Contains(out, "kernel: init: ") || !strings.Contains(out, "events: ") {
		t.Errorf("the last lines of a boot whose power was cut:\n%s", out)
	}
	wait(t.Context(), 3*time.Second) // so that the journal has been written

	if err := m.QMP(t.Context(), "inject-nmi"); err != nil {
		t.Fatal(err)
	}
	n.back(t, "3 panic NMI: Not continuing")
	if out := n.run(t, "bhctl", "logs", "--boot", "-1", "panic"); !strings.Contains(out, "Kernel panic - not syncing") {
		t.Errorf("the last lines of a kernel that panicked:\n%s", out)
	}
	if out := n.run(t, "bhctl", "logs", "--boot", "-1", "--tail", "200"); !strings.Contains(out, "\npanic: ") || !strings.Contains(out, "machined: ") {
		t.Errorf("the last lines of a boot that panicked:\n%s", out)
	}

	stall := func(bytes int) {
		t.Helper()
		limits := map[string]any{"device": "second", "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
		if err := m.Order(t.Context(), "block_set_io_throttle", limits); err != nil {
			t.Fatal(err)
		}
	}
	stall(1)
	n.run(t, "bhctl", "reboot")
	start := time.Now()
	eventually(t, 4*time.Minute, "the watchdog resets a machine that hangs in the initramfs", func() error {
		text, err := os.ReadFile(m.Console())
		if err == nil && !strings.Contains(string(text), "the hardware watchdog has reset this machine") {
			err = fmt.Errorf("%s after the order to reboot", time.Since(start))
		}
		return err
	})
	stall(0)
	n.back(t, "5 reset the hardware watchdog")
	n.ends(t, "6 running", "5 reset the hardware watchdog", "4 clean reboot ordered by ", "3 panic", "2 unknown", "1 clean")
	if out := n.run(t, "bhctl", "events"); !strings.Contains(out, "the boot before this one did not end as ordered: the hardware watchdog") {
		t.Errorf("no event tells of the hang:\n%s", out)
	}
	n.run(t, "bhctl", "reboot")
	n.back(t, "6 clean reboot ordered by") // the watchdog's word was of the boot before, and is not told twice
}

// ends compares what "bhctl get boots" tells, newest first, each as number, end, and how the detail begins.
func (n *node) ends(t *testing.T, want ...string) {
	t.Helper()
	out := n.run(t, "bhctl", "get", "boots")
	lines := strings.Split(strings.TrimSpace(out), "\n")[1:]
	for i, w := range want {
		if i >= len(lines) || !strings.HasPrefix(bootLine(lines[i]), w) {
			t.Errorf("boot %q: bhctl get boots:\n%s", w, out)
		}
	}
	if len(lines) != len(want) {
		t.Errorf("%d boots, want %d:\n%s", len(lines), len(want), out)
	}
}

// bootLine leaves version and start out of a line of "bhctl get boots".
func bootLine(line string) string {
	f := strings.Fields(line)
	for i, word := range f {
		if slices.Contains([]string{"running", "clean", "panic", "reset", "unknown"}, word) {
			return strings.Join(append(f[:1:1], f[i:]...), " ")
		}
	}
	return line
}

// back waits until the node runs another boot than before, which tells of the last one.
func (n *node) back(t *testing.T, last string) {
	t.Helper()
	n.reach(t, "the node answers again", func(_ *configv1.GetResponse, err error) bool { return err == nil && n.last(t.Context(), last) }).Close()
}

func (n *node) last(ctx context.Context, want string) bool {
	out, err := n.try(ctx, 10*time.Second, "bhctl", "--timeout", "5s", "get", "boots")
	lines := strings.Split(out, "\n")
	return err == nil && len(lines) > 2 && strings.HasPrefix(bootLine(lines[2]), want)
}

// secondDisk is a disk with a partition: enough for the kernel to read more than one page of it.
func secondDisk(t *testing.T, dir string) string {
	t.Helper()
	var g [2]gpt.GUID
	for i := range g {
		rand.Read(g[i][:]) // never fails
	}
	const size = 64 << 20
	table := gpt.Table{DiskGUID: g[0], Partitions: []gpt.Partition{{Number: 1, Type: gpt.GUID{1}, GUID: g[1], First: gpt.FirstUsable, Last: gpt.FirstUsable + 99, Name: "second"}}}
	chunks, err := table.Encode(size)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "second.raw")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, c := range chunks {
		if _, err := f.WriteAt(c.Data, c.Offset); err != nil {
			t.Fatal(err)
		}
	}
	return file
}
