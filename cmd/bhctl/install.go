package main

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// How long an installation usually takes at most, restart included, and how long it is waited for.
const (
	installUsual = 5 * time.Minute
	installLimit = 30 * time.Minute
	installLook  = 3 * time.Second // that an answer may take: while the machine restarts there is none
)

// wantsInstall reports whether documents, which are valid, say that the system is to be installed.
func wantsInstall(text string) bool {
	set, err := config.Parse("", []byte(text))
	return err == nil && set.Storage.Install.Wanted()
}

// install shows how the node copies itself to its disk and restarts, and returns when it runs from there.
func (a *app) install(ctx context.Context, p *progress) error {
	return p.step(ctx, "install the system", installUsual, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, installLimit)
		defer cancel()
		told := ""
		for {
			var st *storagev1.Status
			err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
				ctx, cancel := context.WithTimeout(ctx, installLook)
				defer cancel()
				st, err = storagev1.NewStorageClient(conn).GetStatus(ctx, &storagev1.GetStatusRequest{})
				return err
			})
			i := st.GetInstall()
			if err == nil && i.GetState() == "running" {
				return nil
			}
			if err == nil && i.GetState() == "medium" {
				return fmt.Errorf("the system is installed on %s, but the firmware started another disk: take that away, or put %s first in the firmware's order, and restart", i.Disk, i.Disk)
			}
			note, key := installNote(st, err)
			if p.say(note); !p.live && key != told && note != "" {
				fmt.Fprintf(p.w, "%5s  · %s\n", round(time.Since(p.start)), note)
			}
			told = key
			if err := pause(ctx, time.Second); err != nil {
				return fmt.Errorf("not installed: %s", note)
			}
		}
	})
}

// installNote is what the node does, and a key that changes when it is worth another line.
func installNote(st *storagev1.Status, err error) (note, key string) {
	i := st.GetInstall()
	switch {
	case err != nil:
		return "the node does not answer (" + oneLine(errs.Text(err)) + ")", "away"
	case i.GetStep() != "" && i.GetTotalBytes() > 0:
		return fmt.Sprintf("%s: %s of %s, %ds of about %ds", i.Step, bytesText(i.DoneBytes), bytesText(i.TotalBytes), i.ElapsedSeconds, i.ExpectedSeconds),
			fmt.Sprint(i.Step, 4*i.DoneBytes/i.TotalBytes)
	case i.GetState() == "waiting":
		return "it restarts when its recovery key was written down: bhctl storage keys recovery", "waiting"
	case i.GetState() == "restarting":
		return "it restarts from " + i.Disk, "restarting"
	case st.GetError() != "":
		return oneLine(st.Error), st.Error
	case len(st.GetPending()) > 0:
		return st.Pending[0], st.Pending[0]
	}
	return "", ""
}
