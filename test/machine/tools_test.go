package machine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/client"
)

// testTools lets programs that we did not write judge the node: openssl, curl, promtool, grpcurl, an OpenAPI validator.
func testTools(t *testing.T, n *node) {
	cred := n.credentials(t)
	ca := filepath.Join(n.dir, "ca.pem")
	for file, data := range map[string][]byte{"ca.pem": cred.CA, "cert.pem": cred.Certificate, "key.pem": cred.Key} {
		if err := os.WriteFile(filepath.Join(n.dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	token := strings.TrimSpace(n.run(t, "bhctl", "token", "--role", "reader"))
	api := fmt.Sprintf("127.0.0.1:%d", n.apiPort)
	t.Run("openssl", func(t *testing.T) {
		for _, port := range []int{n.apiPort, n.gatewayPort} {
			out, err := n.shell(t, "", "openssl", "s_client", "-connect", fmt.Sprintf("127.0.0.1:%d", port), "-CAfile", ca, "-verify_return_error", "-verify_hostname", "localhost", "-brief",
				"-alpn", "h2") // else apid ends the connection after the handshake, perhaps before openssl does
			if err != nil || !strings.Contains(out, "Verification: OK") || !strings.Contains(out, "TLSv1.3") {
				t.Errorf("port %d: %v\n%s", port, err, out)
			}
		}
		if out, err := n.shell(t, "", "openssl", "verify", "-CAfile", ca, filepath.Join(n.dir, "cert.pem")); err != nil {
			t.Errorf("the administrator's certificate: %v\n%s", err, out)
		}
	})
	t.Run("curl", func(t *testing.T) {
		out, err := n.shell(t, "", "curl", "-sS", "--fail", "--cacert", ca, "-H", "Authorization: Bearer "+token, fmt.Sprintf("https://localhost:%d/v1/version", n.gatewayPort))
		if err != nil || !strings.Contains(out, `"kubernetes":"v1.`) {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("promtool", func(t *testing.T) {
		metrics, err := os.ReadFile(filepath.Join(n.dir, "metrics.txt"))
		if err != nil {
			t.Fatal(err)
		}
		if out, err := n.shell(t, string(metrics), "promtool", "check", "metrics"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("grpcurl", func(t *testing.T) {
		args := []string{"-cacert", ca, "-authority", client.ServerName, "-H", "authorization: Bearer " + token}
		out, err := n.shell(t, "", "grpcurl", append(args, api, "list")...)
		for _, s := range []string{"machine.v1.Machine", "config.v1.Config", "network.v1.Network", "grpc.health.v1.Health"} {
			if !strings.Contains(out, s) {
				t.Errorf("list has no %s: %v\n%s", s, err, out)
			}
		}
		for _, s := range []string{"control.v1.Control", "trust.v1.Signer"} {
			if strings.Contains(out, s) {
				t.Errorf("list shows %s, which is for daemons only", s)
			}
		}
		out, err = n.shell(t, "", "grpcurl", append(args, api, "machine.v1.Machine/GetVersion")...)
		if err != nil || !strings.Contains(out, `"kubernetes": "v1.`) {
			t.Errorf("GetVersion: %v\n%s", err, out)
		}
	})
	t.Run("openapi", func(t *testing.T) {
		_, body, err := n.get(t, "/openapi.json", "")
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(n.dir, "openapi.json")
		if err := os.WriteFile(file, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := n.shell(t, "", "validate-api", file); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// shell runs one of the tools that "make setup" put into out/tools, or one of the system's.
func (n *node) shell(t *testing.T, stdin, name string, args ...string) (string, error) {
	t.Helper()
	for _, dir := range []string{"out/tools/bin", "out/tools/node_modules/.bin"} {
		if p := filepath.Join(n.root, dir, name); exists(p) {
			name = p
		}
	}
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%v: make setup installs it", err)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
