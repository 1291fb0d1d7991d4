package qemu

import (
	"context"
	"time"
)

// rdtsc reads this processor's time stamp counter; there is no way to it in Go.
func rdtsc() uint64

// The counter is compared with the clock over such a time; an instant is looked for so often, of which the one counts that took least.
const (
	tscSpan  = 100 * time.Millisecond
	tscTries = 64
)

// hostTSC measures the frequency of this machine's time stamp counter, in kHz. It takes 0.1 s, and is right to a few millionths on a busy machine too: where it is
// interrupted, another try counts. 0: ctx is done, or the counter makes no sense.
func hostTSC(ctx context.Context) uint64 {
	t0, c0 := instant()
	select {
	case <-ctx.Done():
		return 0
	case <-time.After(tscSpan):
	}
	t1, c1 := instant()
	if c1 <= c0 {
		return 0
	}
	return uint64(float64(c1-c0) / float64(t1.Sub(t0)) * 1e6)
}

// instant returns a time, and the counter in its middle.
func instant() (at time.Time, counter uint64) {
	least := time.Duration(1 << 62)
	for range tscTries {
		before := time.Now()
		c := rdtsc()
		if took := time.Since(before); took < least {
			least, at, counter = took, before.Add(took/2), c
		}
	}
	return at, counter
}
