package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// A poison is what is wrong with a version.
type poison struct {
	name string
	// file is one of testdata/poison, without its ".go"; its folder is the program that gets it.
	file string
	// runtime puts a containerd in the place of the real one that does nothing.
	runtime bool
	// signer is another key for the TPM's policy than the node trusts.
	signer bool
	// rot spoils the slot on the disk, after it was verified and before it is started.
	rot bool
	// quick ones are part of "make test-vm".
	quick bool
	// why is how the node explains afterwards that the version was left.
	why string
}

// poisons are those of a node without Kubernetes; each is tried three times.
var poisons = []poison{
	{name: "panic", file: "init/panic", why: `the kernel panicked: sysrq triggered crash`},
	{name: "PID 1 ends", file: "init/pid1-ends", why: `the kernel panicked: Attempted to kill init! exitcode=0x00000000`},
	{name: "verity error", rot: true, quick: true, why: `PID 1 gave up: cannot mount the root: input/output error`},
	{name: "disk does not unlock", signer: true, why: `STATE does not open: tpm: .*signed`},
	{name: "a daemon crash-loops", file: "bulkheadd/storaged-crashes", why: `nobody has judged it for 90 s; storaged failed \d+ times in a row: exit 3`},
	{name: "API dead", file: "bulkheadd/apid-dead", why: `did not prove its health in 1m0s; missing: api: api.answered: no call with credentials has come through apid`},
	{name: "the network is cut", file: "init/network-cut", why: `did not prove its health in 1m0s; missing: api: api.answered: no call with credentials has come through apid`},
	{name: "wrong clock", file: "init/clock", why: `did not prove its health in 1m0s; missing: api: .*; its clock was wrong: it said 20[5-9]\d-`},
	{name: "initramfs hangs", file: "init/initramfs-hangs", why: `it hung before it could write to STATE, and the hardware watchdog reset the machine`},
	{name: "hard hang", file: "init/hangs", why: `(its last try hung|it hung before it could write to STATE), and the hardware watchdog reset the machine`},
	{name: "the judge crash-loops", file: "bulkheadd/updated-crashes", why: `nobody has judged it for 90 s; updated failed \d+ times in a row: exit 3`},
}

// clusterPoisons are those of a node with Kubernetes.
var clusterPoisons = []poison{
	{name: "kubelet never Ready", runtime: true, why: `did not prove its health in 2m0s; missing: .*kubelet: kubernetes.converged: `},
	{name: "etcd does not rejoin", file: "etcdd/etcd-absent", why: `did not prove its health in 2m0s; missing: etcd: etcd.converged: `},
}

// buildFlags are those of the Makefile.
var buildFlags = []string{"build", "-tags", "grpcnotrace", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w"}

// poisoned returns a folder of our binaries of which one has one file more, as if somebody had made that mistake.
func (n *node) poisoned(t *testing.T, p poison) string {
	t.Helper()
	bin := t.TempDir()
	spoilt := filepath.Dir(p.file)
	source := spoilt // init is a folder of its own, the others are in cmd
	if spoilt != "init" {
		source = filepath.Join("cmd", spoilt)
	}
	for _, name := range []string{"init", "bulkheadd", "etcdd", "kubeletd"} {
		if name == spoilt {
			continue
		}
		if err := os.Symlink(filepath.Join(n.root, "out/bin", name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	overlay := filepath.Join(t.TempDir(), "overlay.json")
	text, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(n.root, source, "poison.go"): filepath.Join(n.root, "test/machine/testdata/poison", p.file+".go")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", append(buildFlags, "-overlay", overlay, "-o", filepath.Join(bin, spoilt), "./"+source)...)
	cmd.Dir, cmd.Env = n.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

// otherKeys returns a folder of the build's keys in which that for the TPM's policy is another one.
func (n *node) otherKeys(t *testing.T) string {
	t.Helper()
	fresh := filepath.Join(t.TempDir(), "keys")
	n.run(t, filepath.Join(n.root, "out/bin/mkimage"), "keys", "--out", fresh)
	all, err := os.ReadDir(filepath.Join(n.root, "out/keys"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if strings.HasPrefix(e.Name(), "pcr.") {
			continue
		}
		to := filepath.Join(fresh, e.Name())
		if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join(n.root, "out/keys", e.Name()), to); err != nil {
			t.Fatal(err)
		}
	}
	return fresh
}

// An otherImage is what is chosen for an image. The zero value, with a version, is the build's without Kubernetes. Each has the words for an emulated machine on its command line, which nobody can
// add where a firmware boots it: with Secure Boot a node is configured after 44 s instead of 70. The build's own image, which TestFirmware boots so, has none.
type otherImage struct {
	version         string
	bin, keys, kube string // folders; "": the build's, the build's, no Kubernetes
	epoch           int    // 0: 1
}

// plain reports whether several tests want this image.
func (i otherImage) plain() bool {
	return i == otherImage{version: firstVersion} || i == otherImage{version: secondVersion}
}

// build makes the image and returns its folder, to which the caller at most adds files: a plain one is made once for all tests, in out/test-images.
func (n *node) build(t *testing.T, i otherImage) string {
	t.Helper()
	or := func(a, b string) string {
		if a == "" {
			return b
		}
		return a
	}
	dir := filepath.Join(n.dir, "image-"+i.version)
	if i.plain() {
		dir = filepath.Join(n.root, "out/test-images", i.version)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(n.root, "out/bin/mkimage"), "build", "--bin", or(i.bin, filepath.Join(n.root, "out/bin")), "--kubernetes", or(i.kube, "none"), "--out", dir,
		"--version", i.version, "--level", "3", "--keys", or(i.keys, filepath.Join(n.root, "out/keys")), "--epoch", fmt.Sprint(max(i.epoch, 1)), "--append", qemu.EmulatedCommandLine)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("mkimage: %v\n%s", err, out)
	}
	return dir
}

// idleRuntime returns a folder of the Kubernetes set in which containerd does nothing.
func (n *node) idleRuntime(t *testing.T) string {
	t.Helper()
	set, real := t.TempDir(), filepath.Join(n.root, "out/kubernetes")
	if err := os.Mkdir(filepath.Join(set, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"*", "bin/*"} {
		all, err := filepath.Glob(filepath.Join(real, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range all {
			name := strings.TrimPrefix(file, real+"/")
			if name == "bin" || name == "bin/containerd" {
				continue
			}
			if err := os.Symlink(file, filepath.Join(set, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", append(buildFlags, "-o", filepath.Join(set, "bin/containerd"), "./test/machine/testdata/poison/containerd")...)
	cmd.Dir, cmd.Env = n.root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return set
}

// bundleOf builds the poisoned version and returns what bhctl upgrade takes; cluster says that it has Kubernetes.
func (n *node) bundleOf(t *testing.T, p poison, version string, cluster bool) string {
	t.Helper()
	i := otherImage{version: version}
	if cluster {
		i.kube = filepath.Join(n.root, "out/kubernetes")
	}
	if p.runtime {
		i.kube = n.idleRuntime(t)
	}
	if p.file != "" {
		i.bin = n.poisoned(t, p)
	}
	if p.signer {
		i.keys = n.otherKeys(t)
	}
	dir := n.build(t, i)
	if !i.plain() {
		t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Log(err)
			}
		})
	}
	return filepath.Join(dir, "bulkhead.update")
}

// version is the i-th poison's.
func version(i int) string { return fmt.Sprintf("9.%d.0", i+1) }
