package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
)

func ask(t *testing.T, s *httptest.Server, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// A unit's processes are found in its group and below; each is signalled, and nothing else.
func TestSignal(t *testing.T) {
	dir := t.TempDir()
	s := httptest.NewServer(routes(dir))
	defer s.Close()
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(dir, "bulkhead/x/pod")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"bulkhead/x/cgroup.procs": "", "bulkhead/x/pod/cgroup.procs": fmt.Sprintln(cmd.Process.Pid), "bulkhead/x/memory.max": "max\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []string{"/signal?pid=1&signal=KILL", "/signal?pid=-1&signal=KILL", "/signal?unit=x&signal=NONE", "/signal?unit=y&signal=KILL", "/signal?signal=KILL&pid=x"} {
		if code, text := ask(t, s, "POST", bad, ""); code != 422 {
			t.Errorf("%s: %d, %s", bad, code, text)
		}
	}
	if code, text := ask(t, s, "GET", "/ps", ""); code != 200 {
		t.Errorf("ps: %d, %s", code, text)
	} else {
		var list []process
		if err := json.Unmarshal([]byte(text), &list); err != nil || len(list) < 2 {
			t.Errorf("ps: %v, %d processes", err, len(list))
		}
	}
	if code, text := ask(t, s, "POST", "/signal?unit=x&signal=KILL", ""); code != 200 {
		t.Errorf("signal: %d, %s", code, text)
	}
	_ = cmd.Wait()
	if w := cmd.ProcessState.Sys().(syscall.WaitStatus); w.Signal() != syscall.SIGKILL {
		t.Errorf("the process ended with %v", cmd.ProcessState)
	}
	if code, text := ask(t, s, "PUT", "/group?unit=x&file=memory.max", "1048576"); code != 200 {
		t.Errorf("put: %d, %s", code, text)
	}
	if code, text := ask(t, s, "GET", "/group?unit=x&file=memory.max", ""); code != 200 || text != "1048576" {
		t.Errorf("get: %d, %q", code, text)
	}
	for _, bad := range []string{"/group?unit=..&file=../../x", "/group?unit=a/b&file=x", "/group?file=x"} {
		if code, text := ask(t, s, "GET", bad, ""); code != 422 {
			t.Errorf("%s: %d, %s", bad, code, text)
		}
	}
}

// The unit is one that PID 1 takes, and no unit of the tree.
func TestUnit(t *testing.T) {
	units, err := unitfile.Load(os.DirFS("testdata"))
	if err != nil || len(units) != 1 || units[0].Name != "observer" {
		t.Errorf("%v, %v", units, err)
	}
	if units, err = unitfile.Load(os.DirFS("../..")); err != nil {
		t.Error(err)
	}
	for _, u := range units {
		if u.Name == "observer" {
			t.Error("the observer is a unit of the tree, so of every image")
		}
	}
}
