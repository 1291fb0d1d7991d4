package security

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/hardening"
)

// good is a node on a machine that brings everything.
func good() Facts {
	f := Facts{
		Cmdline: "bulkhead " + hardening.CommandLine(), Params: map[string]string{}, Lockdown: "none [integrity] confidentiality", SigEnforce: "Y",
		LSM: "lockdown,capability,landlock,yama,ipe", Filesystems: "nodev\ttmpfs\n\text4", Root: "CRYPT-VERITY-0123-bulkhead-root",
		Volumes: map[string]string{"bulkhead-STATE": "CRYPT-LUKS2-12-bulkhead-STATE", "bulkhead-VAR": "CRYPT-LUKS2-34-bulkhead-VAR"},
		UEFI:    true, SecureBoot: "1", SetupMode: "0", TPM: "2", Watchdog: Watchdog{"i6300ESB timer", true, "60"},
	}
	for _, p := range hardening.Params {
		f.Params[p.Name] = p.Value
	}
	return f
}

func TestGood(t *testing.T) {
	all := Report(good())
	if len(all) < len(hardening.Words)+len(hardening.Params)+10 {
		t.Errorf("only %d settings", len(all))
	}
	for _, s := range all {
		if !s.OK || s.Name == "" || s.Actual == "" || s.Why == "" {
			t.Errorf("%+v", s)
		}
	}
	if text := Trouble(all); text != "" {
		t.Errorf("trouble: %s", text)
	}
}

// TestReport: each row changes one fact of a good node; exactly the settings that it names are not ok.
func TestReport(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Facts)
		want   string // "name: actual" of those not ok, advisory ones in brackets
	}{
		{"nothing", func(*Facts) {}, ""},
		{"more lockdown", func(f *Facts) { f.Lockdown = "none integrity [confidentiality]" }, ""},
		{"no lockdown", func(f *Facts) { f.Lockdown = "[none] integrity confidentiality" }, "lockdown: none"},
		{"securityfs not there", func(f *Facts) { f.Lockdown, f.LSM = "", "" }, "lockdown: unknown, lsm.landlock: unknown, lsm.lockdown: unknown, lsm.yama: unknown"},
		{"unsigned modules", func(f *Facts) { f.SigEnforce = "N" }, "module.sig_enforce: 0"},
		{"debugfs", func(f *Facts) { f.Filesystems += "\nnodev\tdebugfs" }, "debugfs: on"},
		{"a later word wins", func(f *Facts) { f.Cmdline += " init_on_alloc=0" }, "init_on_alloc: 0"},
		{"and again", func(f *Facts) { f.Cmdline += " init_on_alloc=0 init_on_alloc=1" }, ""},
		{"a word without value is missing", func(f *Facts) { f.Cmdline = strings.Replace(f.Cmdline, "slab_nomerge", "", 1) }, "slab_nomerge: not set"},
		{"part of a word", func(f *Facts) { f.Cmdline = strings.Replace(f.Cmdline, "slab_nomerge", "xslab_nomerge", 1) }, "slab_nomerge: not set"},
		{"a parameter", func(f *Facts) { f.Params["kernel.kptr_restrict"] = "0" }, "kernel.kptr_restrict: 0"},
		{"core files", func(f *Facts) { f.Params["kernel.core_pattern"] = "core" }, "kernel.core_pattern: core"},
		{"a parameter that the kernel lacks", func(f *Facts) { delete(f.Params, "dev.tty.ldisc_autoload") }, "dev.tty.ldisc_autoload: not in this kernel"},
		{"modules are open", func(f *Facts) { f.Params["kernel.modules_disabled"] = "0" }, "kernel.modules_disabled: 0"},
		{"no landlock", func(f *Facts) { f.LSM = "lockdown,yama,ipe" }, "lsm.landlock: not active"},
		{"root not verified", func(f *Facts) { f.Root = "CRYPT-LUKS2-1" }, "root.verity: not verified"},
		{"started without firmware", func(f *Facts) { f.UEFI, f.SecureBoot, f.SetupMode = false, "", "" }, "[firmware.secure-boot: no UEFI], [firmware.setup-mode: no UEFI]"},
		{"no Secure Boot", func(f *Facts) { f.SecureBoot = "0" }, "[firmware.secure-boot: off]"},
		{"setup mode", func(f *Facts) { f.SetupMode = "1" }, "[firmware.setup-mode: on]"},
		{"a firmware of its own mind", func(f *Facts) { f.SecureBoot = "" }, "[firmware.secure-boot: unknown to the firmware]"},
		{"no TPM", func(f *Facts) { f.TPM = "" }, "[tpm: none]"},
		{"emulated", func(f *Facts) { f.Cmdline += " nokaslr"; f.Vulnerable = []string{"l1tf", "mds"} }, "[kaslr: off], [mitigations: 2 missing]"},
		{"plain VAR", func(f *Facts) { delete(f.Volumes, "bulkhead-VAR") }, "[encryption.VAR: none]"},
		{"no watchdog", func(f *Facts) { f.Watchdog = Watchdog{} }, "[watchdog: none in this machine]"},
		{"a watchdog that nobody opened", func(f *Facts) { f.Watchdog.Active = false }, "watchdog: inactive"},
		{"no ipe", func(f *Facts) { f.LSM = "lockdown,landlock,yama" }, ""},
	} {
		f := good()
		c.change(&f)
		var got []string
		for _, s := range Report(f) {
			switch text := s.Name + ": " + s.Actual; {
			case !s.OK && s.Advisory:
				got = append(got, "["+text+"]")
			case !s.OK:
				got = append(got, text)
			}
		}
		if text := strings.Join(got, ", "); text != c.want {
			t.Errorf("%s: not ok are %s; want %s", c.name, text, c.want)
		}
	}
}

