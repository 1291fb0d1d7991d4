package main

import (
	"errors"
	"testing"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
)

func TestInstallNote(t *testing.T) {
	for _, c := range []struct {
		st   *storagev1.Status
		err  error
		want string
	}{
		{nil, errors.New("connection refused"), "the node does not answer (connection refused)"},
		{&storagev1.Status{Install: &storagev1.Install{State: "copying", Step: "copy the root", DoneBytes: 3 << 20, TotalBytes: 12 << 20, ElapsedSeconds: 2, ExpectedSeconds: 8}}, nil,
			"copy the root: 3.0 MiB of 12.0 MiB, 2s of about 8s"},
		{&storagev1.Status{Install: &storagev1.Install{State: "waiting"}}, nil, "it restarts when its recovery key was written down: bhctl storage keys recovery"},
		{&storagev1.Status{Install: &storagev1.Install{State: "restarting", Disk: "/dev/vda"}}, nil, "it restarts from /dev/vda"},
		{&storagev1.Status{Error: "install root: the medium is damaged", Pending: []string{"install root"}}, nil, "install root: the medium is damaged"},
		{&storagev1.Status{Pending: []string{"mkfs ext4"}}, nil, "mkfs ext4"},
	} {
		if note, _ := installNote(c.st, c.err); note != c.want {
			t.Errorf("got %q, want %q", note, c.want)
		}
	}
	if wantsInstall("apiVersion: bulkhead.dev/v1\nkind: Storage\n") || !wantsInstall("apiVersion: bulkhead.dev/v1\nkind: Storage\ninstall: {disk: {serial: a}}\n") {
		t.Error("whether a document installs is read wrong")
	}
}
