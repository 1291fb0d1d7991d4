package main

import (
	"net"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/claim"
)

// A cluster is claimed, and another node joins it, over real TLS: the token is made on the way, or given.
func TestJoin(t *testing.T) {
	const code = "7F3KQ-M2X9T-7F3KQ-M2X9T"
	t.Setenv("BHCONFIG", t.TempDir()+"/c.yaml")
	plain, err := claim.Normalize(code)
	must(t, err)
	shared := t.TempDir()
	node := func(name string) (*fakeNode, string) {
		n := &fakeNode{name: name, code: plain, own: t.TempDir(), shared: shared}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		s := n.server()
		go func() { _ = s.Serve(l) }()
		t.Cleanup(s.Stop)
		return n, l.Addr().String()
	}
	n1, first := node("n1")
	if out, e, err := run(t, t.Context(), "claim", first, "--code", code); err != nil || !strings.Contains(out, "you own") {
		t.Fatalf("%v\n%s%s", err, out, e)
	}
	must(t, n1.put("cluster/etcd", "yes"))
	n2, second := node("n2")
	if _, _, err := run(t, t.Context(), "join", second, "--code", strings.Repeat("X", 20), "--name", "n2", "--role", "worker"); err == nil || !strings.Contains(err.Error(), "wrong code") {
		t.Errorf("with another code: %v", err)
	}
	out, e, err := run(t, t.Context(), "join", second, "--code", code, "--name", "n2", "--role", "worker")
	if err != nil || !strings.Contains(out, "n2, a worker of the cluster. Next: bhctl -n n2 apply -f FILE, with Machine.hostname n2 and Machine.role worker") {
		t.Errorf("%v\n%s%s", err, out, e)
	}
	if got := strings.TrimSpace(n2.get("endpoints/n2")); got != first {
		t.Errorf("the node was told %q, the context has %q", got, first)
	}
	_, third := node("n3")
	must(t, n1.put("tokens/n3", "controlplane"))
	// A token and endpoints that somebody else handed over; and this user's credentials are of another cluster, which is said.
	if _, _, err := run(t, t.Context(), "join", third, "--code", code, "--name", "n3", "--token", "TOKEN-n4", "--endpoint", first); err == nil || !strings.Contains(err.Error(), "refused the token") {
		t.Errorf("with another's token: %v", err)
	}
	if out, e, err := run(t, t.Context(), "join", third, "--code", code, "--name", "n3", "--token", "TOKEN-n3", "--endpoint", first, "--endpoint", "192.0.2.7"); err != nil || !strings.Contains(out, "a controlplane") {
		t.Errorf("%v\n%s%s", err, out, e)
	}
	if got := strings.TrimSpace(n2.get("endpoints/n3")); got != first+" 192.0.2.7:50000" {
		t.Errorf("the node was told %q", got)
	}
	_, fourth := node("n4")
	must(t, n1.put("tokens/n4", "worker"))
	_, c := startFake(t)
	path := t.TempDir() + "/other.yaml"
	writeContexts(t, path, c)
	t.Setenv("BHCONFIG", path)
	if _, _, err := run(t, t.Context(), "join", fourth, "--code", code, "--name", "n4", "--token", "TOKEN-n4", "--endpoint", first); err == nil || !strings.Contains(err.Error(), "has joined another cluster than this context's") {
		t.Errorf("another cluster: %v", err)
	}
}
