package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
)

// lanSwitchCmd is what "up" starts for the network between the machines of a cluster; nobody types it.
func (a *app) lanSwitchCmd() *cobra.Command {
	return &cobra.Command{Use: "lan-switch NAME", Short: "Carry frames between the machines of a local cluster", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return qemu.RunLAN(cmd.Context(), args[0], slog.New(slog.NewTextHandler(a.err, nil)))
		}}
}

// startSwitch starts the switch of a cluster's network as a process of its own, which goes on without this program. One that runs is no error.
func startSwitch(ctx context.Context, name string) error {
	c, err := qemu.LANControl(name)
	if err != nil {
		return err
	}
	if _, err := c.Status(ctx); err == nil {
		return nil
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(c.Dir, "switch.log")
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", "lan-switch", name)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a closed terminal does not end it
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the switch: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the switch, at the latest with this program
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, err := c.Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case e := <-ended:
			if _, again := c.Status(ctx); again == nil {
				return nil // another one was quicker
			}
			text, _ := os.ReadFile(path)
			return fmt.Errorf("the switch ended at once: %w: %s", errors.Join(e, err), oneLine(string(text)))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the switch does not answer: %w (its log is %s)", err, path)
		}
	}
}
