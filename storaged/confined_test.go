package storaged

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/bulkhead-os/bulkhead/config"
	"github.com/bulkhead-os/bulkhead/internal/unit"
	"github.com/bulkhead-os/bulkhead/internal/unit/unitfile"
	"github.com/bulkhead-os/bulkhead/storaged/tpm"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

// childKey names the variable that makes the test's program do one round on a bench's disk: "loop0 /root/of/targets".
const childKey = "STORAGED_TEST_ROUND"

func TestMain(m *testing.M) {
	if os.Getpid() == 1 { // the guest of TestVMCrypt
		guestInit()
	}
	if phase := os.Getenv(phaseKey); phase != "" {
		guestPhase(phase)
		os.Exit(0)
	}
	if what := os.Getenv(childKey); what != "" {
		if err := childRound(what); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// noVault is that of a machine without TPM and device-mapper.
func noVault(dir string) *vault.Vault {
	return vault.New(vault.Config{
		Mapper: func() (vault.Mapper, error) { return nil, os.ErrNotExist }, TPM: func() (*tpm.TPM, error) { return nil, os.ErrNotExist },
		Boot: dir, Key: dir + "/none", Cmdline: "/proc/cmdline", Runtime: dir, Firmware: dir, Blocks: dir, Dev: dir,
	})
}

func childRound(what string) error {
	l := newLinux(slog.New(slog.DiscardHandler), noVault("/nonexistent"))
	var name string
	if _, err := fmt.Sscan(what, &name, &l.root, &l.runtime); err != nil {
		return err
	}
	l.include = func(s string) bool { return s == name }
	l.rootDev = func() string { return attr(l.block(name), "dev") }
	ctx := context.Background()
	have, err := l.Read(ctx)
	if err != nil {
		return err
	}
	steps, err := plan(childSpec, have)
	for _, s := range steps {
		if e := l.Do(ctx, s); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", s, e))
		}
	}
	return err
}

var childSpec = config.Storage{StateSize: 64 * mib}

// TestConfined does everything as the user of the unit with the unit's capabilities, and shows that none of them can be spared.
func TestConfined(t *testing.T) {
	isolate(t)
	data, err := os.ReadFile("unit.json")
	if err != nil {
		t.Fatal(err)
	}
	u, err := unitfile.Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	missing := u.Capabilities &^ effective()
	if missing != 0 {
		t.Logf("PARTLY SKIPPED: root lacks the capabilities %#x here", missing)
	}
	caps := u.Capabilities &^ missing
	for _, without := range []string{"", "CHOWN", "DAC_OVERRIDE", "SYS_ADMIN", "SYS_RESOURCE"} {
		bit := unit.Capability(without)
		if bit&missing != 0 {
			continue
		}
		b := newBench(t, 3*gib, true)
		err := b.as(u.UID, caps&^bit)
		if without == "SYS_RESOURCE" || without == "" { // enough until the disk grows
			if err != nil {
				t.Errorf("without %q: %v", without, err)
			}
			b.resize(5 * gib)
			if err = b.as(u.UID, caps&^bit); missing != 0 {
				err = nil
			}
		}
		if (err != nil) != (without != "") {
			t.Errorf("without capability %q: %v", without, err)
		} else if err != nil && !strings.Contains(err.Error(), "permi") {
			t.Errorf("without capability %q: %v, want a permission that is missing", without, err)
		}
		if without == "" {
			b.checkMounts()
		}
		b.detach()
	}
}

// as does a round in a process with that user and just those capabilities.
func (b *bench) as(user uint32, caps uint64) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		b.t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3") // the program itself lies in a folder that only root may enter
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = []string{childKey + "=" + strings.TrimPrefix(b.loop.Name(), "/dev/") + " " + b.root + " " + b.runtime, "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	for bit := range 64 {
		if caps&(1<<bit) != 0 {
			cmd.SysProcAttr.AmbientCaps = append(cmd.SysProcAttr.AmbientCaps, uintptr(bit))
		}
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
