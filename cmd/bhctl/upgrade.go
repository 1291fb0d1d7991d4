package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// pieceSize is how much of an image is sent in one message, in bytes.
const pieceSize = 512 << 10

// upgradeFlags are what a user may choose about an upgrade.
type upgradeFlags struct {
	image, media, ca, username, passwordFile string
	noReboot                                 bool
	wait                                     time.Duration
	roll                                     rollingFlags
}

func (a *app) upgradeCmd() *cobra.Command {
	var f upgradeFlags
	c := &cobra.Command{Use: "upgrade --image IMAGE", Short: "Install another version of the system, restart, and wait until it is found good", Args: cobra.NoArgs,
		Long: `Install another version of the system into the idle slot, restart into it, and wait until it is found good.
The running version is untouched. If the new one does not prove its health, the machine goes back by itself.

IMAGE is one of
  registry.example.org/bulkhead:1.2.3   an OCI artifact, which the node fetches
  https://example.org/bulkhead.update   a bundle, which the node fetches
  out/image/bulkhead.update             a bundle on this machine, which is sent to the node; also a folder with one, or an OCI layout

Only what the node does not have yet is fetched. If it is interrupted, the same command goes on where it was.

With --cluster every node gets the image first, a few at the same time; nothing restarts until all have it, and this command must stay so long. Then they restart one after
the other, control planes first, in the cluster: each must be ready again and have found the new version good before the next one's turn, and a node that falls back halts it.
bhctl rolling status -w follows it from anywhere.`,
		Example: "  bhctl upgrade --image out/image\n  bhctl upgrade --image registry.example.org/bulkhead:1.2.3 --no-reboot\n  bhctl upgrade --media auto\n  bhctl upgrade --cluster --image out/image\n  bhctl upgrade --cluster --resume",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.roll.check(cmd, a.node); err != nil {
				return err
			}
			if f.roll.cluster {
				if cmd.Flags().Changed("wait") {
					return errors.New("--wait is for one node; with --cluster give --node-timeout")
				}
				return a.upgradeCluster(cmd.Context(), f)
			}
			return a.upgrade(cmd.Context(), f)
		}}
	fl := c.Flags()
	fl.StringVar(&f.image, "image", "", "what to install")
	fl.StringVar(&f.media, "media", "", "a device of the node that starts with a bundle, like /dev/sdb; auto finds the only one")
	fl.StringVar(&f.ca, "ca", "", "file with certificates (PEM) that the server's must lead to, instead of public authorities'")
	fl.StringVar(&f.username, "username", "", "user at the registry")
	fl.StringVar(&f.passwordFile, "password-file", "", "file with that user's password or token; - is standard input")
	fl.BoolVar(&f.noReboot, "no-reboot", false, "install only; the next restart tries it")
	fl.DurationVar(&f.wait, "wait", 30*time.Minute, "how long to wait for the new version to be found good; 0: not at all")
	f.roll.add(c)
	return c
}

// request makes the node's part of it; it is nil if the image is on this machine.
func (f upgradeFlags) request(a *app) (*updatev1.UpgradeRequest, error) {
	r := &updatev1.UpgradeRequest{Username: f.username}
	switch {
	case (f.image == "") == (f.media == ""):
		return nil, errors.New("name what to install: --image IMAGE or --media DEVICE")
	case f.media != "":
		r.Source = &updatev1.UpgradeRequest_Media{Media: f.media}
	case strings.HasPrefix(f.image, "https://") || strings.HasPrefix(f.image, "http://"):
		r.Source = &updatev1.UpgradeRequest_Url{Url: f.image}
	case exists(f.image):
		return nil, nil
	case strings.HasPrefix(f.image, "/") || strings.HasPrefix(f.image, "."):
		return nil, fmt.Errorf("%s: no such file", f.image)
	default:
		r.Source = &updatev1.UpgradeRequest_Oci{Oci: f.image}
	}
	if f.ca != "" {
		b, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, err
		}
		r.Ca = string(b)
	}
	if f.passwordFile != "" {
		var b []byte
		var err error
		if f.passwordFile == "-" {
			b, err = io.ReadAll(io.LimitReader(a.in, 64<<10))
		} else {
			b, err = os.ReadFile(f.passwordFile)
		}
		if err != nil {
			return nil, err
		}
		r.Password = strings.TrimSpace(string(b))
	}
	return r, nil
}

