package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/deploy/qemu/lan"
)

// lanSwitchCmd is what "up" starts for the network between the machines of a cluster; nobody types it.
func (a *app) lanSwitchCmd() *cobra.Command {
	return &cobra.Command{Use: "lan-switch NAME", Short: "Carry frames between the machines of a local cluster", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return qemu.RunLAN(cmd.Context(), args[0], slog.New(slog.NewTextHandler(a.err, nil)))
		}}
}

// switchLimit is how long a switch may take to start, and to plug all machines in; it takes a fraction of a second.
const switchLimit = 15 * time.Second

// startSwitch starts the switch of a cluster's network as a process of its own, which goes on without this program, and returns when the machines are plugged in. One that runs
// is no error.
func startSwitch(ctx context.Context, name string, machines []*qemu.Machine) error {
	c, err := qemu.LANControl(name)
	if err != nil {
		return err
	}
	ended := make(chan error, 1) // stays empty if the switch runs already
	path := filepath.Join(c.Dir, "switch.log")
	if _, err := c.Status(ctx); err != nil {
		if err := spawnSwitch(name, path, ended); err != nil {
			return fmt.Errorf("start the switch: %w", err)
		}
	}
	for deadline := time.Now().Add(switchLimit); ; {
		st, err := c.Status(ctx)
		if err == nil {
			err = unplugged(st, machines)
		}
		if err == nil {
			return nil
		}
		select {
		case e := <-ended:
			if _, again := c.Status(ctx); again != nil { // else another one was quicker
				text, _ := os.ReadFile(path)
				return fmt.Errorf("the switch ended at once: %w: %s", errors.Join(e, err), oneLine(string(text)))
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the network between the machines is not up after %s: %w (the switch's log is %s)", switchLimit, err, path)
		}
	}
}

// unplugged names a machine that the switch does not reach.
func unplugged(st lan.Status, machines []*qemu.Machine) error {
	for _, m := range machines {
		if !slices.ContainsFunc(st.Ports, func(p lan.PortStatus) bool { return p.Name == m.Name }) {
			return fmt.Errorf("machine %s is not plugged in", m.Name)
		}
	}
	return nil
}

func spawnSwitch(name, logPath string, ended chan<- error) error {
	if err := os.MkdirAll(filepath.Dir(logPath), 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(logPath, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", "lan-switch", name)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a closed terminal does not end it
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { ended <- cmd.Wait() }() // ends with the switch, at the latest with this program
	return nil
}
