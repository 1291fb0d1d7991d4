// Package machine tests the real image in a virtual machine, judged only through what a user has: bhctl, kubectl, curl.
//
// The tests need "make image" and take minutes; they run with BULKHEAD_VM=1, which "make test-vm" sets, and say that they were skipped otherwise.
package machine

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/client"
)

// node is one virtual machine and the user who drives it.
type node struct {
	name, dir                                string
	root                                     string // of the repository
	kubeconfig                               string
	apiPort, gatewayPort, kubePort, nodePort int
	observerPort                             int                // see observer_test.go
	login                                    client.Credentials // for what must not fail the test by itself: see standing_test.go
}

// newNode prepares a user with an empty home and free ports; nothing is started. Everything is gone after the test, also a failed one's machine.
func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getenv("BULKHEAD_VM") == "" {
		t.Skip("needs a virtual machine: make test-vm")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{name: "test", dir: t.TempDir(), root: root}
	n.kubeconfig = filepath.Join(n.dir, "kubeconfig")
	for _, p := range []*int{&n.apiPort, &n.gatewayPort, &n.kubePort, &n.nodePort, &n.observerPort} {
		*p = freePort(t)
	}
	t.Cleanup(func() {
		if t.Failed() {
			n.keep(t)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if out, err := n.command(ctx, "bhctl", "down", "--name", n.name).CombinedOutput(); err != nil {
			t.Logf("bhctl down: %v\n%s", err, out)
		}
	})
	return n
}

// keep saves what a failed test leaves: the console and the logs of all units, for the one who looks into it.
func (n *node) keep(t *testing.T) {
	dir := filepath.Join(n.root, "out", "test-vm", t.Name())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Log(err)
		return
	}
	if data, err := os.ReadFile(filepath.Join(n.machineDir(), "console.log")); err == nil {
		_ = os.WriteFile(filepath.Join(dir, "console.log"), data, 0o644)
	}
	if _, err := n.try(context.Background(), 10*time.Second, "bhctl", "version"); err != nil { // twenty logs would each be waited for
		t.Logf("the console is in out/test-vm/%s; the node does not answer any more: %v", t.Name(), err)
		return
	}
	save := func(file string, args ...string) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		out, _ := n.command(ctx, args[0], args[1:]...).CombinedOutput()
		_ = os.WriteFile(filepath.Join(dir, file), out, 0o644)
	}
	save("health.txt", "bhctl", "health")
	save("services.txt", "bhctl", "services")
	save("specs.json", "bhctl", "get", "specs", "-o", "json")
	save("dmesg.txt", "bhctl", "dmesg")
	save("events.txt", "bhctl", "events")
	save("boots.txt", "bhctl", "get", "boots")
	save("boot-before.txt", "bhctl", "logs", "--boot", "-1", "-t")
	for _, u := range []string{"machined", "apid", "gateway", "networkd", "storaged", "trustd", "updated", "etcdd", "kubeletd", "containerd", "kubelet", "kube-proxy", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "image-load"} {
		save("log-"+u+".txt", "bhctl", "logs", u)
	}
	t.Logf("console and logs are in out/test-vm/%s", t.Name())
}

func (n *node) machineDir() string { return filepath.Join(n.dir, "machines", n.name) }

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// command is a program as this node's user runs it; bhctl and kubectl are those of the build.
func (n *node) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	switch name {
	case "bhctl":
		name = filepath.Join(n.root, "out/bin/bhctl")
	case "kubectl":
		name = filepath.Join(n.root, "out/kubernetes/bin/kube")
		args = append([]string{"kubectl", "--kubeconfig", n.kubeconfig}, args...)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "BHCONFIG="+filepath.Join(n.dir, "config.yaml"), "BULKHEAD_MACHINES="+filepath.Join(n.dir, "machines"), "HOME="+n.dir, "NO_COLOR=1")
	cmd.WaitDelay = time.Second
	return cmd
}

// run runs a command that must succeed and returns its standard output.
func (n *node) run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := n.try(t.Context(), time.Minute, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return out
}

// try runs a command with a time limit; the error has what it said.
func (n *node) try(ctx context.Context, limit time.Duration, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := n.command(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w\n%s%s", err, out.String(), errOut.String())
	}
	return out.String(), nil
}

// eventually tries until f succeeds: for what the node is allowed to take time for. The limit is a bound, not a measure.
func eventually(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	start := time.Now()
	var err error
	for time.Since(start) < limit {
		if err = f(); err == nil {
			t.Logf("» %s after %s", what, time.Since(start).Round(100*time.Millisecond))
			return
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(min(max(500*time.Millisecond, time.Since(start)/20), 3*time.Second)): // who looks takes the processors from who is looked at
		}
	}
	t.Fatalf("%s: not within %s: %v", what, limit, err)
}
