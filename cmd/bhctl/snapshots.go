package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	etcdv1 "github.com/bulkhead-os/bulkhead/api/etcd/v1"
	"github.com/bulkhead-os/bulkhead/internal/dbsum"
)

func (a *app) etcdSnapshotCmd() *cobra.Command {
	r := &etcdv1.StreamSnapshotRequest{}
	c := &cobra.Command{Use: "snapshot FILE", Short: "Save the whole database, for bhctl etcd restore", Args: cobra.ExactArgs(1),
		Long:    "Save the whole database as it is now, or a snapshot that the node made by its schedule (bhctl etcd snapshots). The file is there only if it is whole and its\nsum is right.",
		Example: "  bhctl etcd snapshot etcd.snapshot\n  bhctl etcd snapshot etcd.snapshot --from 000012-20261126T160405Z-4711.db --node n1",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error { return a.saveSnapshot(ctx, conn, r, args[0]) })
		}}
	c.Flags().StringVar(&r.Name, "from", "", "one that the node has made, by its name")
	return c
}

// saveSnapshot makes the file whole or not at all.
func (a *app) saveSnapshot(ctx context.Context, conn *grpc.ClientConn, r *etcdv1.StreamSnapshotRequest, file string) error {
	s, err := etcdv1.NewEtcdClient(conn).StreamSnapshot(ctx, r)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".snapshot-*")
	if err != nil {
		return err
	}
	var sum dbsum.Sum
	for err == nil {
		var c *etcdv1.Chunk
		if c, err = s.Recv(); err == nil {
			_, err = io.MultiWriter(&sum, f).Write(c.Data)
		}
	}
	if errors.Is(err, io.EOF) {
		err = f.Sync()
		if !sum.Whole() {
			err = fmt.Errorf("%s was not written: %s came that are no whole snapshot, the SHA-256 at their end is wrong; try again, or take another one", file, bytesText(uint64(sum.Bytes())))
		}
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	_, err = fmt.Fprintf(a.err, "%s: %s\n", file, bytesText(uint64(sum.Bytes())))
	return err
}

func (a *app) etcdSnapshots(ctx context.Context, c etcdv1.EtcdClient, _ []string) error {
	r, err := c.ListSnapshots(ctx, &etcdv1.ListSnapshotsRequest{})
	if err != nil {
		return err
	}
	if err := a.print(r, func() *table {
		t := newTable("NAME", "MADE", "REVISION", "SIZE")
		for _, s := range r.Snapshots {
			t.add(s.Name, s.Made.AsTime().Local().Format(time.DateTime), fmt.Sprint(s.Revision), bytesText(s.Bytes))
		}
		return t
	}); err != nil || a.format != "table" {
		return err
	}
	switch every := time.Duration(r.EverySeconds) * time.Second; {
	case every == 0:
		_, err = fmt.Fprintln(a.err, "the node makes none by itself (Cluster.etcd.snapshots.every is 0)")
	case r.Error != "":
		_, err = fmt.Fprintf(a.err, "the last try failed: %s\n", r.Error)
	default:
		_, err = fmt.Fprintf(a.err, "one every %g hours, the newest %d are kept\n", every.Hours(), r.Keep)
	}
	return err
}

func (a *app) etcdRestoreCmd() *cobra.Command {
	first := &etcdv1.RestoreRequest{}
	c := &cobra.Command{Use: "restore [FILE]", Short: "Begin anew with a snapshot, when quorum is lost for good", Args: cobra.MaximumNArgs(1),
		Long: "Make the node's member the only one of a new cluster, with the content of a snapshot. What was written since the snapshot is lost. Nothing is changed before\n" +
			"the whole file was received and found right. Instead of a file --from takes a snapshot that is on the node (bhctl etcd snapshots). The members that are left on other nodes come in afterwards, each with bhctl etcd leave --force and\n" +
			"bhctl etcd rejoin.",
		Example: "  bhctl etcd restore etcd.snapshot --node n1\n  bhctl etcd leave --force --node n2\n  bhctl etcd rejoin --node n2",
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (first.Name != "") {
				return errors.New("give a FILE, or --from NAME of a snapshot that is on the node (bhctl etcd snapshots)")
			}
			return a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				return a.restoreSnapshot(ctx, conn, append(args, "")[0], first)
			})
		}}
	c.Flags().StringVar(&first.Name, "from", "", "one that the node has made, by its name")
	c.Flags().BoolVar(&first.Force, "force", false, "also if etcd answers: all that was written since the snapshot is lost")
	return c
}

// restorePiece is the size of the pieces in which a snapshot is sent, in bytes.
const restorePiece = 256 << 10

// restoreSnapshot sends a file; "" is none, and first has a name.
func (a *app) restoreSnapshot(ctx context.Context, conn *grpc.ClientConn, file string, first *etcdv1.RestoreRequest) error {
	var f io.Reader = strings.NewReader("")
	if file != "" {
		opened, err := os.Open(file)
		if err != nil {
			return err
		}
		defer opened.Close()
		f = opened
	}
	s, err := etcdv1.NewEtcdClient(conn).Restore(ctx)
	if err != nil {
		return err
	}
	err = s.Send(first)
	for buf := make([]byte, restorePiece); err == nil; {
		var n int
		if n, err = f.Read(buf); n > 0 {
			if e := s.Send(&etcdv1.RestoreRequest{Data: buf[:n]}); e != nil {
				break // the answer says why
			}
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	r, err := s.CloseAndRecv()
	if err != nil {
		return err
	}
	what := bytesText(r.Bytes) + " received"
	if first.Name != "" {
		what = first.Name + ", " + bytesText(r.Bytes) + ", was found right"
	}
	return a.say("%s; the member begins anew with it: bhctl etcd status shows how far it is\n", what)
}
