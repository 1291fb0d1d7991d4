package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestGet(t *testing.T) {
	var log, out strings.Builder
	s := httptest.NewServer(handler("pod-1", &log))
	defer s.Close()

	for range 2 {
		if err := run(t.Context(), &out, []string{"get", s.URL + "/a"}); err != nil {
			t.Fatal(err)
		}
	}
	if want := "hello from pod-1, request 1\nhello from pod-1, request 2\n"; out.String() != want {
		t.Errorf("bodies: got %q, want %q", out.String(), want)
	}
	if got := strings.Count(log.String(), "GET /a from 127.0.0.1:"); got != 2 {
		t.Errorf("the log has %d lines of 2 requests: %q", got, log.String())
	}
}

func TestGetPrintsTheBodyOfARefusal(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no", http.StatusTeapot)
	}))
	defer s.Close()

	var out strings.Builder
	err := run(t.Context(), &out, []string{"get", s.URL})
	if err == nil || !strings.Contains(err.Error(), "418") {
		t.Errorf("error %v does not name status 418", err)
	}
	if out.String() != "no\n" {
		t.Errorf("body: got %q, want %q", out.String(), "no\n")
	}
}

func TestUsage(t *testing.T) {
	for _, args := range []string{"get", "lookup", "env x", "sleep 1", "kill", "read /proc/self/maps"} {
		if err := run(t.Context(), &strings.Builder{}, strings.Fields(args)); err == nil || err.Error() != usage {
			t.Errorf("hello %s: got %v, want the usage", args, err)
		}
	}
}

func TestRead(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte("0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ offset, length, want string }{
		{"2", "3", "234"}, {"0", "10", "0123456789"}, {"8", "4", "error"}, {"-1", "1", "error"}, {"0", "x", "error"},
	} {
		var out strings.Builder
		got := "error"
		if err := run(t.Context(), &out, []string{"read", name, c.offset, c.length}); err == nil {
			got = out.String()
		}
		if got != c.want {
			t.Errorf("read at %s, %s bytes: got %q, want %q", c.offset, c.length, got, c.want)
		}
	}
}