func (a *app) upgrade(ctx context.Context, f upgradeFlags) error {
	req, err := f.request(a)
	if err != nil {
		return err
	}
	var img *localImage
	if req == nil {
		if img, err = openImage(f.image); err != nil {
			return err
		}
		defer img.Close()
	}
	v := a.upgradeView()
	err = a.stream(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		if req != nil {
			s, err := updatev1.NewUpdateClient(conn).Upgrade(ctx, req)
			if err != nil {
				return err
			}
			return receive(s, v.show)
		}
		return upload(ctx, conn, img, v.show)
	})
	v.end()
	if err == nil && ctx.Err() != nil {
		return errors.New("stopped; nothing was changed. The same command goes on where it was")
	}
	if err != nil {
		if v.last != nil { // the node is there: what is wrong is what it says
			return errors.New(errs.Text(err))
		}
		return err
	}
	version := v.last.GetVersion()
	if f.noReboot {
		return a.say("%s is installed; the next restart tries it (bhctl reboot, or bhctl rollback to cancel)\n", version)
	}
	return a.restartInto(ctx, version, f.wait)
}

// upload sends the pieces of an image that the node asks for.
func upload(ctx context.Context, conn *grpc.ClientConn, img *localImage, show func(*updatev1.UpgradeProgress) error) error {
	s, err := updatev1.NewUpdateClient(conn).Upload(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&updatev1.UploadRequest{Manifest: img.raw, Signature: img.signature}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	buf := make([]byte, pieceSize)
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if p := m.GetProgress(); p != nil {
			if err := show(p); err != nil {
				return err
			}
		}
		if err := sendPiece(s, img, m.GetWant(), buf); err != nil {
			return err
		}
	}
}

func sendPiece(s grpc.BidiStreamingClient[updatev1.UploadRequest, updatev1.UploadResponse], img *localImage, want *updatev1.Piece, buf []byte) error {
	if want == nil {
		return nil
	}
	f := img.files[want.GetFile()]
	if f == nil {
		return fmt.Errorf("the node asks for %q, which the image does not have", want.GetFile())
	}
	for at, end := int64(want.GetOffset()), int64(want.GetOffset()+want.GetLength()); at < end; {
		b := buf[:min(int64(len(buf)), end-at)]
		if n, err := f.ReadAt(b, at); n < len(b) {
			return fmt.Errorf("read %s: %w", want.GetFile(), errors.Join(err, io.ErrUnexpectedEOF))
		}
		if err := s.Send(&updatev1.UploadRequest{Data: b}); err != nil {
			if errors.Is(err, io.EOF) {
				return nil // Recv says why
			}
			return err
		}
		at += int64(len(b))
	}
	return nil
}

// say prints a line for people; programs, which asked for JSON, get it on standard error.
func (a *app) say(format string, args ...any) error {
	w := a.out
	if a.format != "table" {
		w = a.err
	}
	_, err := fmt.Fprintf(w, format, args...)
	return err
}

// restartInto restarts the machine and waits until a version is found good, or was left.
func (a *app) restartInto(ctx context.Context, version string, wait time.Duration) error {
	if err := a.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := machinev1.NewMachineClient(conn).Reboot(ctx, &machinev1.RebootRequest{})
		return err
	}); err != nil {
		return err
	}
	if wait == 0 {
		return a.say("the machine restarts into %s; bhctl get slots shows what becomes of it\n", version)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	p := a.progress()
	if a.format != "table" {
		p.w, p.live = a.err, false
	}
	err := p.step(ctx, "restart into "+version+", until it is found good", wait, func(ctx context.Context) error { return a.waitGood(ctx, version, p.say) })
	if err != nil {
		return err
	}
	return a.say("%s runs and was found good\n", version)
}

