package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// State is what a machine is doing.
type State string

// The states of a machine.
const (
	Absent  State = "absent"  // never created, or removed
	Stopped State = "stopped" // powered off
	Running State = "running" // QEMU runs; the guest may still be starting
)

// Status is what can be told of a machine from outside.
type Status struct {
	State State
	PID   int       // of QEMU, 0 unless running
	Since time.Time // when it was powered on, zero unless running
}

// Status looks at the machine.
func (m Machine) Status() Status {
	if _, err := os.Stat(filepath.Join(m.Dir, configFile)); err != nil {
		return Status{State: Absent}
	}
	p := m.running()
	if p == nil {
		return Status{State: Stopped}
	}
	s := Status{State: Running, PID: p.Pid}
	if fi, err := os.Stat(m.pidPath()); err == nil {
		s.Since = fi.ModTime()
	}
	return s
}

// Start powers the machine on and returns when QEMU runs, which goes on without this program. Forwards without a port
// have one afterwards. Starting one that runs is no error. log is told what was decided; nil is fine.
func (m *Machine) Start(ctx context.Context, log func(string)) error {
	if m.running() != nil {
		return nil
	}
	if err := m.Check(); err != nil {
		return err
	}
	cmdline, err := os.ReadFile(filepath.Join(m.Dir, "cmdline"))
	if err != nil {
		return err
	}
	if err := m.choosePorts(); err != nil {
		return err
	}
	if err := m.save(); err != nil {
		return err
	}
	accel, why := m.Accel, "as asked"
	if accel == "" {
		accel, why = chooseAccel(ctx, filepath.Join(m.Dir, "vmlinuz"))
	}
	if log != nil {
		log(fmt.Sprintf("accelerator %s: %s", accel, why))
	}
	if err := errors.Join(m.rotateConsole(), m.makeRecord()); err != nil {
		return err
	}
	tsc := hostTSC()
	if m.Slow != 0 && (accel != accelTCG || tsc == 0) {
		return fmt.Errorf("machine %s: slow clocks need emulation (this is %s) and a time stamp counter of one rate (this host's counts %d kHz; 0 is unknown)", m.Name, accel, tsc)
	}
	env, err := m.slowEnv(time.Now())
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(m.Dir, ClaimKeyFile))
	cmd := exec.CommandContext(ctx, program, m.args(string(cmdline), accel, tsc, err == nil)...)
	cmd.Env = env
	cmd.Dir = m.Dir
	tpm, err := m.startTPM(ctx)
	if err != nil {
		return err
	}
	if tpm != nil {
		defer tpm.Close()
		cmd.ExtraFiles = []*os.File{tpm}
	}
	if m.LAN != "" {
		dir, err := os.Open(m.Dir)
		if err != nil {
			return errors.Join(err, m.stopTPM(ctx, 0))
		}
		defer dir.Close()
		cmd.ExtraFiles = []*os.File{tpm, dir} // without a TPM the first stays closed
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil { // -daemonize: QEMU is ready when its parent exits
		if tpm != nil {
			tpm.Close()
		}
		return errors.Join(fmt.Errorf("%s: %w: %s", program, err, lastLine(out.String())), m.stopTPM(ctx, 0)) // it has no machine that could leave it
	}
	return nil
}

// makeRecord makes the file that the disk's writes are recorded in. One that is there has another story, which must not be mixed with this one.
func (m Machine) makeRecord() error {
	if m.Record == "" {
		return nil
	}
	f, err := os.OpenFile(m.path(m.Record), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("record of the disk: %w", err)
	}
	return f.Close()
}

// rotateConsole keeps the console of the last time as console.1.log.
func (m Machine) rotateConsole() error {
	err := os.Rename(m.Console(), filepath.Join(m.Dir, "console.1.log"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Stop presses the power button, and pulls the plug if the machine still runs after grace. With a grace of 0 it
// pulls the plug at once; what the guest has written stays written.
func (m Machine) Stop(ctx context.Context, grace time.Duration) error {
	p := m.running()
	if p == nil {
		return nil
	}
	if grace > 0 && m.QMP(ctx, "system_powerdown") == nil {
		if err := m.off(ctx, p, grace); err == nil || ctx.Err() != nil {
			return err
		}
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		return ended(err)
	}
	if err := m.off(ctx, p, 10*time.Second); err == nil || ctx.Err() != nil {
		return err
	}
	return m.Kill(ctx)
}

// Kill cuts the power: QEMU gets no chance to finish anything.
func (m Machine) Kill(ctx context.Context) error {
	p := m.running()
	if p == nil {
		return nil
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		return ended(err)
	}
	return m.off(ctx, p, 30*time.Second)
}

// Reset presses the reset button.
func (m Machine) Reset(ctx context.Context) error { return m.QMP(ctx, "system_reset") }

// Wait returns when the machine is off.
func (m Machine) Wait(ctx context.Context, limit time.Duration) error {
	p := m.running()
	if p == nil {
		return nil
	}
	return m.off(ctx, p, limit)
}

// off waits until QEMU has ended, and with it the TPM, whose state is then on the disk.
func (m Machine) off(ctx context.Context, p *os.Process, limit time.Duration) error {
	if err := waitExit(ctx, p.Pid, limit); err != nil {
		return err
	}
	return m.stopTPM(ctx, tpmLimit)
}
