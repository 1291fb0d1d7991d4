package qemu

import (
	"runtime"
	"strings"
	"testing"
)

// The frequency is measured alike each time, by which the guest's clock then goes: a thousandth would be a minute and a half a day.
func TestHostTSC(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("there is no such counter")
	}
	a, b := hostTSC(t.Context()), hostTSC(t.Context())
	if a < 100_000 || a > 20_000_000 {
		t.Errorf("%d kHz is no processor's frequency", a)
	}
	if d := max(a, b) - min(a, b); d*1000 > a {
		t.Errorf("measured %d and then %d kHz", a, b)
	}
}

// Only a kernel that QEMU starts directly and emulates is told the frequency: with KVM it knows, and behind a firmware the command line is the image's.
func TestEmulatedKernelIsToldTheFrequency(t *testing.T) {
	direct, firmware := aMachine(t), aMachine(t)
	firmware.Firmware = UEFI
	for _, c := range []struct {
		m     Machine
		accel string
		tsc   uint64
		want  string
	}{{direct, accelTCG, 2_100_000, " tsc_early_khz=2100000"}, {direct, accelTCG, 0, ""}, {direct, accelKVM, 2_100_000, ""}, {firmware, accelTCG, 2_100_000, ""}} {
		args := strings.Join(c.m.args("bulkhead", c.accel, c.tsc, false), " ")
		if has := strings.Contains(args, "tsc_early_khz"); has != (c.want != "") || !strings.Contains(args, c.want) {
			t.Errorf("%s %q, %d kHz: %s", c.accel, c.m.Firmware, c.tsc, args)
		}
	}
}
