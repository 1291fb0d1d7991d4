package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// maxSlow bounds Machine.Slow: what people wait for takes as many times longer.
const maxSlow = 10

// fakers are where Debian's libfaketime has its library for programs with threads.
const fakers = "/usr/lib/*/faketime/libfaketimeMT.so.1"

// slowEnv is what QEMU needs in its environment for a machine whose clocks are slow: nothing, if they are not.
//
// An emulated machine has two kinds of clock. Timers and the RTC are QEMU's, which asks the C library for the time, and libfaketime stands between; the time stamp
// counter is the host's, and the guest's kernel is told that it counts Slow times as fast as it does (clockArgs). All machines with the same Slow and SlowSince
// have the same time, whenever they are started, and it lies behind the host's.
func (m Machine) slowEnv(now time.Time) ([]string, error) {
	if m.Slow == 0 {
		return nil, nil
	}
	found, err := filepath.Glob(fakers)
	if err != nil || len(found) == 0 {
		return nil, errors.Join(err, fmt.Errorf("machine %s: slow clocks: %s is missing: install the package libfaketime (on Debian and Ubuntu)", m.Name, fakers))
	}
	return append(os.Environ(), "LD_PRELOAD="+found[0], "FAKETIME="+m.fakeTime(now)), nil
}

// fakeTime is how far a machine that is started now lies behind already, and how fast it goes on. It is pure.
func (m Machine) fakeTime(now time.Time) string {
	behind := now.Sub(m.SlowSince).Seconds() * (1 - 1/float64(m.Slow))
	return fmt.Sprintf("-%.3f x%.9f", max(0, behind), 1/float64(m.Slow))
}

// HostTime is the host's time in which d passes in the machine.
func (m Machine) HostTime(d time.Duration) time.Duration { return d * time.Duration(max(1, m.Slow)) }
