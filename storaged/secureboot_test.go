package storaged

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	storagev1 "github.com/bulkhead-os/bulkhead/api/storage/v1"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	"github.com/bulkhead-os/bulkhead/internal/fat"
	"github.com/bulkhead-os/bulkhead/storaged/enrol"
	"github.com/bulkhead-os/bulkhead/storaged/probe"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// TestEnrollKeys: what would leave a machine that does not start, or a disk that stays locked unawares, is refused, and nothing is written.
func TestEnrollKeys(t *testing.T) {
	const global = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	set := func(dir, name string, value byte) {
		if err := os.WriteFile(filepath.Join(dir, name+global), []byte{6, 0, 0, 0, value}, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		spoil func(vars string, fw *firmware, m *model)
		want  string
	}{
		"no UEFI":      {func(vars string, fw *firmware, _ *model) { fw.vars = enrol.Firmware(vars + "/none") }, "not started by UEFI"},
		"Secure Boot":  {func(vars string, _ *firmware, _ *model) { set(vars, "SetupMode", 0); set(vars, "SecureBoot", 1) }, "Secure Boot is on"},
		"others' keys": {func(vars string, _ *firmware, _ *model) { set(vars, "SetupMode", 0) }, "not in setup mode: restart the machine if"},
		"no keys":      {func(vars string, fw *firmware, _ *model) { fw.keys = vars }, "db.auth: no such file"},
		"nothing on ESP": {func(_ string, fw *firmware, _ *model) {
			fw.esp = func(func(string, *fat.File) error) error { return nil }
		}, "nothing on the EFI partition"},
		"no ESP": {func(_ string, fw *firmware, _ *model) {
			fw.esp = func(func(string, *fat.File) error) error { return errors.New("no partition ESP") }
		}, "no partition ESP"},
	} {
		vars, keys := t.TempDir(), t.TempDir()
		set(vars, "SetupMode", 1)
		set(vars, "SecureBoot", 0)
		for _, n := range []string{"db", "KEK", "PK"} {
			if err := os.WriteFile(filepath.Join(keys, n+".auth"), signedUpdate(n), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		m := machine(imageDisk("/dev/vda", 8*gib))
		fw := firmware{vars: enrol.Firmware(vars), keys: keys, esp: func(func(string, *fat.File) error) error { return nil }}
		c.spoil(vars, &fw, m)
		s := secureBootServer{d: &Daemon{kernel: &fake{m: m}}, fw: fw}
		if _, err := s.EnrollKeys(t.Context(), &storagev1.EnrollKeysRequest{AllowLocked: true}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if left, _ := filepath.Glob(vars + "/db-*"); len(left) > 0 {
			t.Errorf("%s: written was %v", name, left)
		}
	}
}

// signedUpdate is one that a firmware in a test takes.
func signedUpdate(name string) []byte {
	b := make([]byte, 16+24)
	b[16], b[22], b[23] = 24, 0xf1, 0x0e
	return append(b, name...)
}

// A STATE that opens by nothing but the TPM is locked at the next start: somebody has to say that this is fine.
func TestEnrollKeysLocks(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	state := m.Disks[0].part(5)
	state.Content = probe.Result{Kind: probe.LUKS}
	for name, c := range map[string]struct {
		keys  []vault.Kind
		locks bool
	}{
		"TPM": {[]vault.Kind{vault.Recovery, vault.TPM}, true}, "TPM and key file": {[]vault.Kind{vault.Recovery, vault.TPM, vault.KeyFile}, false}, "people's": {[]vault.Kind{vault.Recovery}, false},
	} {
		state.LUKS = vault.Header{}
		for i, k := range c.keys {
			state.LUKS.Keys = append(state.LUKS.Keys, vault.Key{Slot: i, Kind: k})
		}
		if got := locksWithKeys(m.State); got != c.locks {
			t.Errorf("%s: %v", name, got)
		}
	}
	if locksWithKeys(machine(imageDisk("/dev/vda", 8*gib)).State) {
		t.Error("no STATE: locked")
	}
	if err := mayEnrol(true, false); !errs.Is(err, errs.Precondition) || mayEnrol(true, true) != nil || mayEnrol(false, false) != nil {
		t.Errorf("got %v", err)
	}
}
