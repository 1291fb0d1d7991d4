package security

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/bulkhead-os/bulkhead/internal/hardening"
)

// efiGlobal is the vendor of the variables that the UEFI specification names.
const efiGlobal = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"

// Read gathers the facts from /proc, /sys and PID 1's report. root is "/" but for tests. What cannot be read is left out: the
// report shows it as unknown.
func Read(root string) Facts {
	file := func(name string) string {
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(data))
	}
	f := Facts{
		Cmdline: file("proc/cmdline"), Params: params(filepath.Join(root, hardening.ParamsFile)), Lockdown: file("sys/kernel/security/lockdown"),
		SigEnforce: file("sys/module/module/parameters/sig_enforce"), LSM: file("sys/kernel/security/lsm"), Filesystems: file("proc/filesystems"),
		Volumes: map[string]string{}, TPM: file("sys/class/tpm/tpm0/tpm_version_major"),
	}
	const vars = "sys/firmware/efi/efivars/"
	if _, err := os.Stat(filepath.Join(root, "sys/firmware/efi")); err == nil {
		f.UEFI, f.SecureBoot, f.SetupMode = true, variable(file(vars+"SecureBoot"+efiGlobal)), variable(file(vars+"SetupMode"+efiGlobal))
	}
	flaws, _ := filepath.Glob(filepath.Join(root, "sys/devices/system/cpu/vulnerabilities/*")) // the pattern is right
	for _, name := range flaws {
		if data, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(data), "Vulnerable") {
			f.Vulnerable = append(f.Vulnerable, filepath.Base(name))
		}
	}
	devices, _ := filepath.Glob(filepath.Join(root, "sys/block/dm-*/dm")) // as above
	for _, dir := range devices {
		rel, err := filepath.Rel(root, dir)
		if err != nil {
			continue
		}
		name, id := file(rel+"/name"), file(rel+"/uuid")
		f.Volumes[name] = id
		if strings.HasSuffix(filepath.Dir(dir), "/"+rootDevice(file("proc/self/mountinfo"))) {
			f.Root = id
		}
	}
	const dog = "sys/class/watchdog/watchdog0/"
	f.Watchdog = Watchdog{Name: file(dog + "identity"), Active: file(dog+"state") == "active", Timeout: file(dog + "timeout")}
	return f
}

// variable is the value of a firmware's variable of one byte; the kernel puts four bytes of attributes in front.
func variable(data string) string {
	if len(data) != 5 {
		return ""
	}
	return map[byte]string{0: "0", 1: "1"}[data[4]]
}

// params reads PID 1's report; nil if there is none.
func params(path string) map[string]string {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	out := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		out[name] = value
	}
	return out
}

// rootDevice is the device that is mounted on /, without /dev/: "dm-0"; "" if it is none.
func rootDevice(mountinfo string) string {
	for line := range strings.Lines(mountinfo) {
		left, right, _ := strings.Cut(line, " - ")
		if l, r := strings.Fields(left), strings.Fields(right); len(l) >= 5 && len(r) >= 2 && l[4] == "/" {
			device, _ := strings.CutPrefix(r[1], "/dev/")
			return device
		}
	}
	return ""
}
