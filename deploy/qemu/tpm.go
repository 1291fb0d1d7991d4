package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	tpmProgram = "swtpm"
	tpmPidFile = "swtpm.pid"
	tpmLogFile = "swtpm.log"

	// TPMFolder is where a machine's TPM keeps what it is told to keep. To remove it is to put another TPM into the machine.
	TPMFolder = "tpm"

	// tpmFD is QEMU's end of the connection: the first descriptor behind standard error.
	tpmFD = 3
	// tpmLimit is how long a TPM may take to see that its machine is gone; it takes a few milliseconds.
	tpmLimit = 5 * time.Second
)

func (m Machine) checkTPM() error {
	if !m.TPM {
		return nil
	}
	if _, err := exec.LookPath(tpmProgram); err != nil {
		return fmt.Errorf("%s is missing: install the package swtpm (on Debian and Ubuntu)", tpmProgram)
	}
	return nil
}

// startTPM starts the machine's TPM as a daemon of its own and returns QEMU's end of the connection to it, nil if there is no TPM. The
// TPM ends by itself when QEMU does.
//
// The two are connected before either runs: no socket has a name, which would be too long in a deep folder and might be stale.
func (m Machine) startTPM(ctx context.Context) (_ *os.File, err error) {
	if !m.TPM {
		return nil, nil
	}
	if err := m.stopTPM(ctx, tpmLimit); err != nil { // of the last time: two would share one state
		return nil, err
	}
	state := filepath.Join(m.Dir, TPMFolder)
	if err := os.MkdirAll(state, 0o700); err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "tpm"), os.NewFile(uintptr(pair[1]), "tpm")
	defer theirs.Close()
	// Absolute names: a daemon works in another folder.
	cmd := exec.CommandContext(ctx, tpmProgram, "socket", "--tpm2", "--tpmstate", "dir="+state+",mode=0600", "--ctrl", fmt.Sprintf("type=unixio,clientfd=%d", tpmFD),
		"--terminate", "--daemon", "--pid", "file="+m.path(tpmPidFile), "--log", "file="+m.path(tpmLogFile))
	cmd.ExtraFiles = []*os.File{theirs}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil { // --daemon: it is ready when its parent exits
		ours.Close()
		return nil, fmt.Errorf("%s: %w: %s (its log is %s)", tpmProgram, err, lastLine(out.String()), m.path(tpmLogFile))
	}
	return ours, nil
}

// stopTPM returns when the machine's TPM has ended; QEMU must have. One that does not see it within grace is told.
func (m Machine) stopTPM(ctx context.Context, grace time.Duration) error {
	p := m.process(tpmPidFile, tpmProgram)
	if p == nil {
		return nil
	}
	if err := waitExit(ctx, p.Pid, grace); err == nil || ctx.Err() != nil {
		return err
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		return ended(err)
	}
	if err := waitExit(ctx, p.Pid, tpmLimit); err != nil {
		return errors.Join(fmt.Errorf("%s of machine %s: %w", tpmProgram, m.Name, err), ended(p.Signal(unix.SIGKILL)))
	}
	return nil
}
