package apid

import (
	"context"
	"time"

	"github.com/bulkhead-os/bulkhead/internal/clock"
	"github.com/bulkhead-os/bulkhead/internal/errs"
	release "github.com/bulkhead-os/bulkhead/internal/version"
)

// clockLook is how often streams are compared with the clock: it may have been set, which no timer notices.
const clockLook = 30 * time.Second

// ends is when the credential of a call is good no more; the zero time if it needs none.
func (c *call) ends() time.Time {
	switch {
	case c.proved.expires.IsZero():
		return time.Time{}
	case c.byToken: // as long as a new call with it would be let in
		return c.proved.expires.Add(tokenLeeway)
	}
	return c.proved.expires
}

// expired returns why a call that was let in has to end by now; nil if it has not. It is pure.
func (c *call) expired(now time.Time) error {
	end := c.ends()
	if end.IsZero() || now.Before(end) {
		return nil
	}
	at := c.proved.expires.UTC().Format(time.RFC3339)
	switch {
	case c.proved.node != "": // it has a newer one by now: who called through it is not to blame
		return errs.New(errs.Unavailable, "the certificate with which node %q opened this stream expired at %s: open it again", c.proved.node, at)
	case c.byToken:
		return errs.New(errs.Unauthenticated, "your token expired at %s, and the stream that was opened with it ends: get another one (bhctl token) and open it again", at)
	}
	return errs.New(errs.Unauthenticated, "your certificate expired at %s, and the stream that was opened with it ends: get another one (bhctl certificate) and open it again", at)
}

// endWithCredential sees that a stream does not outlive what its caller showed. The caller calls the function that it gets when the stream is over.
func (d *Daemon) endWithCredential(c *call) (done func()) {
	end := c.ends()
	if end.IsZero() || c.single() {
		return func() {} // a call with one answer is short
	}
	timer := time.AfterFunc(end.Sub(d.cfg.Now()), func() {
		if err := c.expired(d.cfg.Now()); err != nil { // else the clock was set back: followClock goes on looking
			d.cut(c, err)
		}
	})
	return func() { timer.Stop() }
}

// followClock ends streams whose credentials expired by a jump of the clock.
func (d *Daemon) followClock(ctx context.Context) error {
	t := time.NewTicker(clockLook)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
		d.expire(d.cfg.Now())
	}
}

// expire ends all streams whose credentials are good no more at a time.
func (d *Daemon) expire(now time.Time) {
	for _, c := range d.live.all() {
		if c.single() {
			continue
		}
		if err := c.expired(now); err != nil {
			d.cut(c, err)
		}
	}
}

// errExpired is for the holder of one that was good, as this node's clock has it.
func errExpired(end, now time.Time) error {
	t := clock.Built(now, release.BuildTime())
	if t == "" {
		t = "this node's clock says " + now.UTC().Format(time.RFC3339)
	}
	return errs.New(errs.Unauthenticated, "your certificate expired at %s; %s", end.UTC().Format(time.RFC3339), t)
}

// errNotYet is for the holder of a certificate that will be good.
func errNotYet(from, now time.Time) error {
	if t := clock.Built(now, release.BuildTime()); t != "" {
		return errs.New(errs.Unauthenticated, "your certificate is valid from %s, and this node does not think so: %s", from.UTC().Format(time.RFC3339), t)
	}
	return errs.New(errs.Unauthenticated, "your certificate is valid from %s, and this node's clock says %s: one of the two clocks is wrong; set it", from.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
}
