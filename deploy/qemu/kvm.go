package qemu

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// probeLimit is how long the kernel may take to fail to find a root. With KVM it takes about one second.
const probeLimit = 5 * time.Second

// chooseAccel returns KVM where it really runs a guest, and why. That /dev/kvm opens proves little: on hosts that are
// machines themselves, a guest may start and never get anywhere. So the kernel is booted once, without a root, and must
// panic in time. The answer is kept until the host boots again.
func chooseAccel(ctx context.Context, vmlinuz string) (accel, why string) {
	if forced := os.Getenv("BULKHEAD_ACCEL"); forced == accelKVM || forced == accelTCG {
		return forced, "BULKHEAD_ACCEL says so"
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return accelTCG, "emulation, ten times slower: " + err.Error()
	}
	f.Close()
	memo := probeMemo()
	if text, err := os.ReadFile(memo); err == nil {
		accel, why, _ = strings.Cut(strings.TrimSpace(string(text)), " ")
		if accel == accelKVM || accel == accelTCG {
			return accel, why
		}
	}
	accel, why = accelTCG, "emulation, ten times slower: /dev/kvm is there but ran no guest within "+probeLimit.String()
	if probe(ctx, vmlinuz) {
		accel, why = accelKVM, "a guest ran with it"
	}
	if ctx.Err() == nil && memo != "" && os.MkdirAll(filepath.Dir(memo), 0o755) == nil {
		os.WriteFile(memo, []byte(accel+" "+why+"\n"), 0o644) // if it fails, the next machine probes again
	}
	return accel, why
}

// probeMemo names the file for this boot of the host, "" if there is no place for one.
func probeMemo() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	dir, derr := os.UserCacheDir()
	if err != nil || derr != nil {
		return ""
	}
	return filepath.Join(dir, "bulkhead", "accel-"+strings.TrimSpace(string(id)))
}

func probe(ctx context.Context, vmlinuz string) bool {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-no-user-config", "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "kvm", "-cpu", "host",
		"-m", "256", "-no-reboot", "-serial", "stdio", "-kernel", vmlinuz, "-append", "console=ttyS0 panic=-1")
	var out bytes.Buffer
	cmd.Stdout = &out
	err := cmd.Run()
	return err == nil && bytes.Contains(out.Bytes(), []byte("Kernel panic - not syncing: VFS"))
}
