package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
		err = r.boot(t, s, i.First, want, m)
	}
	r.booted++
	t.Logf("» booted %s, state %d of flush %d: %s, generation %d, after %s", m.Name, s.Number, s.Interval, want.Version, want.Generation, time.Since(start).Round(100*time.Millisecond))
	if err != nil {
		r.fail(t, s, m, fmt.Errorf("booted: %w", err))
	}
}

// secondCut is what states are counted under whose power was cut again, while the node started after the first cut.
const secondCut = "a second cut"

// boot starts the machine, and has it recorded, too: what a node does after a power cut may be cut itself.
func (r *rebuilding) boot(t *testing.T, s *powercut.State, event int, want judge.Found, may mark) (err error) {
	m := r.s.Machine
	m.Dir, m.Record = r.n.machineDir(), logFile
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
	if err := errors.Join(s.Save(filepath.Join(m.Dir, endFile)), s.Save(filepath.Join(m.Dir, baseFile)), m.Start(t.Context(), nil)); err != nil {
		return err
	}
	generations, err := r.agrees(t, want, may)
	if err = errors.Join(err, m.Stop(t.Context(), 0)); err != nil {
		return err
	}
	second := mark{Name: secondCut, Where: fmt.Sprintf("%s, state %d of flush %d, and then", may.Name, s.Number, s.Interval)}
	second.Versions, second.Generations, second.Owned = []string{want.Version}, append(slices.Clone(generations), want.Generation), may.Owned
	if strings.Contains(want.Entry, "+") { // the firmware counts another try, and may lose the name over it
		second.Versions = []string{firstVersion, secondVersion}
	}
	return r.again(t, m.Dir, second)
}

// again looks at what the power may leave if it is cut while the node starts.
func (r *rebuilding) again(t *testing.T, dir string, second mark) error {
	log, err := os.Open(filepath.Join(dir, logFile))
	if err != nil {
		return err
	}
	defer log.Close()
	fi, err := log.Stat()
	if err != nil {
		return err
	}
	if fi.Size() == 0 { // the node wrote nothing: there is nothing that a second cut could change
		return nil
	}
	rec, err := powercut.ReadLog(log, fi.Size())
	if err != nil {
		return err
	}
	disk, err := os.OpenFile(filepath.Join(dir, baseFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer disk.Close()
	p, err := powercut.NewReplay(rec, disk)
	if err != nil {
		return err
	}
	for i, err := p.Next(nil); i != nil || err != nil; i, err = p.Next(i) {
		if err != nil {
			return err
		}
		if err := r.lookAt(t, i, 1+min(i.Writes(), 2), second); err != nil {
			return err
		}
	}
	end, err := os.Open(filepath.Join(dir, endFile))
	if err != nil {
		return err
	}
	defer end.Close()
	return p.Same(end)
}

// agrees waits until the node says what it is to its owner, and compares: the version must be the judge's, and the configuration one that may be there. It is
// another one than the judge's where the last block of a transaction is torn: the kernel (jbd2 of 6.12) is content with the first sector of that, e2fsck wants all.
func (r *rebuilding) agrees(t *testing.T, want judge.Found, m mark) (generations []uint64, err error) {
	deadline := time.Now().Add(5 * time.Minute)
	for {
		generations, err = r.ask(t, want, m)
		if generations != nil {
			return generations, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("not within 5 minutes: %w", err)
		}
		wait(t.Context(), 300*time.Millisecond)
	}
}

// ask calls the node once. It returns the generations that the node may have by what it says; none if it may say something else later.
func (r *rebuilding) ask(t *testing.T, want judge.Found, m mark) ([]uint64, error) {
	conn, err := client.Dial(fmt.Sprintf("127.0.0.1:%d", r.n.apiPort), r.n.credentials(t))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	c, err := configv1.NewConfigClient(conn).Get(ctx, &configv1.GetRequest{})
	nobody := err != nil && (status.Code(err) == codes.NotFound || strings.Contains(err.Error(), "unknown authority"))
	if nobody && want.Generation == 0 && !m.Owned { // without a configuration, or without an owner
		return m.Generations, nil
	}
	if err != nil { // also that it knows no owner or no configuration: it may not have found STATE yet
		return nil, fmt.Errorf("the judge finds generation %d of the owner %.8q; the node says: %w", want.Generation, want.Owner, err)
	}
	u, err := updatev1.NewUpdateClient(conn).GetStatus(ctx, &updatev1.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	runs := ""
	for _, slot := range u.Slots {
		if slot.Running {
			runs = slot.Version
		}
	}
	if runs != want.Version {
		return []uint64{c.Generation}, fmt.Errorf("the node runs %q, the judge finds %s", runs, want.Version)
	}
	if c.Generation != want.Generation {
		t.Logf("» the node takes generation %d, the judge %d", c.Generation, want.Generation)
	}
	return []uint64{c.Generation}, r.allowed(m, judge.Found{Version: runs, Owner: r.owner, Generation: c.Generation, Documents: c.Documents})
}
