package trustd

import (
	"crypto/x509"
	"os"
	"strings"
	"testing"
	"time"

	trustv1 "github.com/bulkhead-os/bulkhead/api/trust/v1"
	"github.com/bulkhead-os/bulkhead/internal/claim"
	"github.com/bulkhead-os/bulkhead/internal/errs"
)

// While STATE is locked nobody can claim the node, however long that takes; once it is open its keys are the node's.
func TestLockedState(t *testing.T) {
	m := newMachine(t)
	now := time.Unix(1e9, 0)
	m.cfg.Now = func() time.Time { return now }
	m.mountState()
	old := m.start()
	_, csr := request(t, x509.CertificateRequest{})
	if _, err := old.claim(&trustv1.ClaimRequest{Csr: csr, ChannelBinding: binding, Proof: claim.ClientProof(m.code(), binding, csr)}); err != nil {
		t.Fatal(err)
	}
	away := m.cfg.StateDir + "-away"
	m.must(os.Rename(m.cfg.StateDir, away))
	m.reboot()
	m.partition("STATE")
	m.must(os.WriteFile(m.cfg.Locked, []byte("tpm: the image was changed\n"), 0o444))
	d := m.start()
	if s, _ := d.trust.Get(); !s.GetLocked() || s.GetClaimed() {
		t.Errorf("trust is %v", s)
	}
	now = now.Add(time.Hour)
	m.must(d.settle())
	if out := m.console.String(); strings.Contains(out, "Claim code") || strings.Count(out, "bhctl unlock") != 1 || !strings.Contains(out, "\n  tpm: the image was changed\n") {
		t.Errorf("the console says %s", out)
	}
	m.must(os.Chmod(m.cfg.Locked, 0o600))
	m.must(os.WriteFile(m.cfg.Locked, []byte("kms: no route to host\n"), 0o600))
	m.must(d.settle())
	m.must(d.settle())
	if out := m.console.String(); strings.Count(out, "bhctl unlock") != 2 || !strings.Contains(out, "\n  kms: no route to host\n") {
		t.Errorf("with another reason the console says %s", out)
	}
	if _, err := d.claim(&trustv1.ClaimRequest{Csr: csr, ChannelBinding: binding}); !errs.Is(err, errs.Unavailable) {
		t.Errorf("claimed: %v", err)
	}
	m.must(os.Remove(m.cfg.Locked)) // open, but not mounted yet
	m.must(d.settle())
	if out := m.console.String(); strings.Contains(out, "Claim code") {
		t.Errorf("the console says %s", out)
	}
	m.must(os.Rename(away, m.cfg.StateDir))
	m.must(d.settle())
	if s, _ := d.trust.Get(); s.GetLocked() || !s.GetClaimed() {
		t.Errorf("in the end trust is %v", s)
	}
}
