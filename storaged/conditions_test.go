package storaged

import (
	"strings"
	"testing"
)

func TestConditions(t *testing.T) {
	got := func(volumes map[VolumeName]Space) string {
		var b strings.Builder
		for _, c := range conditions(State{Volumes: volumes}) {
			b.WriteString(c.GetName() + "=" + c.GetTrouble() + ";")
		}
		return b.String()
	}
	for _, c := range []struct {
		volumes map[VolumeName]Space
		want    string
	}{
		{nil, ""},
		{map[VolumeName]Space{StateVolume: {Size: 100 * mib, Free: 50 * mib}, VarVolume: {Size: gib, Free: 512 * mib}}, "STATE.room=;VAR.room=;"},
		{map[VolumeName]Space{VarVolume: {Size: gib, Free: 0}}, "VAR.room=VAR is full: " + remedy[VarVolume] + ";"},
		{map[VolumeName]Space{VarVolume: {Size: 100 * mib, Free: mib - 1}}, "VAR.room=VAR is full: " + remedy[VarVolume] + ";"},
		{map[VolumeName]Space{VarVolume: {Size: 100 * mib, Free: mib}}, "VAR.room=;"},
	} {
		if s := got(c.volumes); s != c.want {
			t.Errorf("%v: got %q, want %q", c.volumes, s, c.want)
		}
	}
}
