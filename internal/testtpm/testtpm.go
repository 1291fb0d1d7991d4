// Package testtpm gives a test a TPM 2.0 in software (swtpm), which ends with the test.
//
// There is no resource manager in front of it, as there is behind /dev/tpmrm0: what is loaded stays until it is flushed, and there is room for
// three things. So a test that leaks handles fails soon.
package testtpm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TPM is one software TPM. It is for one goroutine.
type TPM struct {
	t       testing.TB
	dir     string // short: a socket's path has 107 bytes
	process *exec.Cmd
}

// Start returns a new TPM that was started up. Without swtpm the test is skipped; with REQUIRE_ROOT=1, as in CI, it fails.
func Start(t testing.TB) *TPM {
	t.Helper()
	return start(t, nil)
}

// Open is Start with a copy of what another TPM keeps: the folder of its state.
func Open(t testing.TB, state string) *TPM {
	t.Helper()
	return start(t, os.DirFS(state))
}

func start(t testing.TB, state fs.FS) *TPM {
	t.Helper()
	Need(t, "swtpm")
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	m := &TPM{t: t, dir: dir}
	t.Cleanup(func() {
		m.stop()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if state != nil {
		if err := os.CopyFS(filepath.Join(dir, "state"), state); err != nil {
			t.Fatal(err)
		}
	}
	m.start()
	return m
}

// Need skips the test if a program is missing; with REQUIRE_ROOT=1, as in CI, it fails.
func Need(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err == nil {
		return
	}
	if os.Getenv("REQUIRE_ROOT") == "1" {
		t.Fatalf("no %s", program)
	}
	t.Skipf("no %s: the TPM is not tested", program)
}

// Socket is the path at which the TPM takes commands.
func (m *TPM) Socket() string { return filepath.Join(m.dir, "s") }

func (m *TPM) start() {
	m.t.Helper()
	state := filepath.Join(m.dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		m.t.Fatal(err)
	}
	m.process = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path="+m.Socket(), "--ctrl", "type=unixio,path="+m.Socket()+".ctrl", "--log", "file="+filepath.Join(m.dir, "log"))
	if err := m.process.Start(); err != nil {
		m.t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", m.Socket())
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(m.dir, "log"))
			m.t.Fatalf("swtpm does not come up: %v\n%s", err, log)
		}
	}
}

func (m *TPM) stop() {
	if m.process == nil {
		return
	}
	_ = m.process.Process.Kill() // its state is on disk after each command that changes it
	_ = m.process.Wait()
	m.process = nil
	_ = errors.Join(os.Remove(m.Socket()), os.Remove(m.Socket()+".ctrl"))
}

// Reboot resets the TPM as a restart of the machine does: PCRs, sessions and what is loaded are gone.
func (m *TPM) Reboot() {
	m.t.Helper()
	m.stop()
	m.start()
}

// Replace puts another TPM in its place.
func (m *TPM) Replace() {
	m.t.Helper()
	m.stop()
	if err := os.RemoveAll(filepath.Join(m.dir, "state")); err != nil {
		m.t.Fatal(err)
	}
	m.start()
}

// Send passes a command on and returns the answer (github.com/google/go-tpm, transport.TPM). Each goes over a connection of its own, so that Tool
// can be used in between.
func (m *TPM) Send(command []byte) ([]byte, error) {
	c, err := net.Dial("unix", m.Socket())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	if _, err := c.Write(command); err != nil {
		return nil, err
	}
	const header = 10 // tag, size of all, code
	answer := make([]byte, header)
	if _, err := io.ReadFull(c, answer); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(answer[2:])
	if size < header || size > 1<<16 {
		return nil, fmt.Errorf("swtpm: an answer of %d bytes", size)
	}
	answer = append(answer, make([]byte, size-header)...)
	_, err = io.ReadFull(c, answer[header:])
	return answer, err
}

// Close does nothing: the TPM ends with the test.
func (m *TPM) Close() error { return nil }

// Tool runs one of tpm2-tools on the TPM, in a folder of its own that lasts as long as the TPM, and returns what it printed. Without
// tpm2-tools the test is skipped, as for Start.
func (m *TPM) Tool(argv ...string) string {
	m.t.Helper()
	Need(m.t, argv[0])
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+m.Socket())
	var stderr bytes.Buffer // warnings too
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("%v: %v\n%s%s", argv, err, out, stderr.Bytes())
	}
	return string(out)
}

// File returns the content of a file that a tool wrote, or writes it first if data is not nil.
func (m *TPM) File(name string, data []byte) []byte {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	if data != nil {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	return got
}
