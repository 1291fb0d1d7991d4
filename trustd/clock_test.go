package trustd

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"
)

// A node whose clock is before its own authority says so: nothing that this authority signed would seem valid.
func TestClockTrouble(t *testing.T) {
	made := time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC)
	own := &keyring{os: &authority{cert: &x509.Certificate{NotBefore: made}}}
	for name, c := range map[string]struct {
		k    *keyring
		now  time.Time
		want string
	}{
		"no authority yet": {&keyring{}, made.AddDate(-10, 0, 0), ""},
		"right":            {own, made.Add(time.Hour), ""},
		"years behind":     {own, made.AddDate(-10, 0, 0), "the clock says 2016-11-26T00:00:00Z; the cluster's authority is valid from 2026-11-26T00:00:00Z"},
		"a worker's":       {&keyring{node: &member{osCA: &x509.Certificate{NotBefore: made}}}, made.AddDate(-10, 0, 0), "the clock says 2016"},
	} {
		if got := clockTrouble(c.k, c.now); (got == "") != (c.want == "") || !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
