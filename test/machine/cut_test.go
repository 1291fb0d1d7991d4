package machine

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
)

// TestCut cuts the power during an apply. QEMU is killed; what the guest had written is in the host's page cache and stays, also with
// cache=unsafe: this models a guest that loses its power, with a disk that keeps what it was given, in the order in which it was given.
// A disk that loses what it did not flush is not modelled.
func TestCut(t *testing.T) {
	t.Run("a later apply", cutLater)
	t.Run("the first apply", cutFirst)
}

// cutDocuments is a configuration of which every version differs in both kinds, so that half of one would show.
func cutDocuments(version string) string {
	return fmt.Sprintf("apiVersion: bulkhead.dev/v1\nkind: Machine\nhostname: cut-%s\n---\napiVersion: bulkhead.dev/v1\nkind: Cluster\nname: test\nnames: [localhost, 127.0.0.1, cut-%s.example]\n", version, version)
}

// cutLater: the document is the old or the new one, whole; one that was answered is never lost.
func cutLater(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	running := cutDocuments("first")
	n.upBare(t, running)
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	conn := n.connect(t)
	// How long an apply takes on this host says where the moments are.
	var whole time.Duration
	for _, version := range []string{"second", "third"} { // right after the boot it takes longer than ever after
		start := time.Now()
		running = cutDocuments(version)
		if _, err := n.apply(t.Context(), conn, running); err != nil {
			t.Fatal(err)
		}
		whole = time.Since(start).Round(time.Millisecond)
	}
	var kept, replaced int
	var early, late time.Duration // the latest moment that left the old document, the earliest that left the new one
	delay := whole / 2
	for i := range 6 {
		next := cutDocuments(fmt.Sprint(i))
		answered := n.cut(t, conn, m, next, func(ctx context.Context) { wait(ctx, delay) })
		conn.Close()
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		var now *configv1.GetResponse
		conn = n.reach(t, "the document is read with the old credentials", func(r *configv1.GetResponse, err error) bool {
			now = r
			return err == nil
		})
		switch {
		case now.Documents == next:
			replaced++
			late = delay
		case now.Documents != running:
			t.Fatalf("cut %d, %s after the call: the node runs neither the old nor the new document:\n%s", i, delay, now.Documents)
		case answered:
			t.Fatalf("cut %d: the apply was answered and is lost; generation %d runs", i, now.Generation)
		default:
			kept++
			early = delay
		}
		running = now.Documents
		t.Logf("» cut %s after the call of %s: answered %v, new document %v, generation %d", delay, whole, answered, running == next, now.Generation)
		if out := n.run(t, "bhctl", "get", "config"); strings.TrimSpace(out) != strings.TrimSpace(running) {
			t.Errorf("bhctl get config prints another document:\n%s", out)
		}
		n.whole(t, conn, now.Generation)
		// The next moment is nearer to the one at which the document is written.
		if delay = (early + late) / 2; late <= early {
			delay = early * 2
		}
	}
	t.Logf("» %d cuts in an apply of %s: %d left the old document, %d the new one", kept+replaced, whole, kept, replaced)
	if kept == 0 || replaced == 0 {
		t.Error("the cuts were all on one side of the write: this tests nothing")
	}
	// And the node still takes a new one.
	last := cutDocuments("last")
	if _, err := n.apply(t.Context(), conn, last); err != nil {
		t.Fatal(err)
	}
}

func (n *node) connect(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", n.apiPort), n.credentials(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// reach waits until a call with the stored credentials ends in a way that done accepts, and returns the connection of that call. Each try has its own
// connection: QEMU accepts for a guest that is not there yet, and such a connection never becomes a good one.
func (n *node) reach(t *testing.T, what string, done func(*configv1.GetResponse, error) bool) (conn *grpc.ClientConn) {
	t.Helper()
	eventually(t, 90*time.Second, what, func() error {
		conn = n.connect(t)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		r, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
		if !done(r, err) {
			conn.Close()
			return fmt.Errorf("%v, %w", r, err)
		}
		return nil
	})
	return conn
}

func (n *node) apply(ctx context.Context, conn *grpc.ClientConn, documents string) (*configv1.ApplyResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return configv1.NewConfigClient(conn).Apply(ctx, &configv1.ApplyRequest{Documents: documents, Name: "cut.yaml"})
}

// cut applies documents and cuts the power when moment returns; it reports whether the node had answered by then.
func (n *node) cut(t *testing.T, conn *grpc.ClientConn, m qemu.Machine, documents string, moment func(context.Context)) (answered bool) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	start := time.Now()
	go func() {
		_, err := n.apply(ctx, conn, documents)
		if err == nil {
			t.Logf("» the apply was answered after %s", time.Since(start).Round(time.Millisecond))
		}
		done <- err
	}()
	moment(ctx)
	if err := m.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	err := <-done
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		t.Errorf("the apply failed by itself: %v", err)
	}
	return err == nil
}

