// Package security compares how the kernel and the machine are hardened with how they should be.
//
// Read gathers facts, Report judges them and is pure. What is wanted of the kernel stands in package hardening, for PID 1 too; what is
// wanted of the machine stands here. It changes nothing.
package security

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/hardening"
)

// A Setting is one line of the report.
type Setting struct {
	Name string
	// Wanted is "" if nothing is wanted, and the line only tells.
	Wanted string
	Actual string
	OK     bool
	Why    string
	// Advisory is true for what the machine or its owner bring; the rest is this node's own doing.
	Advisory bool
}

// Facts are what Report judges. A fact that could not be read is its zero value.
type Facts struct {
	Cmdline     string            // of the kernel
	Params      map[string]string // as PID 1 read them back; nil: it has not told yet
	Lockdown    string            // /sys/kernel/security/lockdown: "none [integrity] confidentiality"
	SigEnforce  string            // of modules: "Y" or "N"
	LSM         string            // those that are active, with commas
	Filesystems string            // /proc/filesystems
	Vulnerable  []string          // flaws of the processor that nothing guards against
	Root        string            // the device-mapper's id of the root's device
	Volumes     map[string]string // the device-mapper's name to its id, of encrypted volumes
	UEFI        bool
	SecureBoot  string // "1" or "0"; "" if the firmware has no such variable
	SetupMode   string // the same
	TPM         string // version: "2"
	Watchdog    Watchdog
}

// Watchdog is the hardware watchdog as sysfs shows it.
type Watchdog struct {
	Name    string // "" if there is none
	Active  bool
	Timeout string // seconds
}

const (
	empty   = "(empty)"
	unknown = "unknown"
	verity  = "CRYPT-VERITY-"
	luks    = "CRYPT-LUKS2-"
)

// Report is every setting, in the order: command line, kernel, parameters, machine.
func Report(f Facts) []Setting {
	var all []Setting
	add := func(s Setting) {
		if s.Actual == "" {
			s.Actual = unknown
		}
		s.OK = s.OK || s.Wanted == "" || s.Actual == s.Wanted
		all = append(all, s)
	}
	for _, w := range hardening.Words {
		add(word(w, f))
	}
	for _, name := range []string{"landlock", "lockdown", "yama"} {
		add(Setting{Name: "lsm." + name, Wanted: "active", Actual: lsm(f.LSM, name), Why: lsmWhy[name]})
	}
	for _, p := range hardening.Params {
		add(param(p, f.Params))
	}
	root := Setting{Name: "root.verity", Wanted: "dm-verity", Actual: "not verified", Why: "every block of the system is checked when it is read"}
	if strings.HasPrefix(f.Root, verity) {
		root.Actual = root.Wanted
	}
	add(root)
	for _, s := range machine(f) {
		s.Advisory = true
		add(s)
	}
	dog := Setting{Name: "watchdog", Wanted: "active", Actual: "none in this machine", Advisory: true, Why: "a machine that hangs is reset"}
	if d := f.Watchdog; d.Name != "" {
		dog.Advisory, dog.OK, dog.Actual = false, d.Active, "inactive"
		if d.Active {
			dog.Actual = fmt.Sprintf("active, %s s", d.Timeout)
		}
	}
	add(dog)
	return all
}

// Trouble is what is not ok of the node's own doing, in one sentence; "" if all is well.
func Trouble(all []Setting) string {
	const most = 3
	var bad []string
	for _, s := range all {
		if !s.OK && !s.Advisory {
			bad = append(bad, fmt.Sprintf("%s is %s, wanted %s", s.Name, s.Actual, s.Wanted))
		}
	}
	text := strings.Join(bad[:min(len(bad), most)], "; ")
	if len(bad) > most {
		text += fmt.Sprintf("; and %d more: bhctl get security", len(bad)-most)
	}
	return text
}

var lsmWhy = map[string]string{
	"landlock": "a program can give up rights for good",
	"lockdown": "without it, the word lockdown does nothing",
	"yama":     "without it, nothing limits ptrace",
}

