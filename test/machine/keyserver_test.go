package machine

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// A keyServer is cmd/keyserver as somebody runs it in the node's network; it takes in every node that asks, while it is welcoming.
type keyServer struct {
	program, folder, address, pin string
	welcoming                     bool
	process                       *exec.Cmd
	read                          sync.WaitGroup
}

// newKeyServer builds it and starts it, on a port of its own.
func newKeyServer(t *testing.T, root string) *keyServer {
	t.Helper()
	s := &keyServer{program: filepath.Join(t.TempDir(), "keyserver"), folder: t.TempDir(), address: fmt.Sprintf("127.0.0.1:%d", freePort(t)), welcoming: true}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", s.program, "./cmd/keyserver")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.start(t)
	t.Cleanup(s.stop)
	return s
}

var fingerprint = regexp.MustCompile(`msg=refused .*node=(sha256:[0-9a-f]{64})`)

func (s *keyServer) start(t *testing.T) {
	t.Helper()
	s.process = exec.Command(s.program, "-listen", s.address, "-state", s.folder)
	out, err := s.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	log, err := s.process.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.process.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); s.pin == "" && lines.Scan(); {
		s.pin, _ = strings.CutPrefix(lines.Text(), "pin: ")
		s.pin = strings.TrimSpace(s.pin)
		if !strings.HasPrefix(s.pin, "sha256:") {
			s.pin = ""
		}
	}
	welcoming := s.welcoming
	s.read.Go(func() {
		for lines := bufio.NewScanner(log); lines.Scan(); {
			if m := fingerprint.FindStringSubmatch(lines.Text()); m != nil && welcoming {
				if err := os.WriteFile(filepath.Join(s.folder, "nodes"), []byte(m[1]+" edge-1\n"), 0o600); err != nil {
					t.Error(err)
				}
			}
		}
	})
	s.read.Go(func() { _, _ = io.Copy(io.Discard, out) })
}

func (s *keyServer) stop() {
	if s.process != nil {
		_ = s.process.Process.Kill()
		s.read.Wait()
		_ = s.process.Wait()
		s.process = nil
	}
}

// TestNodeKeyServer is a node without a TPM: its volumes open by a server in its network, and not without that, nor once it is off the server's list.
func TestNodeKeyServer(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	s := newKeyServer(t, n.root)
	_, port, _ := strings.Cut(s.address, ":")
	document := fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: edge-1\n---\napiVersion: bulkhead.dev/v1\nkind: Storage\nencryption: luks2\nkeys:\n"+
		"  - {kind: kms, address: \"10.0.2.2:%s\", pin: %q}\n", port, s.pin) // the host, for a guest of QEMU
	n.upBare(t, document)
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	n.encrypted(t)
	eventually(t, time.Minute, "the server has given a key", func() error { // it refused the node first
		out, err := n.try(t.Context(), 20*time.Second, "bhctl", "storage", "keys", "list")
		if err == nil && (!strings.Contains(out, "kms") || !strings.Contains(out, "10.0.2.2:"+port)) {
			err = fmt.Errorf("bhctl storage keys list:\n%s", out)
		}
		return err
	})
	restart := func() *machineESP {
		t.Helper()
		n.off(t, m)
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		return &machineESP{n: n, m: m}
	}
	knows := func() {
		t.Helper()
		eventually(t, 2*time.Minute, "the node knows its owner", func() error {
			out, err := n.try(t.Context(), 20*time.Second, "bhctl", "--timeout", "5s", "get", "config")
			if err == nil && strings.TrimSpace(out) != strings.TrimSpace(document) {
				err = fmt.Errorf("the node runs another document:\n%s", out)
			}
			return err
		})
		n.encrypted(t)
	}
	restart()
	knows()

	s.stop()
	e := restart()
	e.console(t, 3*time.Minute, "STATE is locked", "This node is now owned")
	s.start(t)
	knows() // nobody had to do anything

	if err := os.Remove(filepath.Join(s.folder, "nodes")); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s.welcoming = false
	s.start(t)
	e = restart()
	e.console(t, 3*time.Minute, "STATE is locked(.|\n)*does not know the node", "This node is now owned")
	if out, err := n.try(t.Context(), time.Minute, "bhctl", "--timeout", "5s", "get", "config"); err == nil {
		t.Errorf("the node gives its configuration away:\n%s", out)
	}
}
