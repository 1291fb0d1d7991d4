package machine

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// TestFull fills a node's volumes to the last block while it is off, with debugfs, since a node has no shell to do it with: the API answers
// and says so, no configuration is lost, and with room again all is as before.
func TestFull(t *testing.T) {
	n := newNode(t)
	t.Setenv("BULKHEAD_MACHINES", filepath.Join(n.dir, "machines"))
	running := cutDocuments("first")
	n.upBare(t, running)
	m, err := qemu.Load(n.name)
	if err != nil {
		t.Fatal(err)
	}
	conn := n.connect(t)
	st, err := storagev1.NewStorageClient(conn).GetStatus(t.Context(), &storagev1.GetStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	at := map[string]uint64{}
	for _, p := range st.Partitions {
		at[p.Label] = p.StartBytes
	}
	for _, volume := range []string{"VAR", "STATE"} {
		t.Run(volume, func(t *testing.T) {
			if at[volume] == 0 {
				t.Fatalf("no partition %s: %v", volume, at)
			}
			fs := fmt.Sprintf("%s?offset=%d", filepath.Join(n.machineDir(), "disk.raw"), at[volume])
			n.off(t, m)
			fill(t, fs)
			conn := n.restart(t, m)
			eventually(t, time.Minute, "the full volume is told", func() error {
				if out, _ := n.try(t.Context(), time.Minute, "bhctl", "health"); !strings.Contains(out, volume+" is full") {
					return fmt.Errorf("bhctl health:\n%s", out)
				}
				return nil
			})
			next := cutDocuments(strings.ToLower(volume))
			_, err := n.apply(t.Context(), conn, next)
			switch {
			case volume == "VAR" && err != nil:
				t.Errorf("a full VAR hinders an apply: %v", err)
			case volume == "VAR":
				running = next
			case err == nil || !strings.Contains(err.Error(), "STATE is full") || !strings.Contains(err.Error(), "nothing was changed"):
				t.Errorf("apply with a full STATE: %v", err)
			}
			if out := n.run(t, "bhctl", "get", "config"); strings.TrimSpace(out) != strings.TrimSpace(running) {
				t.Errorf("the node runs another document:\n%s\nwant\n%s", out, running)
			}
			conn.Close()
			n.off(t, m)
			debugfs(t, true, fs, "rm fill")
			conn = n.restart(t, m)
			defer conn.Close()
			if out := n.run(t, "bhctl", "get", "config"); strings.TrimSpace(out) != strings.TrimSpace(running) {
				t.Errorf("with room again the node runs another document:\n%s\nwant\n%s", out, running)
			}
			running = cutDocuments(strings.ToLower(volume) + "-after")
			if _, err := n.apply(t.Context(), conn, running); err != nil {
				t.Errorf("with room again: %v", err)
			}
			if out, _ := n.try(t.Context(), time.Minute, "bhctl", "health"); strings.Contains(out, "is full") {
				t.Errorf("with room again, bhctl health:\n%s", out)
			}
		})
	}
}

// off powers the machine off in order, so that its file systems are clean.
func (n *node) off(t *testing.T, m qemu.Machine) {
	t.Helper()
	n.run(t, "bhctl", "shutdown")
	if err := m.Wait(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
}

// restart powers the machine on and returns when it answers its owner.
func (n *node) restart(t *testing.T, m qemu.Machine) *grpc.ClientConn {
	t.Helper()
	if err := m.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return n.reach(t, "the node answers", func(_ *configv1.GetResponse, err error) bool { return err == nil })
}

var freeBlocks = regexp.MustCompile(`(?m)^Free blocks: +([0-9]+)$`)

// fill gives every free block of a file system to one file.
func fill(t *testing.T, fs string) {
	t.Helper()
	free := freeBlocks.FindStringSubmatch(debugfs(t, false, fs, "stats -h"))
	if free == nil {
		t.Fatal("debugfs does not tell the free blocks")
	}
	debugfs(t, true, fs, "write /dev/null fill")
	debugfs(t, true, fs, "fallocate fill 0 "+free[1]) // the last of these there is no room for: the file's own tree takes blocks too
	if left := freeBlocks.FindStringSubmatch(debugfs(t, false, fs, "stats -h")); left == nil || len(left[1]) > 2 {
		t.Fatalf("free blocks: %v are left of %s", left, free[1])
	}
}

func debugfs(t *testing.T, write bool, fs, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	args := []string{"-R", command, fs}
	if write {
		args = append([]string{"-w"}, args...)
	}
	out, err := exec.CommandContext(ctx, "/sbin/debugfs", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs %s: %v\n%s", command, err, out)
	}
	return string(out)
}
