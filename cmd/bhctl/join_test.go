package main

import (
	"context"
	"net"
	"strings"
	"testing"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
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
	if _, _, err := run(t, t.Context(), "join", second, "--code", code, "--name", "n2", "--role", "worker"); err == nil || !strings.Contains(err.Error(), "somebody owns this node") {
		t.Errorf("a second time: %v", err)
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
	// By its TPM: it is told the digest of the context's authority, or the one that the user gives.
	_, fifth := node("n5")
	must(t, n1.put("tokens/n5", "worker"))
	if _, _, err := run(t, t.Context(), "join", fifth, "--code", code, "--name", "n5", "--tpm", "--ca-hash", strings.Repeat("ab", 32)); err == nil || !strings.Contains(err.Error(), "refused the token") {
		t.Errorf("with another authority's digest: %v", err)
	}
	if out, e, err := run(t, t.Context(), "join", fifth, "--code", code, "--name", "n5", "--tpm"); err != nil || !strings.Contains(out, "n5, a worker of the cluster") {
		t.Errorf("%v\n%s%s", err, out, e)
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

// impostor answers a join without knowing the code.
type impostor struct {
	*fakeNode
	got *trustv1.JoinClusterRequest
}

func (i *impostor) JoinCluster(_ context.Context, r *trustv1.JoinClusterRequest) (*trustv1.JoinClusterResponse, error) {
	i.got = r
	ca, _, err := i.authority()
	return &trustv1.JoinClusterResponse{Ca: ca.Raw, Role: "worker", Proof: make([]byte, 32)}, err
}

// Who only stands in between learns no token, and is not believed.
func TestJoinBelievesOnlyWhoKnowsTheCode(t *testing.T) {
	i := &impostor{fakeNode: &fakeNode{name: "n1", own: t.TempDir(), shared: t.TempDir()}}
	must(t, i.put("member", "claimed"))
	s := i.serverFor(i)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	t.Setenv("BHCONFIG", t.TempDir()+"/c.yaml")
	_, _, err = run(t, t.Context(), "join", l.Addr().String(), "--code", "7F3KQ-M2X9T-7F3KQ-M2X9T", "--name", "n1", "--token", "TOKENTOKEN", "--endpoint", "192.0.2.1")
	if err == nil || !strings.Contains(err.Error(), "not from a node that knows the code") {
		t.Errorf("got %v", err)
	}
	if i.got == nil || strings.Contains(i.got.String(), "TOKENTOKEN") {
		t.Errorf("the token was sent in clear: %v", i.got)
	}
}
