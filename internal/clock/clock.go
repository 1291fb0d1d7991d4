// Package clock says in a sentence why a node's clock must be wrong. A clock can only be proved wrong: by something that was made later than it says, or by
// other clocks. Everything here is pure.
package clock

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

const (
	// Slack is how far two clocks may be apart without anybody being told: certificates are made valid five minutes back.
	Slack = 2 * time.Minute
	// buildSlack is for the clock of the machine that built the image.
	buildSlack = 24 * time.Hour
	// oldest is how long after it was built an image is expected to run: a clock that is ahead of that is a sign, and no proof.
	oldest = 5 * 365 * 24 * time.Hour
)

// Advice is how a node's clock is set: nothing on the node sets it, it comes from the machine's own at each boot.
const Advice = "set the machine's clock, in its firmware or hypervisor, and restart the node: bhctl reboot"

func say(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// Built compares a clock with the time at which the running image was built; "" if nothing is wrong, or if built is zero, which is not known.
func Built(now, built time.Time) string {
	switch {
	case built.IsZero():
		return ""
	case now.Before(built.Add(-buildSlack)):
		return fmt.Sprintf("the clock says %s; this image was built %s: %s", say(now), say(built), Advice)
	case now.After(built.Add(oldest)):
		return fmt.Sprintf("the clock says %s, more than five years after this image was built (%s): %s", say(now), say(built), Advice)
	}
	return ""
}

// Cluster judges by how far the clock of a control plane is ahead of this node's, which may be negative; "" if it is close enough.
func Cluster(now time.Time, ahead time.Duration) string {
	if ahead.Abs() <= Slack {
		return ""
	}
	return fmt.Sprintf("the clock says %s, and the control plane's said %s: one of the two is wrong; %s", say(now), say(now.Add(ahead)), Advice)
}

// Authority compares a clock with the start of a certificate that exists; "" if nothing is wrong.
func Authority(now, from time.Time, what string) string {
	if !now.Before(from.Add(-Slack)) {
		return ""
	}
	return fmt.Sprintf("the clock says %s; %s is valid from %s: %s", say(now), what, say(from), Advice)
}

// Handshake says whose clock is wrong if that is why a certificate was not accepted; "" if err is about something else. built is when the program that
// judged was built, which proves its own clock wrong if it is behind; zero: not known.
func Handshake(err error, now, built time.Time) string {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired || invalid.Cert == nil {
		return ""
	}
	c := invalid.Cert
	switch {
	case !built.IsZero() && now.Before(built.Add(-buildSlack)):
		return fmt.Sprintf("the clock here says %s, before this version was built (%s), so the certificate of the other side seems not to be valid yet: %s", say(now), say(built), Advice)
	case now.Before(c.NotBefore):
		return fmt.Sprintf("the certificate of the other side is valid from %s, and the clock here says %s: one of the two clocks is wrong; set it", say(c.NotBefore), say(now))
	}
	return fmt.Sprintf("the certificate of the other side was valid until %s, and the clock here says %s: it was not renewed, or one of the two clocks is wrong", say(c.NotAfter), say(now))
}
