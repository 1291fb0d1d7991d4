package etcdd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"google.golang.org/grpc"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/dbsum"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// Files of a restore in the data folder.
const (
	restoreNew  = "restore.new" // being received
	restoreFile = "restore.db"  // received whole; it stays until the new member is in its place
	restoreDir  = "restore"     // where the new member is made
)

// After a restore revisions go on far above those of the snapshot, and older ones are compacted: who watched the lost cluster must not take new
// changes for ones that it has seen (https://etcd.io/docs, "Restoring with revision bump").
const revisionBump = 1_000_000_000

// Restore receives first, and changes nothing before it has all.
func (s *server) Restore(in grpc.ClientStreamingServer[etcdv1.RestoreRequest, etcdv1.RestoreResponse]) error {
	m := s.d.kernel
	if !m.swept.Load() {
		return errs.New(errs.Unavailable, "restore: volume VAR is not there yet")
	}
	done, err := s.d.keeper.alone(in.Context())
	if err != nil {
		return errs.New(errs.Of(err), "restore: %w", err)
	}
	defer done()
	first, err := in.Recv()
	if err != nil {
		return err
	}
	if s.status(in.Context()).GetState() == "running" && !first.GetForce() {
		return errs.New(errs.Precondition, "restore: etcd answers here, with all that was written; to replace that by a snapshot, order it by force")
	}
	size, err := s.get(in.Context(), first, in.Recv)
	if err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(m.cfg.DataDir, restoreNew), filepath.Join(m.cfg.DataDir, restoreFile)); err != nil {
		return err
	}
	if _, err := m.changePhase(restoring); err != nil {
		return err
	}
	s.d.env.Log.Warn("restore ordered: what was written since the snapshot is lost", "step", "member restore")
	s.d.loop.Wake()
	return in.SendAndClose(&etcdv1.RestoreResponse{Bytes: uint64(size)})
}

// get brings the snapshot to restoreNew, whole: one that comes in, or one that this node has made.
func (s *server) get(ctx context.Context, first *etcdv1.RestoreRequest, next func() (*etcdv1.RestoreRequest, error)) (int64, error) {
	to := filepath.Join(s.d.kernel.cfg.DataDir, restoreNew)
	if first.GetName() == "" {
		return receive(to, first, next)
	}
	if len(first.GetData()) > 0 {
		return 0, errs.New(errs.Invalid, "restore: both a name and data; give one of them")
	}
	if _, err := next(); !errors.Is(err, io.EOF) {
		return 0, errors.Join(err, errs.New(errs.Invalid, "restore: more comes after the name of a snapshot; nothing was changed"))
	}
	return s.d.keeper.link(ctx, first.GetName(), to)
}

// sweep deletes what an interrupted restore or snapshot left, unless it goes on.
func sweep(dir string) error {
	p, err := readPhase(dir)
	if err != nil {
		return err
	}
	left := []string{restoreNew, filepath.Join(snapshotsDir, snapshotNew)}
	if p != restoring {
		left = append(left, restoreFile, restoreDir)
	}
	for _, name := range left {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, name)))
	}
	return err
}

// receive writes a snapshot to a file, and returns its size when it is on the disk and its sum is right.
func receive(path string, first *etcdv1.RestoreRequest, next func() (*etcdv1.RestoreRequest, error)) (size int64, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	var sum dbsum.Sum
	for m := first; ; {
		if size += int64(len(m.GetData())); size > quota+dbsum.Size {
			return 0, errs.New(errs.Invalid, "restore: more than %d bytes, which is the most that a database may have", quota)
		}
		if _, err := io.MultiWriter(&sum, f).Write(m.GetData()); err != nil {
			return 0, err
		}
		if m, err = next(); errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	if !sum.Whole() {
		return 0, errs.New(errs.Invalid, "restore: %d bytes that are no whole snapshot: its SHA-256, which is the last %d bytes, is wrong; nothing was changed", size, dbsum.Size)
	}
	return size, f.Sync()
}

// restore makes a member of the received snapshot, in the place of the one that was. Interrupted anywhere, it begins again from the file.
func (m *member) restore(name, url string) error {
	dir := m.cfg.DataDir
	made := filepath.Join(dir, restoreDir)
	if err := os.RemoveAll(made); err != nil {
		return err
	}
	err := snapshot.NewV3(m.newZap()).Restore(snapshot.RestoreConfig{
		SnapshotPath: filepath.Join(dir, restoreFile), Name: name, OutputDataDir: made,
		PeerURLs: []string{url}, InitialCluster: name + "=" + url, InitialClusterToken: "bulkhead-" + rand.Text(),
		RevisionBump: revisionBump, MarkCompacted: true,
	})
	if err != nil {
		return fmt.Errorf("make a member of the snapshot: %w", err)
	}
	if err := dropData(dir); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(made, "member"), filepath.Join(dir, "member")); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	if _, err := m.changePhase(inCluster, restoring); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(made), os.Remove(filepath.Join(dir, restoreFile)))
}
