package machine

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

const (
	confineCalls = 1000 // at each of the two machines, in turn
	confineBoots = 7    // of each, in turn
)

// TestBenchConfinement prints what the confinement of units costs: two machines of the same source run side by side, one with system-call filters and Landlock, one whose
// PID 1 was built without (internal/unit/gen -open). Whatever else the host does, it does to both: calls and boots take turns.
func TestBenchConfinement(t *testing.T) {
	row := figures(t)
	kinds := []struct {
		name string
		bin  func(*node, *testing.T) string
	}{
		{"confined", func(n *node, _ *testing.T) string { return filepath.Join(n.root, "out/bin") }},
		{"open", (*node).openInit},
	}
	nodes := make([]*node, len(kinds))
	calls, boots := make([][]time.Duration, len(kinds)), make([][]time.Duration, len(kinds))
	api := make([]machinev1.MachineClient, len(kinds))
	for i, k := range kinds {
		n := newNode(t)
		n.name = k.name
		nodes[i] = n
		image := n.build(t, otherImage{version: "9.1.0", bin: k.bin(n, t)})
		if out, err := n.try(t.Context(), 5*time.Minute, "bhctl", "up", "--name", n.name, "--api-port", fmt.Sprint(n.apiPort), "--gateway-port", fmt.Sprint(n.gatewayPort), "--kubernetes-port", fmt.Sprint(n.kubePort), "--image", image, "--memory", "1024"); err != nil {
			t.Fatalf("bhctl up: %v\n%s", err, out)
		}
		conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		api[i] = machinev1.NewMachineClient(conn)
	}
	for range confineCalls {
		for i, c := range api {
			start := time.Now()
			// What bhctl health asks: apid, machined, and what that one asks PID 1 and reads of /proc and /sys.
			if _, err := c.GetHealth(t.Context(), &machinev1.GetHealthRequest{}); err != nil {
				t.Fatal(err)
			}
			calls[i] = append(calls[i], time.Since(start))
		}
	}
	for range confineBoots {
		for i, n := range nodes {
			boots[i] = append(boots[i], n.bootOnce(t))
		}
	}
	for i, k := range kinds {
		row(k.name+": GetHealth, p50 of "+fmt.Sprint(confineCalls), median(calls[i]).Round(10*time.Microsecond).String(), "")
		row(k.name+": power on → authenticated call, median of "+fmt.Sprint(confineBoots), median(boots[i]).Round(10*time.Millisecond).String(), "")
	}
	row("confinement, of a call's p50", fmt.Sprintf("%+.1f %%", 100*(float64(median(calls[0]))/float64(median(calls[1]))-1)), "≤ 5 %")
	row("confinement, of a boot", (median(boots[0]) - median(boots[1])).Round(10*time.Millisecond).String(), "≤ 300 ms")
}

// bootOnce turns the machine off and on, and returns how long it takes until it answers its owner.
func (n *node) bootOnce(t *testing.T) time.Duration {
	t.Helper()
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	firstCall(t, n, n.credentials(t))
	return time.Since(start)
}

// openInit is a folder of the build's programs with a PID 1 that confines nobody.
func (n *node) openInit(t *testing.T) string {
	t.Helper()
	bin, dir := t.TempDir(), t.TempDir()
	units, overlay := filepath.Join(dir, "units.go"), filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(n.root, "init/units.go"): units}})
	if err == nil {
		err = os.WriteFile(overlay, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"run", "./internal/unit/gen", "-tree", ".", "-open", "-out", units}, append(buildFlags, "-overlay", overlay, "-o", filepath.Join(bin, "init"), "./init")} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir, cmd.Env = n.root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, out)
		}
	}
	for _, name := range []string{"bulkheadd", "etcdd", "kubeletd"} {
		if err := os.Symlink(filepath.Join(n.root, "out/bin", name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return bin
}