// whole looks at what else a cut could have broken: the history, and the volumes.
func (n *node) whole(t *testing.T, conn *grpc.ClientConn, generation uint64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	h, err := configv1.NewConfigClient(conn).ListHistory(ctx, &configv1.ListHistoryRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range h.Generations {
		if i == 0 && g.Generation != generation {
			t.Errorf("the newest generation is %d, %d runs", g.Generation, generation)
		}
		if i > 0 && g.Generation >= h.Generations[i-1].Generation {
			t.Errorf("the history is not in order: %v", h.Generations)
		}
	}
	if len(h.Generations) == 0 {
		t.Error("the history is empty")
	}
	eventually(t, 30*time.Second, "STATE and VAR are mounted", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		l, err := storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
		if err != nil {
			return err
		}
		mounted := 0
		for _, v := range l.Volumes {
			if v.State == "mounted" {
				mounted++
			}
		}
		if mounted < 2 {
			return fmt.Errorf("%v", l.Volumes)
		}
		return nil
	})
}

// cutFirst: after a cut while STATE is made, the node is unclaimed, or claimed by the same owner, or configured; "bhctl up" goes on from each.
func cutFirst(t *testing.T) {
	documents := cutDocuments("one")
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	file := filepath.Join(n.dir, "node.yaml")
	if err := os.WriteFile(file, []byte(documents), 0o600); err != nil {
		t.Fatal(err)
	}
	// The first moment is the worst: a partition STATE that nobody can mount, which might be another system's. trustd waits a minute
	// before it lets anybody claim the node.
	for _, after := range []time.Duration{0, 250 * time.Millisecond, 600 * time.Millisecond} {
		m := n.create(t)
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		n.claim(t, m)
		conn := n.reach(t, "the owner is let in", func(_ *configv1.GetResponse, err error) bool { return status.Code(err) == codes.NotFound })
		start := time.Now()
		answered := n.cut(t, conn, m, documents, func(ctx context.Context) {
			for ctx.Err() == nil && time.Since(start) < 20*time.Second && !formatted(t, m) {
				wait(ctx, 2*time.Millisecond)
			}
			wait(ctx, after)
		})
		took := time.Since(start)
		conn.Close()
		if err := m.Start(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		state := n.found(t)
		t.Logf("» first apply cut %s after the file system was made, %s after the call: answered %v; the node is %s", after, took.Round(time.Millisecond), answered, state)
		if answered && state != "configured" {
			t.Errorf("%s: the apply was answered, and the node is %s", after, state)
		}
		if err := n.bare(t.Context(), file); err != nil {
			t.Fatalf("%s: the node is stuck: %v", after, err)
		}
		var now *configv1.GetResponse
		conn = n.reach(t, "the document is read", func(r *configv1.GetResponse, err error) bool {
			now = r
			return err == nil
		})
		if now.Documents != documents {
			t.Fatalf("%s: the document is %q", after, now.Documents)
		}
		n.whole(t, conn, now.Generation)
		conn.Close()
		n.run(t, "bhctl", "down", "--name", n.name)
	}
}

// formatted looks at the machine's disk from outside: is there a file system in a partition STATE?
func formatted(t *testing.T, m qemu.Machine) bool {
	t.Helper()
	disk, err := os.Open(filepath.Join(m.Dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	table := make([]byte, 128*128) // the entries of a GPT: 128 of 128 bytes, from sector 2
	if _, err := disk.ReadAt(table, 1024); err != nil {
		t.Fatal(err)
	}
	for e := range slices.Chunk(table, 128) {
		if !bytes.HasPrefix(e[56:], []byte("S\x00T\x00A\x00T\x00E\x00\x00\x00")) {
			continue
		}
		magic := make([]byte, 2)
		if _, err := disk.ReadAt(magic, int64(binary.LittleEndian.Uint64(e[32:]))*512+1024+56); err != nil {
			t.Fatal(err)
		}
		return magic[0] == 0x53 && magic[1] == 0xef // of ext4
	}
	return false
}

const cutKey = "7K3M97K3M97K3M97K3M9"

// create makes the machine that "bhctl up" would make, without starting it.
func (n *node) create(t *testing.T) qemu.Machine {
	t.Helper()
	m, err := qemu.New(n.name)
	if err != nil {
		t.Fatal(err)
	}
	m.Memory, m.CPUs = 2048, 1 // as bare's
	m.Forwards = []qemu.Forward{{Name: "api", Host: n.apiPort, Guest: 50000}, {Name: "gateway", Host: n.gatewayPort, Guest: 50001}, {Name: "kubernetes", Host: n.kubePort, Guest: 6443}}
	if err := m.Create(filepath.Join(n.root, "out/image"), []byte(cutKey)); err != nil {
		t.Fatal(err)
	}
	return m
}

// claim makes this user the owner, in the context that "bhctl up" uses.
func (n *node) claim(t *testing.T, m qemu.Machine) {
	t.Helper()
	eventually(t, 90*time.Second, "the node is claimed", func() error {
		_, err := n.try(t.Context(), 5*time.Second, "bhctl", "claim", fmt.Sprintf("127.0.0.1:%d", m.Port(50000)), "--code", cutKey, "--as", n.name)
		return err
	})
}

// found says what the node is after a cut, to the credentials from before it: "configured", "claimed", or "unclaimed".
func (n *node) found(t *testing.T) (state string) {
	t.Helper()
	n.reach(t, "the node says what it is", func(_ *configv1.GetResponse, err error) bool {
		switch {
		case err == nil:
			state = "configured"
		case status.Code(err) == codes.NotFound:
			state = "claimed"
		case strings.Contains(err.Error(), "unknown authority"):
			state = "unclaimed"
		}
		return state != ""
	}).Close()
	return state
}