// waitGood asks until the version is found good, or the node has gone back to another one.
func (a *app) waitGood(ctx context.Context, version string, say func(string)) error {
	ask := *a
	ask.timeout = 5 * time.Second
	last, down := "it does not answer", false // what the node tells before it has gone down may be older than the installation
	var leftAt time.Time
	for {
		var st *updatev1.Status
		err := ask.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
			// Asking machined is the proof that the API answers: see docs/updated.md.
			if _, err := machinev1.NewMachineClient(conn).GetVersion(ctx, &machinev1.GetVersionRequest{}); err != nil {
				return err
			}
			st, err = updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
			return err
		})
		good, why, left := judgeVersion(st, version)
		switch {
		case err != nil:
			last, down = "it does not answer", true
		case good:
			return nil
		case left && down:
			if leftAt.IsZero() {
				leftAt = time.Now()
			}
			if explained(st, version) || time.Since(leftAt) > reasonLimit {
				return errors.New(why)
			}
			last = "it was left; the node finds out why"
		default:
			last = why
		}
		say("· " + last)
		if err := pause(ctx, time.Second); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("%s was not found good in time: %s; it goes on without us (bhctl get slots --watch)", version, last)
			}
			return err
		}
	}
}

// reasonLimit is how long a node that is back may take to find out why it left a version.
const reasonLimit = time.Minute

// explained says whether the node knows why a version failed. One that did not fail needs no reason.
func explained(st *updatev1.Status, version string) bool {
	for _, v := range st.GetSlots() {
		if v.GetVersion() == version && v.GetStatus() == "failed" {
			return st.GetFailure().GetRootHash() == v.GetRootHash()
		}
	}
	return true
}

// judgeVersion says what became of a version: it is good; or it was left, and why; or it is not decided, and what is missing.
func judgeVersion(st *updatev1.Status, version string) (good bool, why string, left bool) {
	for _, v := range st.GetSlots() {
		if v.GetVersion() != version {
			continue
		}
		switch v.GetStatus() {
		case "good":
			if v.GetRunning() {
				return true, "", false
			}
			return false, "the machine has not gone down yet", false
		case "on trial":
			return false, v.GetDetail(), false
		}
		if v.GetRunning() {
			return false, v.GetDetail(), false
		}
		return false, fmt.Sprintf("%s was left: %s; the node runs %s again (bhctl why)", version, v.GetDetail(), runningVersion(st)), true
	}
	return false, "it is in no slot", st != nil
}

func runningVersion(st *updatev1.Status) string {
	for _, v := range st.GetSlots() {
		if v.GetRunning() {
			return v.GetVersion()
		}
	}
	return "another version"
}

func (a *app) rollbackCmd() *cobra.Command {
	var noReboot bool
	var wait time.Duration
	c := &cobra.Command{Use: "rollback", Short: "Go back to the other version, or cancel an upgrade that was not started yet", Args: cobra.NoArgs,
		Long: "Go back to the version in the other slot: it is verified, tried at the next boot, and has to prove its health again.\nThe running version stays what is fallen back to, if it was found good. An upgrade that was not started yet is cancelled instead.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r *updatev1.RollbackResponse
			err := a.stream(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) (err error) { // it reads a whole slot
				r, err = updatev1.NewUpdateClient(conn).Rollback(ctx, &updatev1.RollbackRequest{})
				return err
			})
			switch {
			case err != nil:
				return err
			case !r.GetRestart():
				return a.say("cancelled; the next boot starts %s, which runs\n", r.GetVersion())
			case noReboot:
				return a.say("the next restart starts %s\n", r.GetVersion())
			}
			return a.restartInto(cmd.Context(), r.GetVersion(), wait)
		}}
	c.Flags().BoolVar(&noReboot, "no-reboot", false, "prepare only; the next restart goes back")
	c.Flags().DurationVar(&wait, "wait", 30*time.Minute, "how long to wait for it to be found good; 0: not at all")
	return c
}

func (a *app) markGoodCmd() *cobra.Command {
	return &cobra.Command{Use: "mark-good", Short: "Say that the running version is good, although it has not proved it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
				r, err := updatev1.NewUpdateClient(conn).MarkGood(ctx, &updatev1.MarkGoodRequest{})
				if err != nil {
					return err
				}
				return a.say("%s is good\n", r.GetVersion())
			})
		}}
}
