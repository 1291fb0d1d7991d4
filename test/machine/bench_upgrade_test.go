package machine

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	"github.com/bulkhead-os/bulkhead/deploy/image"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// TestBenchUpgrade prints the figures of a node that boots through its firmware, with Secure Boot, a TPM, encrypted volumes and Kubernetes:
// its boot, an upgrade, and the way back from an image whose PID 1 ends. Like TestBench it judges nothing but that all of it works.
func TestBenchUpgrade(t *testing.T) {
	row := figures(t)
	n := newNode(t)
	built := filepath.Join(n.root, "out/image")
	row("complete image, compressed", mib(bundleSize(t, built)), "≤ 160 MiB")
	m := n.upFirmware(t, built, clustered, 4096, 2)
	n.run(t, "bhctl", "kubeconfig", "--file", n.kubeconfig)
	testWorkload(t, n)
	next := n.nextImage(t, "9.1.0")
	bad := n.bundleOf(t, poisons[slices.IndexFunc(poisons, func(p poison) bool { return p.name == "PID 1 ends" })], "9.2.0", false)
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	b := &upgradeBench{n, m, machinev1.NewMachineClient(conn), row}
	b.firmware(t)
	b.upgrade(t, next, "9.1.0")
	b.bad(t, bad)
}

// bundleSize is what an upgrade sends at most: kernel image, root and hash tree.
func bundleSize(t *testing.T, dir string) uint64 {
	m, err := image.ReadManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range m.Files {
		if f.Name == "bulkhead.update" {
			return uint64(f.Size)
		}
	}
	t.Fatalf("%s has no bulkhead.update", dir)
	return 0
}

// nextImage builds another version of the whole image, with the same keys.
func (n *node) nextImage(t *testing.T, version string) string {
	t.Helper()
	dir := filepath.Join(n.dir, "image-"+version)
	cmd := exec.CommandContext(t.Context(), "make", "image", "VERSION="+version, "IMAGE="+dir)
	cmd.Dir = n.root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make image: %v\n%s", err, out)
	}
	return dir
}

type upgradeBench struct {
	n    *node
	m    qemu.Machine
	node machinev1.MachineClient
	row  row
}

func (b *upgradeBench) call(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := b.node.GetVersion(ctx, &machinev1.GetVersionRequest{})
	return err
}

// firmware powers the machine off and on, three times.
func (b *upgradeBench) firmware(t *testing.T) {
	var took []time.Duration
	for range 3 {
		b.n.off(t, b.m)
		start := time.Now()
		if err := b.m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		firstCall(t, b.n, b.n.credentials(t))
		took = append(took, time.Since(start))
	}
	b.row("power on → firmware → authenticated call, median of 3", median(took).Round(10*time.Millisecond).String(), "")
	b.well(t)
}

func (b *upgradeBench) well(t *testing.T) {
	eventually(t, 10*time.Minute, "the node is well and its pod answers", func() error {
		if _, err := b.n.try(t.Context(), 30*time.Second, "bhctl", "health"); err != nil {
			return err
		}
		return b.n.ask(t.Context())
	})
}

// upgrade upgrades the node, while somebody asks it and its pod all the time.
func (b *upgradeBench) upgrade(t *testing.T, to, version string) {
	before := b.memory(t.Context())
	api, pod := gaps(t, b.call), gaps(t, b.n.ask)
	peak := repeat(t, before, func(ctx context.Context, peak uint64) uint64 { return max(peak, b.memory(ctx)) })
	start := time.Now()
	if _, err := b.n.try(t.Context(), 10*time.Minute, "bhctl", "upgrade", "--image", to, "--no-reboot"); err != nil {
		t.Fatalf("bhctl upgrade: %v", err)
	}
	b.row("upgrade, sent and installed", since(start), "")
	b.row("upgrade, extra memory of storaged, updated and apid", mib(peak()-before), "≤ 32 MiB")
	start = time.Now()
	b.n.run(t, "bhctl", "reboot")
	good := regexp.MustCompile(`(?m)^[AB] +` + regexp.QuoteMeta(version) + ` +good +yes`)
	eventually(t, 15*time.Minute, "the new version is good", func() error {
		out, err := b.n.try(t.Context(), 20*time.Second, "bhctl", "get", "slots")
		if err == nil && !good.MatchString(out) {
			err = fmt.Errorf("slots:\n%s", out)
		}
		return err
	})
	b.row("upgrade, restart → found good, Kubernetes included", since(start), "")
	b.well(t)
	b.row("upgrade, longest time without the API", api().Round(100*time.Millisecond).String(), "")
	b.row("upgrade, longest time without the pod", pod().Round(100*time.Millisecond).String(), "")
}

// memory is that of the daemons that an upgrade goes through, in bytes; 0 if the node does not say.
func (b *upgradeBench) memory(ctx context.Context) (sum uint64) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	l, err := b.node.ListServices(ctx, &machinev1.ListServicesRequest{})
	if err != nil {
		return 0
	}
	for _, s := range l.Services {
		switch s.Name {
		case "storaged", "updated", "apid":
			sum += s.MemoryBytes
		}
	}
	return sum
}

// bad upgrades to an image that does not start, and waits for the way back.
func (b *upgradeBench) bad(t *testing.T, to string) {
	b.n.run(t, "bhctl", "upgrade", "--image", to, "--no-reboot")
	w := b.n.watch(t, b.m)
	b.n.run(t, "bhctl", "reboot")
	b.n.left(t, "9.2.0")
	boots := w.boots(t)
	if len(boots) != 4 {
		t.Fatalf("%d starts of the machine, want three tries and the old version: %v", len(boots), boots)
	}
	row := func(what string, since start, budget string) {
		b.row(what, boots[3].answered.Sub(since.began).Round(100*time.Millisecond).String(), budget)
	}
	row("bad image, three tries → old version answers", boots[0], "")
	row("bad image, its last try begins → old version answers", boots[2], "≤ 180 s")
	b.well(t)
	b.row("bad image, its last try begins → pod answers", since(boots[2].began), "")
}

// repeat calls f again and again, until the function that it returns is called, which returns what f returned last.
func repeat[T any](t *testing.T, first T, f func(context.Context, T) T) func() T {
	ctx, cancel := context.WithCancel(t.Context())
	var g sync.WaitGroup
	g.Go(func() {
		for ctx.Err() == nil {
			first = f(ctx, first)
			wait(ctx, 100*time.Millisecond)
		}
	})
	t.Cleanup(cancel)
	return func() T {
		cancel()
		g.Wait()
		return first
	}
}

// gaps asks all the time; what it returns says how long there was no answer, at most.
func gaps(t *testing.T, ask func(context.Context) error) func() time.Duration {
	last := time.Now()
	longest := repeat(t, time.Duration(0), func(ctx context.Context, longest time.Duration) time.Duration {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // QEMU accepts for a guest that is not there yet: such a try never ends well
		defer cancel()
		if ask(ctx) == nil {
			longest, last = max(longest, time.Since(last)), time.Now()
		}
		return longest
	})
	return func() time.Duration { return max(longest(), time.Since(last)) }
}
