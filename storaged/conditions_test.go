package storaged

import (
	"strings"
	"testing"

	"github.com/bulkhead-os/bulkhead/internal/needs"
	"github.com/bulkhead-os/bulkhead/storaged/vault"
)

func TestConditions(t *testing.T) {
	got := func(volumes map[VolumeName]Space) string {
		var b strings.Builder
		for _, c := range conditions(State{Volumes: volumes}) {
			if name, ok := strings.CutSuffix(c.GetName(), ".mounted"); ok { // for bhctl why: health says what is wrong with a volume
				if _, mounted := volumes[VolumeName(name)]; mounted != (c.GetTrouble() == "") || !c.GetExplains() {
					t.Errorf("%v: %v", volumes, c)
				}
				continue
			}
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

func TestUnlocksCondition(t *testing.T) {
	m := machine(imageDisk("/dev/vda", 8*gib))
	m.TPM = vault.Machine{TPM: true, ImageEpoch: 1}
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	state := m.Disks[0].part(5)
	for _, c := range []struct {
		change func()
		want   string // of STATE's trouble; "" is none
	}{
		{func() {}, ""},
		{func() { state.Why = "tpm: cleared" }, "did not open by itself (tpm: cleared)"},
		{func() { state.Map = Map{} }, "STATE is locked (tpm: cleared)"},
		{func() { state.LUKS.Keys = state.LUKS.Keys[:1] }, "unlocked: STATE is locked (tpm: cleared)"}, // it has only the recovery key: a person is wanted
		{func() { state.Map = Map{Device: "/dev/dm-1"} }, ""},
		{func() { state.Attributes = unformatted }, "none"},
	} {
		c.change()
		got := "none"
		for _, x := range conditions(m.State) {
			if x.Name == "STATE.unlocks" {
				got = x.Trouble
			} else if x.Name == "STATE.unlocked" && x.Trouble != "" { // it would not open by itself, in any version
				got = "unlocked: " + x.Trouble
			} else if x.Name == "STATE.unlocked" {
				got = ""
			}
		}
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

// What these conditions need has a name that somebody reports, and what others need of them is reported.
func TestNeeds(t *testing.T) {
	told := map[string]bool{}
	m := machine(imageDisk("/dev/vda", 8*gib))
	m.TPM = vault.Machine{TPM: true, ImageEpoch: 1}
	if err := m.run(t, &childSpec); err != nil {
		t.Fatal(err)
	}
	for _, people := range []bool{false, true} { // with keys that open by themselves, then without
		for i := range m.Disks[0].Partitions {
			if p := &m.Disks[0].Partitions[i]; people && p.encrypted() {
				p.LUKS.Keys = nil
			}
		}
		have := m.State
		have.Volumes = map[VolumeName]Space{StateVolume: {Size: mib, Free: mib}, VarVolume: {Size: mib, Free: mib}}
		for _, c := range conditions(have) {
			told[c.GetName()] = true
			for _, ref := range c.GetNeeds() {
				if !needs.Known(ref) {
					t.Errorf("%s needs %s, which nobody reports", c.GetName(), ref)
				}
			}
		}
	}
	for _, name := range needs.Of("storaged") {
		if !told[name] {
			t.Errorf("others refer to %s, which is not reported", name)
		}
	}
}
