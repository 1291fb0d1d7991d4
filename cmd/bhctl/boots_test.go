package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	machinev1 "github.com/bulkhead-os/bulkhead/api/machine/v1"
)

// TestSecurityRow: what the node itself should have done stands out from what its machine does not have.
func TestSecurityRow(t *testing.T) {
	for _, c := range []struct {
		s    *machinev1.SecuritySetting
		want string
	}{
		{&machinev1.SecuritySetting{Name: "a", Wanted: "1", Actual: "1", Ok: true, Why: "w"}, "a|1|1|yes|w"},
		{&machinev1.SecuritySetting{Name: "a", Wanted: "1", Actual: "0", Why: "w"}, "a|1|0|NO|w"},
		{&machinev1.SecuritySetting{Name: "tpm", Wanted: "2", Actual: "none", Advisory: true}, "tpm|2|none|no|"},
		{&machinev1.SecuritySetting{Name: "lsm.ipe", Actual: "active", Ok: true, Advisory: true}, "lsm.ipe|-|active|-|"},
	} {
		if got := strings.Join(securityRow(c.s), "|"); got != c.want {
			t.Errorf("%v: got %s, want %s", c.s, got, c.want)
		}
	}
}

func TestBootRow(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	for _, c := range []struct {
		b    *machinev1.Boot
		want string
	}{
		{&machinev1.Boot{Number: 7, Id: "a", Version: "v1.2.3", Started: timestamppb.New(at), End: machinev1.Boot_RUNNING}, "7|v1.2.3|2026-01-02 03:04:05|running|"},
		{&machinev1.Boot{Number: 6, End: machinev1.Boot_PANIC, Detail: "out of luck"}, "6|-|-|panic|out of luck; it was boot 5 on its way down, or one that did not get as far as STATE"},
	} {
		if got := strings.Join(bootRow(c.b), "|"); got != c.want {
			t.Errorf("%v: got %s, want %s", c.b, got, c.want)
		}
	}
}