func TestTrouble(t *testing.T) {
	f := good()
	f.Params, f.TPM = nil, ""
	f.Lockdown = "[none] integrity"
	text := Trouble(Report(f))
	if !strings.HasPrefix(text, "lockdown is none, wanted integrity; ") || !strings.Contains(text, "dev.tty.ldisc_autoload is unknown, wanted 0") ||
		!strings.HasSuffix(text, " more: bhctl get security") || strings.Contains(text, "tpm") {
		t.Errorf("got %s", text)
	}
}

// TestRead reads a tree as the kernel has it.
func TestRead(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"proc/cmdline": "bulkhead lockdown=integrity\n", "proc/filesystems": "nodev\ttmpfs\n",
		"proc/self/mountinfo":                   "1 0 253:0 / / ro - squashfs /dev/dm-0 ro\n2 1 0:5 / /proc rw - proc proc rw\n",
		hardening.ParamsFile:                    "kernel.core_pattern\t\nkernel.usermodehelper.bset\t0 0\n",
		"sys/kernel/security/lockdown":          "none [integrity] confidentiality\n",
		"sys/kernel/security/lsm":               "lockdown,yama",
		"sys/block/dm-0/dm/name":                "bulkhead-root\n",
		"sys/block/dm-0/dm/uuid":                "CRYPT-VERITY-1-bulkhead-root\n",
		"sys/block/dm-1/dm/name":                "bulkhead-STATE\n",
		"sys/block/dm-1/dm/uuid":                "CRYPT-LUKS2-2-bulkhead-STATE\n",
		"sys/class/tpm/tpm0/x":                  "",
		"sys/class/watchdog/watchdog0/identity": "i6300ESB timer\n", "sys/class/watchdog/watchdog0/state": "active\n", "sys/class/watchdog/watchdog0/timeout": "60\n",
		"sys/module/module/parameters/sig_enforce":        "Y\n",
		"sys/devices/system/cpu/vulnerabilities/mds":      "Vulnerable: Clear CPU buffers attempted, no microcode\n",
		"sys/devices/system/cpu/vulnerabilities/meltdown": "Mitigation: PTI\n",
		"sys/firmware/efi/efivars/SecureBoot" + efiGlobal: "\x06\x00\x00\x00\x01",
		"sys/firmware/efi/efivars/SetupMode" + efiGlobal:  "\x06\x00\x00\x00\x00",
	} {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f := Read(root)
	if v, ok := f.Params["kernel.core_pattern"]; !ok || v != "" || f.Params["kernel.usermodehelper.bset"] != "0 0" {
		t.Errorf("parameters %q", f.Params)
	}
	if f.Lockdown != "none [integrity] confidentiality" || f.SigEnforce != "Y" || f.LSM != "lockdown,yama" || f.Root != "CRYPT-VERITY-1-bulkhead-root" ||
		f.Volumes["bulkhead-STATE"] != "CRYPT-LUKS2-2-bulkhead-STATE" || f.TPM != "" || !f.UEFI || f.SecureBoot != "1" || f.SetupMode != "0" ||
		strings.Join(f.Vulnerable, " ") != "mds" || f.Watchdog != (Watchdog{"i6300ESB timer", true, "60"}) || f.Cmdline != "bulkhead lockdown=integrity" {
		t.Errorf("%+v", f)
	}
	if none := Read(t.TempDir()); none.UEFI || none.Params != nil || len(none.Volumes) != 0 || none.Watchdog.Name != "" {
		t.Errorf("of nothing: %+v", none)
	}
}
