package etcdd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	controlv1 "github.com/bulkhead-os/bulkhead/api/control/v1"
	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	storev1 "github.com/bulkhead-os/bulkhead/api/store/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// takeSnapshot returns a whole snapshot.
func takeSnapshot(ctx context.Context, t *testing.T, n *node) []byte {
	t.Helper()
	s, err := n.etcd.StreamSnapshot(ctx, &etcdv1.StreamSnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(m.GetData()) > chunk {
			t.Fatalf("chunk of %d bytes, want at most %d", len(m.GetData()), chunk)
		}
		all = append(all, m.GetData()...)
	}
	if len(all) < 4096+sha256.Size {
		t.Fatalf("snapshot has %d bytes", len(all))
	}
	body, sum := all[:len(all)-sha256.Size], all[len(all)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		t.Error("the snapshot's checksum is wrong")
	}
	return all
}

// order sends a snapshot back.
func order(ctx context.Context, n *node, data []byte, force bool) error {
	s, err := n.etcd.Restore(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&etcdv1.RestoreRequest{Force: force}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for piece := range slices.Chunk(data, chunk) {
		if err := s.Send(&etcdv1.RestoreRequest{Data: piece}); err != nil {
			break // the answer says why
		}
	}
	_, err = s.CloseAndRecv()
	return err
}

// Of two members one is lost for good, and so the quorum; a snapshot brings back what was in it.
func TestRestore(t *testing.T) {
	t.Parallel()
	nodes := trio(t)
	n1, n2 := nodes[0], nodes[1]
	n2.start(t)
	n2.until(t, converged)
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	c := n1.store(t)
	before, err := c.Write(ctx, put("before", "1", 0))
	if err != nil {
		t.Fatal(err)
	}
	data := takeSnapshot(ctx, t, n1)
	if _, err := c.Write(ctx, put("after", "1", 0)); err != nil {
		t.Fatal(err)
	}
	if err := order(ctx, n1, data, false); !errs.Is(err, errs.Precondition) || !strings.Contains(errs.Text(err), "by force") {
		t.Errorf("restore over a cluster that answers: %v, want a refusal", err)
	}
	n2.stop(t)
	n1.until(t, func(*controlv1.State) bool { return n1.status(t).GetState() == "error" })
	damaged := slices.Clone(data)
	damaged[len(damaged)/2] ^= 1
	for what, d := range map[string][]byte{"damaged": damaged, "cut": data[:len(data)-4096], "empty": nil} {
		if err := order(ctx, n1, d, false); !errs.Is(err, errs.Invalid) || !strings.Contains(errs.Text(err), "no whole snapshot") {
			t.Errorf("restore of a %s snapshot: %v, want a refusal", what, err)
		}
	}
	if err := order(ctx, n1, data, false); err != nil {
		t.Fatal(err)
	}
	n1.until(t, converged)
	alone(ctx, t, n1, before.GetRevision())

	// The other one is still of the cluster that is no more.
	n2.start(t)
	n2.until(t, pendingHas("wait for member"))
	if _, err := n2.etcd.Leave(ctx, &etcdv1.LeaveRequest{}); err == nil {
		t.Error("a member without quorum left in order")
	}
	if _, err := n2.etcd.Leave(ctx, &etcdv1.LeaveRequest{Force: true}); err != nil {
		t.Fatal(err)
	}
	n2.until(t, pendingHas("left the cluster by order"))
	if _, err := n2.etcd.Rejoin(ctx, &etcdv1.RejoinRequest{}); err != nil {
		t.Fatal(err)
	}
	n2.until(t, converged)
	if r, err := n2.store(t).Read(ctx, &storev1.ReadRequest{Prefix: own}); err != nil || len(r.GetEntries()) != 1 {
		t.Errorf("n2 reads %v, %v, want what was in the snapshot", r, err)
	}
}

// alone: the restored member has what the snapshot had, and revisions that nobody saw before.
func alone(ctx context.Context, t *testing.T, n *node, seen uint64) {
	t.Helper()
	r, err := n.store(t).Read(ctx, &storev1.ReadRequest{Prefix: own})
	if err != nil || len(r.GetEntries()) != 1 || r.GetEntries()[0].GetKey() != own+"before" {
		t.Errorf("restored: %v, %v, want what was written before the snapshot", r, err)
	}
	if r.GetRevision() < seen+revisionBump {
		t.Errorf("revision is %d, want more than %d, so that no watcher takes old for new", r.GetRevision(), seen+revisionBump)
	}
	st := n.status(t)
	if st.GetState() != "running" || len(st.GetMembers()) != 1 || st.GetMembers()[0].GetName() != n.name {
		t.Errorf("restored: %v, want one member", st)
	}
	entries, err := os.ReadDir(n.cfg.DataDir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "member" {
		t.Errorf("data folder: %v, %v, want the member alone", entries, err)
	}
}