func lsm(active, name string) string {
	switch {
	case active == "":
		return unknown
	case slices.Contains(strings.Split(active, ","), name):
		return "active"
	}
	return "not active"
}

// word judges a word of the command line by what it brought about, where that can be seen.
func word(w hardening.Word, f Facts) Setting {
	s := Setting{Name: w.Name, Wanted: w.Value, Why: w.Why}
	switch w.Name {
	case "lockdown":
		_, after, _ := strings.Cut(f.Lockdown, "[")
		s.Actual, _, _ = strings.Cut(after, "]")
		s.OK = s.Actual == "confidentiality" // which is more
		return s
	case "module.sig_enforce":
		s.Actual = map[string]string{"Y": "1", "N": "0"}[f.SigEnforce]
		return s
	case "debugfs":
		switch {
		case f.Filesystems == "":
		case slices.Contains(strings.Fields(f.Filesystems), "debugfs"):
			s.Actual = "on"
		default:
			s.Actual = "off"
		}
		return s
	}
	if w.Value == "" {
		s.Wanted = "set"
	}
	if s.Actual = "not set"; f.Cmdline == "" {
		s.Actual = unknown
	}
	for _, v := range strings.Fields(f.Cmdline) { // the last one counts
		name, value, _ := strings.Cut(v, "=")
		if name == w.Name && w.Value == "" {
			s.Actual = "set"
		} else if name == w.Name {
			s.Actual = value
		}
	}
	return s
}

func param(p hardening.Param, have map[string]string) Setting {
	s := Setting{Name: p.Name, Wanted: shown(p.Value), Why: p.Why}
	value, ok := have[p.Name]
	switch {
	case have == nil:
		s.Actual = unknown
	case !ok:
		s.Actual = "not in this kernel"
	default:
		s.Actual = shown(value)
	}
	return s
}

func shown(value string) string {
	if value == "" {
		return empty
	}
	return value
}

// machine is what the firmware, the hardware, or whoever started the machine decides.
func machine(f Facts) []Setting {
	onOff := map[string]string{"1": "on", "0": "off"}
	secure := Setting{Name: "firmware.secure-boot", Wanted: "on", Why: "only a signed boot loader and kernel start", Actual: onOff[f.SecureBoot]}
	setup := Setting{Name: "firmware.setup-mode", Wanted: "off", Why: "in setup mode anybody can put keys of his own into the firmware", Actual: onOff[f.SetupMode]}
	for _, s := range []*Setting{&secure, &setup} {
		if !f.UEFI {
			s.Actual = "no UEFI"
		} else if s.Actual == "" {
			s.Actual = "unknown to the firmware"
		}
	}
	tpm := Setting{Name: "tpm", Wanted: "2", Actual: shownOr(f.TPM, "none"), Why: "volumes open for this machine and signed systems only"}
	kaslr := Setting{Name: "kaslr", Wanted: "on", Actual: "on", Why: "the kernel lies at a random address"}
	if slices.Contains(strings.Fields(f.Cmdline), "nokaslr") {
		kaslr.Actual = "off"
	}
	flaws := Setting{Name: "mitigations", Wanted: "complete", Actual: "complete", Why: "flaws of the processor are guarded against"}
	if n := len(f.Vulnerable); n > 0 {
		flaws.Actual = strconv.Itoa(n) + " missing"
		flaws.Why += ", but for " + strings.Join(f.Vulnerable, ", ")
	}
	all := []Setting{secure, setup, tpm, kaslr, flaws}
	for _, v := range []string{"STATE", "VAR"} {
		s := Setting{Name: "encryption." + v, Wanted: "LUKS2", Actual: "none", Why: "a stolen disk tells nothing"}
		if strings.HasPrefix(f.Volumes["bulkhead-"+v], luks) {
			s.Actual = "LUKS2"
		}
		all = append(all, s)
	}
	return append(all, Setting{Name: "lsm.ipe", Actual: lsm(f.LSM, "ipe"), Why: "could bind programs to verified disks; it has no policy here"})
}

func shownOr(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}
