package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	configv1 "github.com/bulkhead-os/bulkhead/api/config/v1"
	updatev1 "github.com/bulkhead-os/bulkhead/api/update/v1"
	"github.com/bulkhead-os/bulkhead/deploy/qemu"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/powercut"
	"github.com/bulkhead-os/bulkhead/test/judge"
)

// reallyBoot powers a machine on with a rebuilt disk, and with the TPM and the firmware's variables of that moment. The node must be what the judge says.
func (r *rebuilding) reallyBoot(t *testing.T, i *powercut.Interval, number int, m mark) {
	t.Helper()
	start := time.Now()
	s, err := i.State(number)
	if err != nil {
		t.Fatal(err)
	}
	want, err := r.judge.Look(s)
	if err == nil {
		err = r.boot(t, s, i.First, want)
	}
	r.booted++
	t.Logf("» booted %s, state %d of flush %d: %s, generation %d, after %s", m.Name, s.Number, s.Interval, want.Version, want.Generation, time.Since(start).Round(100*time.Millisecond))
	if err != nil {
		r.fail(t, s, m, fmt.Errorf("booted: %w", err))
	}
}

func (r *rebuilding) boot(t *testing.T, s *powercut.State, event int, want judge.Found) (err error) {
	m := r.s.Machine
	m.Dir, m.Record = r.n.machineDir(), ""
	for j := range m.Forwards {
		m.Forwards[j].Host = map[int]int{50000: r.n.apiPort, 50001: r.n.gatewayPort, 6443: r.n.kubePort}[m.Forwards[j].Guest]
	}
	if err := os.MkdirAll(filepath.Join(m.Dir, qemu.TPMFolder), 0o700); err != nil {
		return err
	}
	defer func() {
		kerr := m.Kill(context.WithoutCancel(t.Context()))
		if err != nil {
			r.n.keep(t)
		}
		err = errors.Join(err, kerr, os.RemoveAll(m.Dir))
	}()
	at := r.s.TPM[0]
	for _, o := range r.s.TPM {
		if o.Log <= r.rec.Place(event) {
			at = o
		}
	}
	const tpm = qemu.TPMFolder + "/tpm2-00.permall"
	for to, from := range map[string]string{
		"cmdline": "cmdline", "vmlinuz": "vmlinuz", qemu.ClaimKeyFile: qemu.ClaimKeyFile, qemu.VarsFile: filepath.Join(at.Dir, qemu.VarsFile), tpm: filepath.Join(at.Dir, tpm),
	} {
		b, err := os.ReadFile(filepath.Join(r.s.dir, from))
		if err == nil {
			err = os.WriteFile(filepath.Join(m.Dir, to), b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	if err := errors.Join(s.Save(filepath.Join(m.Dir, "disk.raw")), m.Start(t.Context(), nil)); err != nil {
		return err
	}
	return r.agrees(t, want)
}

// agrees waits until the node says what it is to its owner, and compares.
func (r *rebuilding) agrees(t *testing.T, want judge.Found) error {
	deadline := time.Now().Add(5 * time.Minute)
	for {
		done, err := r.ask(t, want)
		if done {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within 5 minutes: %w", err)
		}
		wait(t.Context(), 300*time.Millisecond)
	}
}

// ask calls the node once; done is false if it may say something else later.
func (r *rebuilding) ask(t *testing.T, want judge.Found) (done bool, err error) {
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", r.n.apiPort), r.n.credentials(t))
	if err != nil {
		return true, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	c, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
	switch {
	case err == nil && (c.Generation != want.Generation || c.Documents != want.Documents):
		return true, fmt.Errorf("the node has generation %d, the judge finds %d", c.Generation, want.Generation)
	case status.Code(err) == codes.NotFound && want.Owner != "" && want.Generation == 0, err != nil && strings.Contains(err.Error(), "unknown authority") && want.Owner == "":
		return true, nil
	case err != nil: // also that it knows no owner or no configuration: it may not have found STATE yet
		return false, fmt.Errorf("the judge finds generation %d of the owner %.8q; the node says: %w", want.Generation, want.Owner, err)
	}
	u, err := updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
	if err != nil {
		return false, err
	}
	for _, slot := range u.Slots {
		if slot.Running && slot.Version == want.Version {
			return true, nil
		}
		if slot.Running {
			return true, fmt.Errorf("the node runs %s, the judge finds %s", slot.Version, want.Version)
		}
	}
	return false, errors.New("no slot runs")
}
